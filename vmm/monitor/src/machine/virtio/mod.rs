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
    BalloonControl, Device, Interrupt, MMIO_BYTES, QUEUE_NOTIFY, VhostUser, VhostUserError,
    VirtioError, VirtioMmio as Transport, VirtioSnapshot, VsockError,
};
use devices::{MmioBus, MmioError, MmioRange};
use ept::{Gpa, Source, Tracker};
use kvm_ioctls::{IoEventAddress, VmFd};

use super::{MachineError, sections};
use crate::boot::VirtioMmio as Place;
use crate::memory::DeviceMemory;
use migration::guest::Section;
use migration::header::{HostSide, SectionKind};

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
    Bus(#[from] MmioError),
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
    ) -> Result<Transport, VirtioError> {
        match (self, saved) {
            (Self::Worker(device), None) => Transport::new(name, device, memory, interrupt),
            (Self::Worker(device), Some(saved)) => {
                Transport::restore(name, device, memory, interrupt, saved)
            }
            (Self::VhostUser(back_end), None) => {
                Ok(Transport::vhost_user(name, &back_end, interrupt))
            }
            (Self::VhostUser(back_end), Some(saved)) => {
                Transport::restore_vhost_user(name, &back_end, interrupt, saved)
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
    place: Place,
    interrupt: Interrupt,
    server: Server,
    /// What the other side of a migration must have, too, in words.
    shape: String,
    image: Option<DiskImage>,
    balloon: Option<BalloonControl>,
}

impl Opened {
    pub(super) fn place(&self) -> Place {
        self.place
    }

    /// The section of its state, and what is on the host's side.
    pub(super) fn host_side(&self) -> HostSide {
        host_side(&self.name, &self.shape)
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
            let (name, tell) = (self.name.clone(), Arc::clone(on_loss));
            back_end.on_loss(move |why| tell(&name, why));
            // It was there when it was connected, which may be a migration ago.
            back_end.is_there().map_err(back_end_error(&self.name))?;
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
        device.pause();
        notify(vm, self.place, &device)?;
        Ok(Attached {
            device: Arc::new(Mutex::new(device)),
            name: self.name,
            place: self.place,
            shape: self.shape,
            image: self.image,
            balloon: self.balloon,
            back_end,
        })
    }
}

fn back_end_error(name: &str) -> impl Fn(VhostUserError) -> DevicesError {
    move |source| DevicesError::BackEnd {
        name: name.into(),
        source,
    }
}

fn host_side(name: &str, shape: &str) -> HostSide {
    HostSide {
        section: name.into(),
        is: shape.into(),
    }
}

/// A notification of the guest goes to the device's thread, and no vCPU exits to this process for it.
fn notify(vm: &VmFd, place: Place, device: &Transport) -> Result<(), DevicesError> {
    let register = IoEventAddress::Mmio(u64::from(place.base) + QUEUE_NOTIFY);
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
    place: Place,
    device: Arc<Mutex<Transport>>,
    shape: String,
    image: Option<DiskImage>,
    balloon: Option<BalloonControl>,
    back_end: Option<VhostUser<DeviceMemory>>,
}

impl Attached {
    fn device(&self) -> MutexGuard<'_, Transport> {
        // Its registers are plain values, each valid by itself.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Told by which device, and why, a process that served it was lost.
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
                base: attached.place.base.into(),
                bytes: MMIO_BYTES,
            };
            bus.insert(range, Arc::clone(&attached.device) as _)?;
        }
        Ok(bus)
    }

    /// Stops all of them; the vCPUs stand already.
    pub(super) fn pause(&self) {
        self.each_here(Transport::pause);
        self.each_elsewhere(Transport::pause);
    }

    /// Lets all of them go on, before the vCPUs do.
    pub(super) fn resume(&self) {
        self.each_elsewhere(Transport::resume);
        self.each_here(Transport::resume);
    }

    /// Does something to those that are served here.
    fn each_here(&self, act: fn(&Transport)) {
        let here = self.list.iter().filter(|d| d.back_end.is_none());
        here.for_each(|device| act(&device.device()));
    }

    /// Does something to those that other processes serve, which may take their time, all at once.
    fn each_elsewhere(&self, act: fn(&Transport)) {
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
        self.each_elsewhere(Transport::resume);
        if let Err(error) = self.each_back_end(VhostUser::is_there) {
            self.each_elsewhere(Transport::pause);
            return Err(error);
        }
        self.each_here(Transport::resume);
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

    /// Their sections of state.
    pub(super) fn section_kinds(&self) -> impl Iterator<Item = SectionKind> {
        self.list.iter().map(|d| sections::kind(d.name.clone()))
    }

    /// What is on the host's side of each.
    pub(super) fn host_sides(&self) -> Vec<HostSide> {
        let sides = self.list.iter().map(|d| host_side(&d.name, &d.shape));
        sides.collect()
    }

    /// Their state; they are paused.
    ///
    /// A back end that was lost may still have been writing to memory, and has requests that nobody will end.
    pub(super) fn save(&self) -> Result<Vec<Section>, MachineError> {
        self.each_back_end(VhostUser::is_there)?;
        let saved = self.list.iter().map(|attached| {
            let state = attached.device().save();
            let state = state.ok_or_else(|| MachineError::Section {
                section: attached.name.clone(),
                why: "the device is not paused".into(),
            })?;
            sections::encode(&attached.name, &state)
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

    /// Whether every process that writes to guest memory can log that.
    pub(super) fn can_log(&self) -> Result<(), DevicesError> {
        self.each_back_end(VhostUser::can_log)
    }

    /// Has all of them log what they write.
    pub(super) fn start_log(&self) -> Result<(), DevicesError> {
        self.each_back_end(VhostUser::start_log)
    }

    /// Brings what they logged into `tracker`.
    pub(super) fn sync_log(&self, tracker: &Tracker) {
        for (_, back_end) in self.back_ends() {
            back_end.take_log(|first, words| {
                tracker.mark_words(Gpa(first), words, Source::VhostUser);
            });
        }
    }

    /// Ends their logs, of all of them whatever comes of one.
    pub(super) fn stop_log(&self) -> Result<(), DevicesError> {
        let stopped: Vec<_> = self
            .back_ends()
            .map(|(name, back_end)| back_end.stop_log().map_err(back_end_error(name)))
            .collect();
        stopped.into_iter().collect()
    }

    /// The balloon, if there is one.
    pub(super) fn balloon(&self) -> Option<&BalloonControl> {
        self.list.iter().find_map(|d| d.balloon.as_ref())
    }

    pub(super) fn counters(&self) -> DeviceCounters {
        let each = self.list.iter();
        each.map(|d| (d.name.clone(), d.device().counters()))
            .collect()
    }
}

/// Why a guest whose devices are `theirs` cannot be taken by a monitor that was given `here`; nothing where they fit.
pub(super) fn misfits(theirs: &[HostSide], here: &[HostSide]) -> Vec<String> {
    let same = |one: &HostSide, list: &[HostSide]| -> Option<HostSide> {
        list.iter().find(|d| d.section == one.section).cloned()
    };
    let mut found = Vec::new();
    for device in theirs {
        match same(device, here) {
            None => found.push(format!(
                "the guest has {}, the destination has no such device ({})",
                named(device),
                option(&device.section)
            )),
            Some(own) if own.is != device.is => found.push(format!(
                "{}: the guest's is {}, the destination's is {}",
                device.section, device.is, own.is
            )),
            Some(_) => {}
        }
    }
    let unknown = here.iter().filter(|own| same(own, theirs).is_none());
    found.extend(unknown.map(|own| {
        let (named, option) = (named(own), option(&own.section));
        format!("the destination has {named}, the guest has no such device ({option})")
    }));
    found
}

fn named(device: &HostSide) -> String {
    format!("{} ({})", device.section, device.is)
}

/// The option that gives a device of this name.
fn option(name: &str) -> String {
    let kind = name.trim_start_matches('_');
    format!("--{}", kind.trim_end_matches(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_do_not_fit_are_named() {
        let disk = |sectors| host_side("_disk0", &format!("a disk of {sectors} sectors"));
        let rng = host_side("_rng0", "an entropy device");
        let fits = misfits(&[disk(8), rng.clone()], &[disk(8), rng.clone()]);
        assert_eq!(fits, [""; 0]);
        let found = misfits(&[disk(8), rng.clone()], &[disk(9)]);
        assert_eq!(
            found,
            [
                "_disk0: the guest's is a disk of 8 sectors, the destination's is a disk of 9 sectors",
                "the guest has _rng0 (an entropy device), the destination has no such device (--rng)",
            ]
        );
        let found = misfits(&[], &[rng]);
        assert_eq!(
            found,
            ["the destination has _rng0 (an entropy device), the guest has no such device (--rng)"]
        );
    }
}
