//! Virtio devices of a machine: their host resources are opened, then they are attached to the guest, and paused, saved
//! and restored together.
//!
//! ```text
//! DevicesConfig ─ open ─ OpenedDevice ─ attach ─ Devices
//!                 host resources        registers, interrupts and saved state
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
pub use open::check_host_resources;
pub(super) use open::{OpenContext, open};
pub use tap::TapError;

/// Reasons why a virtio device cannot be opened, attached, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// The image of a disk cannot be used.
    #[error("--disk {0}")]
    Disk(#[from] DiskError),
    /// A vhost-user back end cannot be connected, or lacks a feature.
    #[error("--disk vhost_user=on,socket={0}")]
    VhostUser(#[from] VhostUserError),
    /// A vhost-user back end of an attached device failed.
    #[error("{name}: {source}")]
    BackEnd {
        /// Name of the device.
        name: String,
        /// Error of the back end.
        source: VhostUserError,
    },
    /// A tap cannot be used.
    #[error("--net: {0}")]
    Tap(#[from] TapError),
    /// The Unix socket of the socket device cannot be created.
    #[error("--vsock: {0}")]
    Vsock(#[from] VsockError),
    /// The output file of the console cannot be opened.
    #[error("--console {path}: {source}")]
    Console {
        /// Path of the file.
        path: String,
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// There are more devices than interrupt lines.
    #[error("{name}: at most {most} virtio devices are possible")]
    TooMany {
        /// Name of the first device without an interrupt line.
        name: String,
        /// Maximum number of devices.
        most: u32,
    },
    /// The host refused a resource of a device.
    #[error("{name}: {what}: {source}")]
    Host {
        /// Name of the device.
        name: String,
        /// Name of the resource or of the ioctl.
        what: &'static str,
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// A device cannot be created, saved or restored.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// The register windows of two devices overlap.
    #[error(transparent)]
    Bus(#[from] BusError<MmioSpace>),
}

/// Server of the queues of a device.
pub(super) enum Server {
    /// Device model in this process, with a thread of its own.
    Worker(Box<dyn Device<DeviceMemory>>),
    /// vhost-user back end in another process.
    VhostUser(VhostUser<DeviceMemory>),
}

impl Server {
    /// Creates the register window of the device, in its initial state or in the state `saved`.
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

    /// Returns the vhost-user back end, if there is one.
    fn back_end(&self) -> Option<VhostUser<DeviceMemory>> {
        match self {
            Self::Worker(_) => None,
            Self::VhostUser(back_end) => Some(back_end.clone()),
        }
    }
}

/// Device whose host resources are open. It is not connected to a guest yet.
pub(super) struct OpenedDevice {
    name: String,
    resources: VirtioMmioResources,
    interrupt: Interrupt,
    server: Server,
    /// Host's side of the device, which the destination of a migration must have too.
    facts: DeviceFacts,
    /// Image of a disk that this process serves.
    image: Option<DiskImage>,
    balloon: Option<BalloonControl>,
}

impl OpenedDevice {
    pub(super) fn resources(&self) -> VirtioMmioResources {
        self.resources
    }

    /// Returns the name of the device and the host's side of it.
    pub(super) fn facts(&self) -> NamedFacts {
        named_facts(&self.name, &self.facts)
    }

    /// Connects the device to the guest: locks its image, creates its registers and registers its notifications with
    /// KVM. If `saved` is given, the state of the device is restored from it. The device is paused.
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
            // The back end was connected when the device was opened, which may be a whole migration ago.
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

/// Returns a function that adds the name of the device to an error of its back end, for `map_err`.
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

/// Registers the notification register of each queue as an ioeventfd: KVM signals the thread or process of the device
/// directly, without an exit to this process.
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

/// Device of a running or paused guest.
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

/// Counters of devices: the name of each device, with the names and values of its counters.
pub type DeviceCounters = Vec<(String, Vec<(&'static str, u64)>)>;

/// Virtio devices of a guest. Dropping them ends their threads.
pub(super) struct Devices {
    list: Vec<Attached>,
}

impl Devices {
    /// Connects the devices to the guest, in their initial state or in the state `saved`. All of them are paused.
    pub(super) fn attach(
        opened: Vec<OpenedDevice>,
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

    /// Returns a bus with the registers of all devices, for the exits of vCPUs.
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

    /// Pauses all devices. The vCPUs must be stopped already.
    pub(super) fn pause(&self) {
        self.for_each_worker(MmioTransport::pause);
        self.for_each_back_end_device(MmioTransport::pause);
    }

    /// Resumes all devices. Must be called before the vCPUs are resumed.
    pub(super) fn resume(&self) {
        self.for_each_back_end_device(MmioTransport::resume);
        self.for_each_worker(MmioTransport::resume);
    }

    /// Calls `act` for each device that this process serves.
    fn for_each_worker(&self, act: fn(&MmioTransport)) {
        let workers = self.list.iter().filter(|d| d.back_end.is_none());
        workers.for_each(|device| act(&device.device()));
    }

    /// Calls `act` for each device with a vhost-user back end, in parallel, because back ends may take long to answer.
    fn for_each_back_end_device(&self, act: fn(&MmioTransport)) {
        thread::scope(|scope| {
            for device in self.list.iter().filter(|d| d.back_end.is_some()) {
                let named = thread::Builder::new().name(device.name.clone());
                // If no thread can be started, the devices are processed one after the other.
                if named.spawn_scoped(scope, || act(&device.device())).is_err() {
                    act(&device.device());
                }
            }
        });
    }

    /// Resumes all devices of a guest that has just arrived by migration. If a back end is lost, no device is resumed.
    ///
    /// # Errors
    /// Returns the error of the first back end that is lost.
    pub(super) fn resume_arrived(&self) -> Result<(), DevicesError> {
        self.for_each_back_end_device(MmioTransport::resume);
        if let Err(error) = self.try_each_back_end(VhostUser::check_connected) {
            self.for_each_back_end_device(MmioTransport::pause);
            return Err(error);
        }
        self.for_each_worker(MmioTransport::resume);
        Ok(())
    }

    /// Locks the images of all disks, so that no other process writes to them. Has no effect on a locked image.
    pub(super) fn lock_images(&self) -> Result<(), DevicesError> {
        Ok(self.images().try_for_each(DiskImage::lock)?)
    }

    /// Unlocks the images of all disks, for the process that runs the guest next.
    pub(super) fn unlock_images(&self) -> Result<(), DevicesError> {
        Ok(self.images().try_for_each(DiskImage::unlock)?)
    }

    /// Returns the images of the disks that this process serves.
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

    /// Saves the state of all devices, one section each. The devices must be paused.
    ///
    /// # Errors
    /// Returns an error if a back end is lost: it may have written to memory after its last log, and its in-flight
    /// requests will never complete.
    pub(super) fn save(&self) -> Result<Vec<Section>, MachineError> {
        self.try_each_back_end(VhostUser::check_connected)?;
        let saved = self.list.iter().map(|attached| {
            let state = attached.device().save().map_err(DevicesError::from)?;
            Ok(sections::encode(&attached.name, &state))
        });
        saved.collect()
    }

    /// Calls `ask` for each back end until one returns an error.
    fn try_each_back_end(
        &self,
        ask: impl Fn(&VhostUser<DeviceMemory>) -> Result<(), VhostUserError>,
    ) -> Result<(), DevicesError> {
        self.back_ends()
            .try_for_each(|(name, back_end)| ask(back_end).map_err(back_end_error(name)))
    }

    /// Returns the vhost-user back ends with the names of their devices.
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

    /// Returns the control of the balloon, if there is a balloon.
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
