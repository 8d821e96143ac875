//! Virtio devices of a machine: their host resources are opened, then they are attached to the guest, and paused, saved
//! and restored together.
//!
//! ```text
//! DevicesConfig ─ open ─ OpenedDevice ─ attach ─ Devices
//!                 host resources        registers, interrupts and saved state
//! ```

mod attach;
mod disk;
mod error;
mod open;
mod tap;

use std::sync::Arc;
use std::thread;

use devices::virtio::{BalloonControl, MMIO_BYTES, MmioTransport, VhostUser, VhostUserError};
use devices::{MmioBus, MmioRange};
use kvm_ioctls::VmFd;

use super::dirty_logs::NamedBackEnd;
use super::facts::NamedFacts;
use super::{MachineError, sections};
use crate::memory::DeviceMemory;
use attach::AttachedDevice;
use disk::DiskImage;
use migration::Section;

pub(super) use attach::{DeviceGauge, OpenedDevice, back_end_error};
pub use disk::DiskError;
pub use error::DevicesError;
pub use open::check_host_resources;
pub(super) use open::{OpenContext, open};
pub use tap::TapError;

/// Called with the name of a device and the reason when the thread or process that serves the device is lost.
pub type OnLoss = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Counters of devices: the name of each device, with the names and values of its counters.
pub type DeviceCounters = Vec<(String, Vec<(&'static str, u64)>)>;

/// Virtio devices of a guest. Dropping them ends their threads.
pub(super) struct Devices {
    list: Vec<AttachedDevice>,
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
        self.list.iter().map(AttachedDevice::facts).collect()
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
        self.list.iter().map(AttachedDevice::gauge).collect()
    }
}
