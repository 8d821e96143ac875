//! The devices in I/O port space that every machine has: serial port, real-time clock, ACPI registers, and the reset
//! and exit ports.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use devices::acpi::{
    EVENTS_PORT, EVENTS_PORTS, EventsSnapshot, GENERIC_EVENTS_INTERRUPT, GenericEvents, RESET_PORT,
    ResetRegister, SLEEP_CONTROL_PORT, SLEEP_PORTS, SleepControl, SleepSnapshot,
};
use devices::{
    BusDevice, COM1_INTERRUPT, COM1_PORT, COM1_PORTS, DEBUG_EXIT_PORT, DebugExit, I8042_PORT,
    I8042_PORTS, PortBus, PortRange, PortSpace, RTC_PORT, RTC_PORTS, ResetController, Rtc,
    RtcMemory, SavedState, Serial, SerialOutput, SharedBusDevice,
};
use kvm_ioctls::VmFd;
use minicbor::{Decode, Encode};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::end::OnEnd;
use super::{MachineError, Result, kvm_error, sections};
use crate::memory::{GuestRam, HIGH_RAM_START, byte_len};
use crate::vcpu::GuestEnd;
use migration::Section;

/// Device as the port bus holds it.
type SharedDevice = SharedBusDevice<PortSpace>;
/// Callback of the sleep control register for power-off.
type PowerOff = Box<dyn Fn() + Send>;

/// Devices in I/O port space of one machine.
pub(super) struct PortDevices {
    pub(super) serial: Serial,
    pub(super) events: GenericEvents,
    rtc: Arc<Mutex<Rtc>>,
    sleep: Arc<Mutex<SleepControl<PowerOff>>>,
}

/// Saved state of the ACPI registers. The reset register has no state.
#[derive(Encode, Decode)]
#[cbor(map)]
pub(super) struct AcpiSnapshot {
    #[n(0)]
    sleep: SleepSnapshot,
    #[n(1)]
    events: EventsSnapshot,
}

impl SavedState for AcpiSnapshot {
    const VERSION: u16 = 1;
}

impl PortDevices {
    /// Creates the devices in their state after power-on.
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

    /// Creates the devices in the state that [`Self::save`] wrote.
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

    /// Saves the state of the devices, one section each.
    pub(super) fn save(&self) -> [Section; 3] {
        let acpi = AcpiSnapshot {
            sleep: lock(&self.sleep).save(),
            events: self.events.save(),
        };
        [
            sections::encode(sections::SERIAL, &self.serial.save()),
            sections::encode(sections::RTC, &lock(&self.rtc).save()),
            sections::encode(sections::ACPI, &acpi),
        ]
    }

    /// Returns a port bus with all devices at the ports of a PC.
    pub(super) fn bus(&self, on_end: &OnEnd) -> Result<PortBus> {
        let exit = Arc::clone(on_end);
        let debug_exit = DebugExit::new(move |status| exit(GuestEnd::DebugExit(status)));
        let keyboard = ResetController::new(reset(on_end));
        let reset = ResetRegister::new(reset(on_end));
        let devices: [(u16, u16, SharedDevice); 7] = [
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
            ports.insert(
                PortRange {
                    base: first,
                    len: count,
                },
                device,
            )?;
        }
        Ok(ports)
    }
}

fn shared(device: impl BusDevice<PortSpace> + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    // The registers of a device are plain values: each is valid even if a panic interrupted an access.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a callback that ends the guest by power-off.
fn power_off(on_end: &OnEnd) -> PowerOff {
    let on_end = Arc::clone(on_end);
    Box::new(move || on_end(GuestEnd::PowerOff))
}

/// Returns a callback that ends the guest by a reset.
fn reset(on_end: &OnEnd) -> impl Fn() + Send + use<> {
    let on_end = Arc::clone(on_end);
    move || on_end(GuestEnd::Reset)
}

/// Creates an eventfd that raises an edge on interrupt line `line` when it is signalled.
pub(super) fn interrupt(vm: &VmFd, line: u32) -> Result<EventFd> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(|source| MachineError::Kvm {
        call: "eventfd",
        source,
    })?;
    vm.register_irqfd(&event, line)
        .map_err(kvm_error("KVM_IRQFD"))?;
    Ok(event)
}

/// Returns the bytes of RAM below and above 4 GiB, which the CMOS memory of the clock reports.
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
