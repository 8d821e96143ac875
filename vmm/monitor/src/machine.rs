//! A machine: memory, vCPUs, interrupt controllers and devices, put together in one place.
//!
//! It comes in two steps, because a guest that arrives brings its state last: an [`EmptyMachine`] has
//! memory and vCPUs and nothing in them; booting it or restoring a guest into it makes a [`Machine`], whose
//! vCPUs wait until it is resumed.

mod kvm;
mod log;
mod platform;
mod sections;
mod virtio;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::acpi::{EventsError, GenericEvent, SleepError};
use devices::virtio::BalloonControl;
use devices::{MmioBus, PortBus, PortsError, RtcError, Serial, SerialError, SerialOutput};
use ept::{Notifier, OpenError, Subscription};
use kvm_bindings::{kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::boot::{self, BootError, CpuidError, GuestCpuid, Payload};
use crate::config::DevicesConfig;
use crate::kvm::dirty_log::{self, DirtyLogMode};
use crate::kvm::host::{Host, HostError};
use crate::kvm::logging::{DirtyLog, LogError};
use crate::kvm::slots::{SlotError, Slots};
use crate::kvm::state::{self, StateError};
use crate::memory::{Backing, DeviceMemory, GuestRam, MemoryError};
use crate::vcpu::{Gate, GuestEnd, KickError, Vcpu, VcpuContext};
use migration::guest::Section;
use migration::header::{Description, HostSide, SectionKind};

use platform::{OnEnd, Platform};
pub use virtio::{DeviceCounters, DevicesError, DiskError, OnLoss, TapError, look};
use virtio::{Devices, Opened, Opening};

/// The most vCPUs of a guest.
pub const MAX_CPUS: u32 = 64;
/// Where KVM keeps three pages of its own on Intel hosts, in the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// The shape of a machine.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// What the RAM is made of.
    pub backing: Backing,
    /// The dirty log to use; none leaves the choice to Ferry.
    pub dirty_log: Option<DirtyLogMode>,
}

/// Why a machine could not be made, started or changed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// More vCPUs than can be, or none.
    #[error("{0} vCPUs cannot be: from 1 to {1}")]
    Cpus(u32, u32),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory as devices see it.
    #[error("guest memory for devices: {0}")]
    DeviceMemory(#[source] io::Error),
    /// KVM refused to make a part of the machine.
    #[error("{call}: {source}")]
    Kvm {
        /// The call's name in the kernel's documentation.
        call: &'static str,
        /// What KVM said.
        source: io::Error,
    },
    /// A memory slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The CPU features of the guest.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// The kernel and what comes with it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// State to save or restore.
    #[error("{section}: {source}")]
    State {
        /// Which section.
        section: String,
        /// What is wrong.
        source: StateError,
    },
    /// A section of state that is missing, unknown, or not to be understood.
    #[error("section {section}: {why}")]
    Section {
        /// Which section.
        section: String,
        /// What is wrong.
        why: String,
    },
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The clock.
    #[error(transparent)]
    Rtc(#[from] RtcError),
    /// The sleep registers.
    #[error(transparent)]
    Sleep(#[from] SleepError),
    /// The register of events, or the interrupt that tells of them.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// Two devices at one place.
    #[error(transparent)]
    Ports(#[from] PortsError),
    /// A virtio device, or its host's side.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// A thread, or what it needs.
    #[error("vcpu{0}: {1}")]
    Thread(u32, #[source] io::Error),
    /// A vCPU that does not stop.
    #[error(transparent)]
    Kick(#[from] KickError),
    /// A vCPU could not be subscribed to changes of memory.
    #[error(transparent)]
    Notifier(#[from] OpenError),
    /// The dirty log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The guest has come to its end.
    #[error("the guest has ended")]
    Ended,
}

type Result<T> = std::result::Result<T, MachineError>;

fn kvm_error(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm {
        call,
        source: source.into(),
    }
}

/// What a machine tells and shows the outside.
pub struct Wiring {
    /// Where the guest's serial output goes.
    pub serial_output: SerialOutput,
    /// Told once how the guest came to its end, from any thread.
    pub on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
    /// Told by which device, and why, a process that served it was lost, from any thread.
    pub on_loss: OnLoss,
}

/// A machine with nothing in it.
pub struct EmptyMachine {
    host: Arc<Host>,
    vm: Arc<VmFd>,
    slots: Slots,
    vcpus: Vec<VcpuFd>,
    notifier: Notifier,
    devices: Vec<Opened>,
    dirty_log: DirtyLogMode,
}

impl EmptyMachine {
    /// Makes a machine of this shape.
    ///
    /// # Errors
    /// A shape that cannot be, and what the host will not give.
    pub fn new(host: &Arc<Host>, shape: &Shape) -> Result<Self> {
        let most = MAX_CPUS.min(u32::try_from(host.max_vcpus()).unwrap_or(MAX_CPUS));
        if !(1..=most).contains(&shape.cpus) {
            return Err(MachineError::Cpus(shape.cpus, most));
        }
        let dirty_log = host.dirty_log(shape.dirty_log)?;
        let ram = Arc::new(GuestRam::new(shape.memory_bytes, shape.backing)?);
        let vm = host.kvm().create_vm().map_err(kvm_error("KVM_CREATE_VM"))?;
        let vm = Arc::new(vm);
        dirty_log::configure(&vm, dirty_log).map_err(|source| MachineError::Kvm {
            call: "KVM_ENABLE_CAP dirty log",
            source,
        })?;
        // Before the controllers: a change of slots waits for the grace period that each change of KVM's buses begins.
        let slots = Slots::new(Arc::clone(&vm), ram)?;
        create_controllers(&vm)?;
        let vcpus = (0..shape.cpus)
            .map(|index| {
                vm.create_vcpu(u64::from(index))
                    .map_err(kvm_error("KVM_CREATE_VCPU"))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            host: Arc::clone(host),
            vm,
            slots,
            vcpus,
            notifier: Notifier::new(),
            devices: Vec::new(),
            dirty_log,
        })
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.slots.ram()
    }

    /// Opens the host's side of virtio devices. Disks are locked once there is a guest.
    ///
    /// # Errors
    /// What of the host cannot be had, by the option that asked for it.
    pub fn open_devices(&mut self, config: &DevicesConfig) -> Result<()> {
        let with = Opening {
            vm: &self.vm,
            ram: self.slots.ram(),
            notifier: &self.notifier,
        };
        self.devices = virtio::open(config, &with)?;
        Ok(())
    }

    /// Why the guest that `description` announces cannot be restored into this machine; nothing where it can.
    #[must_use]
    pub fn misfits(&self, description: &Description) -> Vec<String> {
        let here: Vec<HostSide> = self.devices.iter().map(Opened::host_side).collect();
        let misfits = virtio::misfits(&description.host_sides, &here);
        if !misfits.is_empty() {
            return misfits;
        }
        let mut needed = sections::kinds(self.vcpus.len());
        needed.extend(here.into_iter().map(|side| sections::kind(side.section)));
        sections::unreadable(&description.sections, &needed)
    }

    /// Loads a kernel. The machine's vCPUs wait at its entry.
    ///
    /// # Errors
    /// The kernel's, and KVM's.
    pub fn boot(self, payload: &Payload, wiring: Wiring) -> Result<Machine> {
        let memory = self.ram().memory();
        let places: Vec<_> = self.devices.iter().map(Opened::place).collect();
        let platform = boot::Platform {
            cpus: u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX),
            virtio_mmio: &places,
        };
        let loaded = boot::load(memory, payload, &platform)?;
        let count = u32::from(platform.cpus);
        let cpuid = GuestCpuid::new(self.host.kvm(), count)?;
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            vcpu.set_cpuid2(&cpuid.for_kvm(index)?)
                .map_err(kvm_error("KVM_SET_CPUID2"))?;
            boot::start_registers(memory, vcpu, index, &loaded)?;
        }
        let end = End::new(wiring.on_end);
        let platform = Platform::new(&self.vm, self.ram(), wiring.serial_output, &end.tell)?;
        let cpuid = cpuid.of_vcpu(0);
        self.assemble(platform, cpuid, end, &wiring.on_loss, None)
    }

    /// Restores a guest: vCPUs, controllers and devices as [`Machine::save`] wrote them. `cpuid` is what its
    /// source says that vCPU 0 was given; hosts that do not intercept CPUID report other values than that.
    ///
    /// # Errors
    /// Sections that are missing or make no sense, and KVM's.
    pub fn restore(
        self,
        saved: &[Section],
        cpuid: Vec<kvm_cpuid_entry2>,
        wiring: Wiring,
    ) -> Result<(Machine, Vec<String>)> {
        let left_out = self.restore_kvm(saved)?;
        let end = End::new(wiring.on_end);
        let platform = Platform::restore(saved, &self.vm, wiring.serial_output, &end.tell)?;
        let machine = self.assemble(platform, cpuid, end, &wiring.on_loss, Some(saved))?;
        Ok((machine, left_out))
    }

    fn assemble(
        self,
        platform: Platform,
        cpuid: Vec<kvm_cpuid_entry2>,
        end: End,
        on_loss: &OnLoss,
        saved: Option<&[Section]>,
    ) -> Result<Machine> {
        let ports = Arc::new(platform.ports(&end.tell)?);
        let memory = DeviceMemory::new(self.slots.ram()).map_err(MachineError::DeviceMemory)?;
        let devices = Devices::attach(self.devices, &self.vm, &memory, saved, on_loss)?;
        let mmio = Arc::new(devices.bus()?);
        let context = VcpuContext {
            ports: Arc::clone(&ports),
            mmio: Arc::clone(&mmio),
            on_end: end.tell,
        };
        let notifier = self.notifier;
        let mut vcpus = Vec::new();
        let mut subscriptions = Vec::new();
        for (index, fd) in (0..).zip(self.vcpus) {
            let vcpu = Vcpu::spawn(index, fd, context.clone())
                .map_err(|source| MachineError::Thread(index, source))?;
            subscriptions.push(notifier.subscribe(Arc::clone(vcpu.gate()) as _)?);
            vcpus.push(vcpu);
        }
        Ok(Machine {
            _subscriptions: subscriptions,
            vcpus,
            notifier,
            running: Mutex::new(false),
            ended: end.came,
            log: Mutex::new(DirtyLog::new(self.dirty_log)),
            devices,
            platform,
            cpuid,
            ports,
            mmio,
            slots: self.slots,
            vm: self.vm,
            host: self.host,
        })
    }
}

/// The interrupt controllers and the timer, which must be there before the vCPUs.
fn create_controllers(vm: &VmFd) -> Result<()> {
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(kvm_error("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(kvm_error("KVM_CREATE_IRQCHIP"))?;
    vm.create_pit2(kvm_pit_config::default())
        .map_err(kvm_error("KVM_CREATE_PIT2"))?;
    state::check_xsave(vm).map_err(|source| MachineError::State {
        section: "vcpu".into(),
        source,
    })
}

/// Tells the guest, through kvm-clock, that it stood: otherwise its watchdogs take the time for a lockup.
fn excuse_pause(gate: &Gate) {
    // A guest that does not use kvm-clock cannot be told: EINVAL (api.rst, KVM_KVMCLOCK_CTRL).
    let _without_clock = gate.fd().kvmclock_ctrl();
}

/// The end of a guest, which comes once.
struct End {
    came: Arc<AtomicBool>,
    tell: OnEnd,
}

impl End {
    fn new(on_end: OnEnd) -> Self {
        let came = Arc::new(AtomicBool::new(false));
        let first = Arc::clone(&came);
        let tell = Arc::new(move |end| {
            if !first.swap(true, Ordering::SeqCst) {
                on_end(end);
            }
        });
        Self { came, tell }
    }
}

/// A machine with a guest in it.
pub struct Machine {
    // Dropped from the top: nobody holds vCPUs any more, then they end, then what they run on goes.
    _subscriptions: Vec<Subscription>,
    vcpus: Vec<Vcpu>,
    notifier: Notifier,
    running: Mutex<bool>,
    ended: Arc<AtomicBool>,
    log: Mutex<DirtyLog>,
    devices: Devices,
    platform: Platform,
    cpuid: Vec<kvm_cpuid_entry2>,
    ports: Arc<PortBus>,
    mmio: Arc<MmioBus>,
    slots: Slots,
    vm: Arc<VmFd>,
    host: Arc<Host>,
}

impl Machine {
    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.slots.ram()
    }

    /// Its host.
    #[must_use]
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Its serial port.
    #[must_use]
    pub fn serial(&self) -> &Serial {
        &self.platform.serial
    }

    /// Its vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// Port accesses that no device claimed.
    #[must_use]
    pub fn unclaimed_ports(&self) -> u64 {
        self.ports.unclaimed()
    }

    /// Accesses in memory space that no device claimed.
    #[must_use]
    pub fn unclaimed_mmio(&self) -> u64 {
        self.mmio.unclaimed()
    }

    /// Its balloon, if it has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&BalloonControl> {
        self.devices.balloon()
    }

    /// What its virtio devices have done.
    #[must_use]
    pub fn device_counters(&self) -> DeviceCounters {
        self.devices.counters()
    }

    /// True while the guest is neither paused nor over.
    #[must_use]
    pub fn is_running(&self) -> bool {
        *self.running_state() && !self.has_ended()
    }

    /// True once the guest came to its end by itself.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Stops every vCPU: all are told, then all are waited for; then the devices, each after the request that it is
    /// at. Nothing writes to memory any more. Idempotent.
    ///
    /// # Errors
    /// A vCPU that does not stop, by name; the others run on.
    pub fn pause(&self) -> Result<()> {
        let mut running = self.running_state();
        if !*running {
            return Ok(());
        }
        self.gates().for_each(|gate| gate.hold());
        let stopped: std::result::Result<Vec<()>, _> =
            self.gates().map(|g| g.wait_parked()).collect();
        if let Err(error) = stopped {
            self.gates().for_each(|gate| gate.release());
            return Err(error.into());
        }
        self.devices.pause();
        *running = false;
        Ok(())
    }

    /// Lets devices and vCPUs run. Idempotent.
    ///
    /// # Errors
    /// A disk that was given up ([`Self::give_up_disks`]) and is another's now: nothing runs then.
    pub fn resume(&self) -> Result<()> {
        self.go_on(|devices| {
            devices.resume();
            Ok(())
        })
    }

    /// As [`Self::resume`], for a guest that has just arrived: it goes on if everything of it does. Otherwise nothing
    /// does, and it may go on where it came from.
    ///
    /// # Errors
    /// As there, and a vhost-user back end that was lost.
    pub fn resume_arrived(&self) -> Result<()> {
        self.go_on(Devices::resume_arrived)
    }

    fn go_on(&self, start: fn(&Devices) -> std::result::Result<(), DevicesError>) -> Result<()> {
        let mut running = self.running_state();
        if *running {
            return Ok(());
        }
        self.devices.lock_images()?;
        if let Err(error) = start(&self.devices) {
            self.devices.unlock_images()?;
            return Err(error.into());
        }
        self.gates().for_each(|gate| excuse_pause(gate));
        self.gates().for_each(|gate| gate.release());
        *running = true;
        Ok(())
    }

    /// Takes back what [`Self::give_up_disks`] gave away. Idempotent.
    ///
    /// # Errors
    /// A disk that is another's now.
    pub fn take_disks(&self) -> Result<()> {
        Ok(self.devices.lock_images()?)
    }

    /// Leaves the disks of the paused guest to the process that is to run it. [`Self::resume`] takes them back.
    ///
    /// # Errors
    /// The kernel's.
    pub fn give_up_disks(&self) -> Result<()> {
        Ok(self.devices.unlock_images()?)
    }

    /// The sections that [`Self::save`] writes.
    #[must_use]
    pub fn section_kinds(&self) -> Vec<SectionKind> {
        let mut kinds = sections::kinds(self.vcpus.len());
        kinds.extend(self.devices.section_kinds());
        kinds
    }

    /// What is on the host's side of its devices: another monitor that takes the guest has to have the same.
    #[must_use]
    pub fn host_sides(&self) -> Vec<HostSide> {
        self.devices.host_sides()
    }

    /// The state of all but memory. The machine is paused.
    ///
    /// # Errors
    /// KVM's, and a machine that runs.
    pub fn save(&self) -> Result<Vec<Section>> {
        let running = self.running_state();
        if *running || self.has_ended() {
            return Err(MachineError::Ended);
        }
        let mut saved = self.save_kvm()?;
        saved.extend(self.platform.save()?);
        saved.extend(self.devices.save()?);
        Ok(saved)
    }

    /// Gives the guest another generation ID and tells it so: for whoever clones a guest or puts it back in time,
    /// before it runs.
    ///
    /// # Errors
    /// A guest that has ended; no random bytes; an interrupt that cannot be raised.
    pub fn change_generation(&self) -> Result<()> {
        if self.has_ended() {
            return Err(MachineError::Ended);
        }
        boot::change_generation_id(self.ram().memory())?;
        Ok(self
            .platform
            .events
            .raise(GenericEvent::GenerationChanged)?)
    }

    /// Presses the power button. What the guest does about it is its own decision.
    ///
    /// # Errors
    /// A guest that has ended; an interrupt that cannot be raised.
    pub fn power_button(&self) -> Result<()> {
        if self.has_ended() {
            return Err(MachineError::Ended);
        }
        Ok(self.platform.events.raise(GenericEvent::PowerButton)?)
    }

    /// What vCPU 0 sees of its processor.
    #[must_use]
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    fn gates(&self) -> impl Iterator<Item = &Arc<Gate>> {
        self.vcpus.iter().map(Vcpu::gate)
    }

    fn running_state(&self) -> MutexGuard<'_, bool> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
