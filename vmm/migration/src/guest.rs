//! What the engine needs of a monitor. Whoever implements these two traits can migrate their guests with
//! it, whatever devices they have.

use std::error::Error;
use std::sync::Arc;

use ept::{Gpa, GpaRange, Tracker};
use vm_memory::GuestMemoryBackend;

use super::header::{Description, SectionKind};

/// Why the monitor could not do its part, in its own words.
pub type GuestError = Box<dyn Error + Send + Sync>;

/// One section of device or vCPU state. The engine carries it and never looks inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Name and version of the contents.
    pub kind: SectionKind,
    /// The contents, at most 1 MiB less the name.
    pub data: Vec<u8>,
}

/// A guest that can be sent.
pub trait SourceGuest {
    /// Its memory.
    type Memory: GuestMemoryBackend;

    /// The guest as the destination must know it before it takes it.
    ///
    /// # Errors
    /// The monitor's.
    fn describe(&self) -> Result<Description, GuestError>;

    /// Its memory.
    fn memory(&self) -> &Self::Memory;

    /// The tracker in which all writers to the memory meet.
    fn tracker(&self) -> &Arc<Tracker>;

    /// The parts of memory that hold anything; the rest reads as zero and is not sent. A page that
    /// becomes populated during the call may be missing if its write is in the tracker by the next
    /// [`Self::sync_log`].
    ///
    /// # Errors
    /// The monitor's.
    fn populated(&self) -> Result<Vec<GpaRange>, GuestError>;

    /// From now on the vCPUs' writes are logged.
    ///
    /// # Errors
    /// The monitor's.
    fn start_log(&mut self) -> Result<(), GuestError>;

    /// Brings the log into the tracker.
    ///
    /// # Errors
    /// The monitor's.
    fn sync_log(&mut self) -> Result<(), GuestError>;

    /// `range` is about to be read and sent as far as `dirty` has its pages (bit `n`: its page `n`): a
    /// write from now on must be logged again.
    ///
    /// # Errors
    /// The monitor's.
    fn clear_log(&mut self, range: GpaRange, dirty: &[u64]) -> Result<(), GuestError>;

    /// Ends logging and throttling. Also after a failed start. Idempotent.
    ///
    /// # Errors
    /// The monitor's.
    fn stop_log(&mut self) -> Result<(), GuestError>;

    /// From now on the vCPUs run for `percent` less of the time, 1 to 99: they dirty memory faster than it
    /// can be sent. Ends with [`Self::stop_log`] and with [`Self::pause`].
    ///
    /// # Errors
    /// The monitor's.
    fn throttle(&mut self, percent: u32) -> Result<(), GuestError>;

    /// Stops every vCPU and device: nothing writes to memory any more.
    ///
    /// # Errors
    /// The monitor's, or the guest came to its end. The guest runs, as far as it can.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Undoes a [`Self::pause`].
    ///
    /// # Errors
    /// The monitor's.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// The state of a paused guest, memory apart: the sections that [`Self::describe`] announced.
    ///
    /// # Errors
    /// The monitor's.
    fn save(&self) -> Result<Vec<Section>, GuestError>;
}

/// A place for a guest that arrives.
pub trait DestinationGuest {
    /// Its memory.
    type Memory: GuestMemoryBackend;

    /// Takes the guest, or refuses it: everything that could fail later is looked at now. Memory is
    /// there afterwards, all zero.
    ///
    /// # Errors
    /// Why not, in words for the source's user.
    fn prepare(&mut self, description: &Description) -> Result<(), GuestError>;

    /// Its memory; none before [`Self::prepare`] succeeded.
    fn memory(&self) -> Option<&Self::Memory>;

    /// The tracker of this memory; none before [`Self::prepare`] succeeded.
    fn tracker(&self) -> Option<&Arc<Tracker>>;

    /// Writes whole pages, `bytes` from `start` on, and marks them in the tracker.
    ///
    /// # Errors
    /// The monitor's.
    fn write_pages(&self, start: Gpa, bytes: &[u8]) -> Result<(), GuestError>;

    /// The parts of memory that hold anything.
    ///
    /// # Errors
    /// The monitor's.
    fn populated(&self) -> Result<Vec<GpaRange>, GuestError>;

    /// Restores devices and vCPUs, stopped. Values are checked as if a guest had written them.
    ///
    /// # Errors
    /// The monitor's, with the section.
    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError>;

    /// The guest is this one's from now on: called once, after COMMIT, and before [`Self::resume`] if it is to
    /// run.
    fn taken_over(&mut self) {}

    /// Runs the guest. It is this one's now.
    ///
    /// # Errors
    /// The monitor's.
    fn resume(&mut self) -> Result<(), GuestError>;
}
