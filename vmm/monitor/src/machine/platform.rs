//! The devices that every machine has: serial port, clock, ACPI's registers, and the ways to end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use devices::acpi::{
    EVENTS_PORT, EVENTS_PORTS, EventsSnapshot, GENERIC_EVENTS_INTERRUPT, GenericEvents, RESET_PORT,
    ResetRegister, SLEEP_CONTROL_PORT, SLEEP_PORTS, SleepControl, SleepSnapshot,
};
use devices::{
    COM1_INTERRUPT, COM1_PORT, COM1_PORTS, DEBUG_EXIT_PORT, DebugExit, I8042_PORT, I8042_PORTS,
    PortBus, PortDevice, PortRange, RTC_PORT, RTC_PORTS, ResetController, Rtc, RtcMemory, Serial,
    SerialOutput,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{MachineError, Result, kvm_error, sections};
use crate::memory::{GuestRam, HIGH_RAM_START, byte_len};
use crate::vcpu::GuestEnd;
use migration::guest::Section;

/// Told of the guest's end, from any thread.
pub(super) type OnEnd = Arc<dyn Fn(GuestEnd) + Send + Sync>;

type Shared = Arc<Mutex<dyn PortDevice>>;
type OnOff = Box<dyn Fn() + Send>;

/// The devices that every machine has.
pub(super) struct Platform {
    pub(super) serial: Serial,
    pub(super) events: GenericEvents,
    rtc: Arc<Mutex<Rtc>>,
    sleep: Arc<Mutex<SleepControl<OnOff>>>,
}

/// The state of ACPI's registers. The reset register has none.
#[derive(Serialize, Deserialize)]
struct AcpiSnapshot {
    sleep: SleepSnapshot,
    events: EventsSnapshot,
}

impl Platform {
    /// The devices as they are at power-on.
    pub(super) fn new(
        vm: &VmFd,
        ram: &GuestRam,
        output: SerialOutput,
        on_end: &OnEnd,
    ) -> Result<Self> {
        let rtc = Rtc::new(rtc_memory(ram), Box::new(SystemTime::now));
        Ok(Self {
            serial: Serial::new(interrupt(vm, COM1_INTERRUPT)?, output),
            events: GenericEvents::new(interrupt(vm, GENERIC_EVENTS_INTERRUPT)?),
            rtc: Arc::new(Mutex::new(rtc)),
            sleep: Arc::new(Mutex::new(SleepControl::new(power_off(on_end)))),
        })
    }

    /// The devices as they were saved.
    pub(super) fn restore(
        saved: &[Section],
        vm: &VmFd,
        output: SerialOutput,
        on_end: &OnEnd,
    ) -> Result<Self> {
        let serial = sections::decode(saved, sections::SERIAL)?;
        let rtc = sections::decode(saved, sections::RTC)?;
        let acpi: AcpiSnapshot = sections::decode(saved, sections::ACPI)?;
        let events = GenericEvents::restore(acpi.events, interrupt(vm, GENERIC_EVENTS_INTERRUPT)?)?;
        let rtc = Rtc::restore(&rtc, Box::new(SystemTime::now))?;
        let sleep = SleepControl::restore(acpi.sleep, power_off(on_end))?;
        Ok(Self {
            serial: Serial::restore(&serial, interrupt(vm, COM1_INTERRUPT)?, output)?,
            events,
            rtc: Arc::new(Mutex::new(rtc)),
            sleep: Arc::new(Mutex::new(sleep)),
        })
    }

    /// Their state, a section each.
    pub(super) fn save(&self) -> Result<[Section; 3]> {
        let acpi = AcpiSnapshot {
            sleep: lock(&self.sleep).save(),
            events: self.events.save(),
        };
        Ok([
            sections::encode(sections::SERIAL, &self.serial.save())?,
            sections::encode(sections::RTC, &lock(&self.rtc).save())?,
            sections::encode(sections::ACPI, &acpi)?,
        ])
    }

    /// All of them where a guest looks for them.
    pub(super) fn ports(&self, on_end: &OnEnd) -> Result<PortBus> {
        let exit = Arc::clone(on_end);
        let debug_exit = DebugExit::new(move |status| exit(GuestEnd::DebugExit(status)));
        let keyboard = ResetController::new(reset(on_end));
        let reset = ResetRegister::new(reset(on_end));
        let devices: [(u16, u16, Shared); 7] = [
            (COM1_PORT, COM1_PORTS, shared(self.serial.clone())),
            (DEBUG_EXIT_PORT, 1, shared(debug_exit)),
            (I8042_PORT, I8042_PORTS, shared(keyboard)),
            (RTC_PORT, RTC_PORTS, Arc::clone(&self.rtc) as _),
            (
                SLEEP_CONTROL_PORT,
                SLEEP_PORTS,
                Arc::clone(&self.sleep) as _,
            ),
            (RESET_PORT, 1, shared(reset)),
            (EVENTS_PORT, EVENTS_PORTS, shared(self.events.clone())),
        ];
        let mut ports = PortBus::new();
        for (first, count, device) in devices {
            ports.insert(PortRange { first, count }, device)?;
        }
        Ok(ports)
    }
}

fn shared(device: impl PortDevice + 'static) -> Shared {
    Arc::new(Mutex::new(device))
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    // The registers of a device are plain values, each valid by itself.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn power_off(on_end: &OnEnd) -> OnOff {
    let on_end = Arc::clone(on_end);
    Box::new(move || on_end(GuestEnd::PowerOff))
}

fn reset(on_end: &OnEnd) -> impl Fn() + Send + use<> {
    let on_end = Arc::clone(on_end);
    move || on_end(GuestEnd::Reset)
}

/// An event that pulses the interrupt `line`.
pub(super) fn interrupt(vm: &VmFd, line: u32) -> Result<EventFd> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(|source| MachineError::Kvm {
        call: "eventfd",
        source,
    })?;
    vm.register_irqfd(&event, line)
        .map_err(kvm_error("KVM_IRQFD"))?;
    Ok(event)
}

fn rtc_memory(ram: &GuestRam) -> RtcMemory {
    let bytes = |high: bool| {
        ram.ranges()
            .filter(|range| (range.start().0 >= HIGH_RAM_START) == high)
            .map(|range| byte_len(&range))
            .sum()
    };
    RtcMemory {
        low: bytes(false),
        high: bytes(true),
    }
}
