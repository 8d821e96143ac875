//! Connects an opened device to the guest: its registers, its interrupt and its notifications.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::virtio::{
    BalloonControl, Device, Interrupt, MmioTransport, QUEUE_NOTIFY, VhostUser, VhostUserError,
    VirtioError, VirtioSnapshot,
};
use kvm_ioctls::{IoEventAddress, VmFd};

use super::disk::DiskImage;
use super::{DevicesError, OnLoss};
use crate::boot::VirtioMmioResources;
use crate::machine::facts::{DeviceFacts, NamedFacts};
use crate::machine::{MachineError, sections};
use crate::memory::DeviceMemory;
use migration::Section;

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
pub(in crate::machine) struct OpenedDevice {
    pub(super) name: String,
    pub(super) resources: VirtioMmioResources,
    pub(super) interrupt: Interrupt,
    pub(super) server: Server,
    /// Host's side of the device, which the destination of a migration must have too.
    pub(super) facts: DeviceFacts,
    /// Image of a disk that this process serves.
    pub(super) image: Option<DiskImage>,
    pub(super) balloon: Option<BalloonControl>,
}

impl OpenedDevice {
    pub(in crate::machine) fn resources(&self) -> VirtioMmioResources {
        self.resources
    }

    /// Returns the name of the device and the host's side of it.
    pub(in crate::machine) fn facts(&self) -> NamedFacts {
        named_facts(&self.name, &self.facts)
    }

    /// Connects the device to the guest: locks its image, creates its registers and registers its notifications with
    /// KVM. If `saved` is given, the state of the device is restored from it. The device is paused.
    pub(super) fn attach(
        self,
        vm: &VmFd,
        memory: &DeviceMemory,
        saved: Option<&[Section]>,
        on_loss: &OnLoss,
    ) -> Result<AttachedDevice, MachineError> {
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
        Ok(AttachedDevice {
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
pub(in crate::machine) fn back_end_error(name: &str) -> impl Fn(VhostUserError) -> DevicesError {
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
pub(super) struct AttachedDevice {
    pub(super) name: String,
    pub(super) resources: VirtioMmioResources,
    pub(super) device: Arc<Mutex<MmioTransport>>,
    pub(super) facts: DeviceFacts,
    pub(super) image: Option<DiskImage>,
    pub(super) balloon: Option<BalloonControl>,
    pub(super) back_end: Option<VhostUser<DeviceMemory>>,
}

impl AttachedDevice {
    /// Locks the registers of the device.
    pub(super) fn device(&self) -> MutexGuard<'_, MmioTransport> {
        lock(&self.device)
    }

    /// Returns the name of the device and the host's side of it.
    pub(super) fn facts(&self) -> NamedFacts {
        named_facts(&self.name, &self.facts)
    }

    /// Returns a handle to the counters of the device.
    pub(super) fn gauge(&self) -> DeviceGauge {
        DeviceGauge {
            name: self.name.clone(),
            device: Arc::clone(&self.device),
        }
    }
}

fn lock(device: &Mutex<MmioTransport>) -> MutexGuard<'_, MmioTransport> {
    // The registers of a device are plain values: each is valid even if a panic interrupted an access.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the counters of one device.
#[derive(Clone)]
pub(in crate::machine) struct DeviceGauge {
    name: String,
    device: Arc<Mutex<MmioTransport>>,
}

impl DeviceGauge {
    /// Returns the name of the device, and its counters by name.
    pub(in crate::machine) fn read(&self) -> (String, Vec<(&'static str, u64)>) {
        (self.name.clone(), lock(&self.device).counters())
    }
}
