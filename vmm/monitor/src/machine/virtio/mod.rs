//! The virtio devices of a machine: opened on the host's side, put on the bus and wired to KVM, then stopped, saved
//! and restored together.
//!
//! ```text
//! DevicesConfig ─ open ─ Opened ─ start or restore ─ Devices
//!                 host's side     the guest is there
//! ```

mod disk;
mod open;
mod tap;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use devices::virtio::{
    BalloonControl, Device, Interrupt, MMIO_BYTES, MmioTransport, QUEUE_NOTIFY, VhostUser,
    VhostUserError, VirtioError, VirtioSnapshot, VsockError,
};
use devices::{BusError, MmioBus, MmioRange, MmioSpace};
use kvm_ioctls::{IoEventAddress, VmFd};

use super::dirty_logs::NamedBackEnd;
use super::facts::{DeviceFacts, NamedFacts};
use super::{MachineError, sections};
use crate::boot::VirtioMmioResources;
use crate::memory::DeviceMemory;
use migration::Section;

pub use disk::DiskError;
use disk::DiskImage;
pub use open::look;
pub(super) use open::{Opening, open};
pub use tap::TapError;

/// Why a device could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// A disk's image.
    #[error("--disk {0}")]
    Disk(#[from] DiskError),
    /// A vhost-user back end.
    #[error("--disk vhost_user=on,socket={0}")]
    VhostUser(#[from] VhostUserError),
    /// A vhost-user back end of a guest.
    #[error("{name}: {source}")]
    BackEnd {
        /// The device.
        name: String,
        /// What is wrong with it.
        source: VhostUserError,
    },
    /// A tap.
    #[error("--net: {0}")]
    Tap(#[from] TapError),
    /// The host's side of the socket device.
    #[error("--vsock: {0}")]
    Vsock(#[from] VsockError),
    /// The file of the console.
    #[error("--console {path}: {source}")]
    Console {
        /// Where it was to be.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// More devices than interrupt lines.
    #[error("{name}: there is room for {most} virtio devices")]
    TooMany {
        /// The first that has no place.
        name: String,
        /// How many places there are.
        most: u32,
    },
    /// A part of a device that the host will not give.
    #[error("{name}: {what}: {source}")]
    Host {
        /// The device.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A device, or its saved state.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// Two devices at one place.
    #[error(transparent)]
    Bus(#[from] BusError<MmioSpace>),
}

/// Who serves the queues of a device.
pub(super) enum Server {
    /// A thread of this process.
    Worker(Box<dyn Device<DeviceMemory>>),
    /// A process of its own.
    VhostUser(VhostUser<DeviceMemory>),
}

impl Server {
    /// Puts registers before it.
    fn attach(
        self,
        name: &str,
        memory: DeviceMemory,
        interrupt: Interrupt,
        saved: Option<&VirtioSnapshot>,
    ) -> Result<MmioTransport, VirtioError> {
        match (self, saved) {
            (Self::Worker(device), None) => MmioTransport::new(name, device, memory, interrupt),
            (Self::Worker(device), Some(saved)) => {
                MmioTransport::restore(name, device, memory, interrupt, saved)
            }
            (Self::VhostUser(back_end), None) => {
                Ok(MmioTransport::vhost_user(name, &back_end, interrupt))
            }
            (Self::VhostUser(back_end), Some(saved)) => {
                MmioTransport::restore_vhost_user(name, &back_end, interrupt, saved)
            }
        }
    }

    fn back_end(&self) -> Option<VhostUser<DeviceMemory>> {
        match self {
            Self::Worker(_) => None,
            Self::VhostUser(back_end) => Some(back_end.clone()),
        }
    }
}

/// A device whose host's side is open; there is no guest yet.
pub(super) struct Opened {
    name: String,
    resources: VirtioMmioResources,
    interrupt: Interrupt,
    server: Server,
    /// Host's side of the device, which the destination of a migration must have too.
    facts: DeviceFacts,
    image: Option<DiskImage>,
    balloon: Option<BalloonControl>,
}

impl Opened {
    pub(super) fn resources(&self) -> VirtioMmioResources {
        self.resources
    }

    /// Returns the name of the device and the host's side of it.
    pub(super) fn facts(&self) -> NamedFacts {
        named_facts(&self.name, &self.facts)
    }

    /// Puts it before a guest; it is paused.
    fn attach(
        self,
        vm: &VmFd,
        memory: &DeviceMemory,
        saved: Option<&[Section]>,
        on_loss: &OnLoss,
    ) -> Result<Attached, MachineError> {
        let name = self.name.as_str();
        let back_end = self.server.back_end();
        if let Some(back_end) = &back_end {
            // The back end was there when it was connected, which may be a migration ago.
            back_end
                .check_connected()
                .map_err(back_end_error(&self.name))?;
        }
        if let Some(image) = &self.image {
            image.lock().map_err(DevicesError::from)?;
        }
        let state: Option<VirtioSnapshot> = saved
            .map(|saved| sections::decode(saved, name))
            .transpose()?;
        let device = self
            .server
            .attach(name, memory.clone(), self.interrupt, state.as_ref())
            .map_err(DevicesError::from)?;
        let (named, tell) = (self.name.clone(), Arc::clone(on_loss));
        device.on_failure(move |why| tell(&named, why));
        device.pause();
        notify(vm, self.resources, &device)?;
        Ok(Attached {
            device: Arc::new(Mutex::new(device)),
            name: self.name,
            resources: self.resources,
            facts: self.facts,
            image: self.image,
            balloon: self.balloon,
            back_end,
        })
    }
}

pub(super) fn back_end_error(name: &str) -> impl Fn(VhostUserError) -> DevicesError {
    move |source| DevicesError::BackEnd {
        name: name.into(),
        source,
    }
}

fn named_facts(name: &str, facts: &DeviceFacts) -> NamedFacts {
    NamedFacts {
        name: name.into(),
        facts: facts.clone(),
    }
}

/// A notification of the guest goes to the device's thread, and no vCPU exits to this process for it.
fn notify(
    vm: &VmFd,
    resources: VirtioMmioResources,
    device: &MmioTransport,
) -> Result<(), DevicesError> {
    let register = IoEventAddress::Mmio(u64::from(resources.base) + QUEUE_NOTIFY);
    for (queue, event) in (0_u32..).zip(device.notifiers()) {
        vm.register_ioevent(event, &register, queue)
            .map_err(|source| DevicesError::Host {
                name: device.name().into(),
                what: "KVM_IOEVENTFD",
                source: source.into(),
            })?;
    }
    Ok(())
}

struct Attached {
    name: String,
    resources: VirtioMmioResources,
    device: Arc<Mutex<MmioTransport>>,
    facts: DeviceFacts,
    image: Option<DiskImage>,
    balloon: Option<BalloonControl>,
    back_end: Option<VhostUser<DeviceMemory>>,
}

impl Attached {
    fn device(&self) -> MutexGuard<'_, MmioTransport> {
        lock(&self.device)
    }
}

fn lock(device: &Mutex<MmioTransport>) -> MutexGuard<'_, MmioTransport> {
    // The registers of a device are plain values: each is valid even if a panic interrupted an access.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the counters of one device.
#[derive(Clone)]
pub(super) struct DeviceGauge {
    name: String,
    device: Arc<Mutex<MmioTransport>>,
}

impl DeviceGauge {
    /// Returns the name of the device, and its counters by name.
    pub(super) fn read(&self) -> (String, Vec<(&'static str, u64)>) {
        (self.name.clone(), lock(&self.device).counters())
    }
}

/// Called with the name of a device and the reason when the thread or process that serves the device is lost.
pub type OnLoss = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// What the devices of a machine have done, each by its name.
pub type DeviceCounters = Vec<(String, Vec<(&'static str, u64)>)>;

/// The virtio devices of a guest. Dropped, their threads end.
pub(super) struct Devices {
    list: Vec<Attached>,
}

impl Devices {
    /// Puts devices before a guest: one at its beginning, or one that was saved. They are paused.
    pub(super) fn attach(
        opened: Vec<Opened>,
        vm: &VmFd,
        memory: &DeviceMemory,
        saved: Option<&[Section]>,
        on_loss: &OnLoss,
    ) -> Result<Self, MachineError> {
        let list = opened
            .into_iter()
            .map(|device| device.attach(vm, memory, saved, on_loss))
            .collect::<Result<_, _>>()?;
        Ok(Self { list })
    }

    /// The bus on which vCPUs find them.
    pub(super) fn bus(&self) -> Result<MmioBus, DevicesError> {
        let mut bus = MmioBus::new();
        for attached in &self.list {
            let range = MmioRange {
                base: attached.resources.base.into(),
                len: MMIO_BYTES,
            };
            bus.insert(range, Arc::clone(&attached.device) as _)?;
        }
        Ok(bus)
    }

    /// Stops all of them; the vCPUs stand already.
    pub(super) fn pause(&self) {
        self.each_here(MmioTransport::pause);
        self.each_elsewhere(MmioTransport::pause);
    }

    /// Lets all of them go on, before the vCPUs do.
    pub(super) fn resume(&self) {
        self.each_elsewhere(MmioTransport::resume);
        self.each_here(MmioTransport::resume);
    }

    /// Does something to those that are served here.
    fn each_here(&self, act: fn(&MmioTransport)) {
        let here = self.list.iter().filter(|d| d.back_end.is_none());
        here.for_each(|device| act(&device.device()));
    }

    /// Does something to those that other processes serve, which may take their time, all at once.
    fn each_elsewhere(&self, act: fn(&MmioTransport)) {
        thread::scope(|scope| {
            for device in self.list.iter().filter(|d| d.back_end.is_some()) {
                let named = thread::Builder::new().name(device.name.clone());
                // Without a thread they wait for each other.
                if named.spawn_scoped(scope, || act(&device.device())).is_err() {
                    act(&device.device());
                }
            }
        });
    }

    /// Lets all of them go on for a guest that has just arrived, if those that other processes serve can; otherwise
    /// none of them does.
    ///
    /// # Errors
    /// The first back end that was lost.
    pub(super) fn resume_arrived(&self) -> Result<(), DevicesError> {
        self.each_elsewhere(MmioTransport::resume);
        if let Err(error) = self.each_back_end(VhostUser::check_connected) {
            self.each_elsewhere(MmioTransport::pause);
            return Err(error);
        }
        self.each_here(MmioTransport::resume);
        Ok(())
    }

    /// Makes sure that nobody else writes to the disks. Idempotent.
    pub(super) fn lock_images(&self) -> Result<(), DevicesError> {
        Ok(self.images().try_for_each(DiskImage::lock)?)
    }

    /// Leaves the disks to whoever runs the guest next.
    pub(super) fn unlock_images(&self) -> Result<(), DevicesError> {
        Ok(self.images().try_for_each(DiskImage::unlock)?)
    }

    fn images(&self) -> impl Iterator<Item = &DiskImage> {
        self.list.iter().filter_map(|d| d.image.as_ref())
    }

    /// Returns the names of the devices, which are those of their sections of state.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|device| device.name.as_str())
    }

    /// Returns the host's side of each device.
    pub(super) fn facts(&self) -> Vec<NamedFacts> {
        let devices = self.list.iter();
        devices
            .map(|device| named_facts(&device.name, &device.facts))
            .collect()
    }

    /// Their state; they are paused.
    ///
    /// A back end that was lost may still have been writing to memory, and has requests that nobody will end.
    pub(super) fn save(&self) -> Result<Vec<Section>, MachineError> {
        self.each_back_end(VhostUser::check_connected)?;
        let saved = self.list.iter().map(|attached| {
            let state = attached.device().save().map_err(DevicesError::from)?;
            Ok(sections::encode(&attached.name, &state))
        });
        saved.collect()
    }

    /// Asks all back ends, until one fails.
    fn each_back_end(
        &self,
        ask: impl Fn(&VhostUser<DeviceMemory>) -> Result<(), VhostUserError>,
    ) -> Result<(), DevicesError> {
        self.back_ends()
            .try_for_each(|(name, back_end)| ask(back_end).map_err(back_end_error(name)))
    }

    fn back_ends(&self) -> impl Iterator<Item = (&str, &VhostUser<DeviceMemory>)> {
        let each = self.list.iter();
        each.filter_map(|d| Some((d.name.as_str(), d.back_end.as_ref()?)))
    }

    /// Returns the vhost-user back ends, whose logs are part of the machine's dirty logs.
    pub(super) fn named_back_ends(&self) -> Vec<NamedBackEnd> {
        self.back_ends()
            .map(|(name, back_end)| (name.to_owned(), back_end.clone()))
            .collect()
    }

    /// The balloon, if there is one.
    pub(super) fn balloon(&self) -> Option<&BalloonControl> {
        self.list.iter().find_map(|d| d.balloon.as_ref())
    }

    /// Returns handles to the counters of each device.
    pub(super) fn gauges(&self) -> Vec<DeviceGauge> {
        let gauge = |attached: &Attached| DeviceGauge {
            name: attached.name.clone(),
            device: Arc::clone(&attached.device),
        };
        self.list.iter().map(gauge).collect()
    }
}
