//! What the engine asks of a monitor: one trait for a guest that is sent, one for a guest that arrives.
//!
//! The engine calls the methods of one guest from one thread, the one that called [`send`](crate::send) or
//! [`receive`](crate::receive), and never two at once. Each method says whether vCPUs run while it is called. Where
//! they do, the method must not take a lock that a vCPU thread holds while it runs the guest: both would wait for
//! ever.
//!
//! A method that fails returns its own error, whose text becomes part of the engine's error and, at the
//! destination, reaches the source's user. A method that panics counts as failed.

use std::error::Error;
use std::sync::Arc;

use ept::{Gpa, GpaRange, PAGE_SIZE, Source, Tracker};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::description::Description;
use crate::section::Section;

/// Error of a monitor's method. Its text is shown to users.
pub type GuestError = Box<dyn Error + Send + Sync>;

/// A guest that can be sent.
///
/// The engine calls [`describe`](Self::describe), [`start_log`](Self::start_log) and
/// [`populated`](Self::populated) once each, then for each round [`sync_log`](Self::sync_log) and several times
/// [`clear_log`](Self::clear_log), then [`pause`](Self::pause), [`sync_log`](Self::sync_log) and
/// [`save`](Self::save). If the migration fails after that, it calls [`stop_log`](Self::stop_log) and, if the guest was
/// paused, [`resume`](Self::resume).
///
/// The four methods for the dirty log need not be implemented if every write to guest memory marks the
/// tracker by itself, as writes through [`TrackerBitmap`](ept::TrackerBitmap) do. Writes of KVM vCPUs do not.
pub trait SourceGuest {
    /// Type of guest memory.
    type Memory: GuestMemoryBackend;

    /// Describes the guest, so that the destination can take or refuse it.
    ///
    /// vCPUs run. Called once, before anything else.
    ///
    /// # Errors
    /// Returns why the guest cannot be described. The migration then fails before anything is sent.
    fn describe(&self) -> Result<Description, GuestError>;

    /// Returns guest memory. The engine reads pages through it while vCPUs run.
    fn memory(&self) -> &Self::Memory;

    /// Returns the tracker that is told of all writes to guest memory, those of devices included.
    fn tracker(&self) -> &Arc<Tracker>;

    /// Returns the ranges of guest memory that are populated; the rest reads as zero and is not sent.
    ///
    /// vCPUs run at the first call, after [`Self::start_log`]; a page that becomes populated during the call may be
    /// missing if the dirty log has it. If digests are compared there is a second call, while the guest is paused.
    /// The ranges are page-aligned, ascending and disjoint.
    ///
    /// A populated page that is left out is lost: the destination has zeros there.
    ///
    /// The default returns all memory, which is right but slow for a large guest that has used little of it: reading
    /// an unpopulated page populates it.
    ///
    /// # Errors
    /// Returns why the ranges cannot be found.
    fn populated(&self) -> Result<Vec<GpaRange>, GuestError> {
        all_memory(self.memory())
    }

    /// Starts to log the vCPUs' writes.
    ///
    /// vCPUs run. Called once. The default does nothing, which is right if vCPUs mark the tracker themselves.
    ///
    /// # Errors
    /// Returns why logging cannot be started. [`Self::stop_log`] follows.
    fn start_log(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Moves the logged writes into the tracker: with `KVM_GET_DIRTY_LOG`, the bitmap of each slot into
    /// [`Tracker::mark_words`](ept::Tracker::mark_words).
    ///
    /// vCPUs run, except at the last call. Called before each round. The default does nothing, which is right if
    /// vCPUs mark the tracker themselves.
    ///
    /// # Errors
    /// Returns why the log cannot be read.
    fn sync_log(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Write-protects pages again, because they are about to be copied: later writes must be logged again.
    ///
    /// vCPUs run. Called for each 32 MiB of each range of memory in each round, unless none of its pages is
    /// dirty. `range` begins at a multiple of 32 MiB from the beginning of its range of memory, and is shorter than
    /// that only at the end of it. Bit `n` of `dirty`, counted over all words from the lowest bit of the first, stands
    /// for page `n` of `range`.
    ///
    /// The default does nothing, which is right if [`Self::sync_log`] clears the log by itself, as
    /// `KVM_GET_DIRTY_LOG` without `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` does.
    ///
    /// # Errors
    /// Returns why the log cannot be cleared.
    fn clear_log(&mut self, range: GpaRange, dirty: &[u64]) -> Result<(), GuestError> {
        let _ = (range, dirty);
        Ok(())
    }

    /// Ends logging and throttling, also if they were started only in part or not at all.
    ///
    /// The guest runs or is paused. Called once if the migration fails before the hand-over. The default does
    /// nothing, which is right if there is neither a log nor a throttle.
    ///
    /// # Errors
    /// Returns why logging cannot be ended.
    fn stop_log(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Holds the vCPUs for `percent` of the time (1 to 99), because they dirty memory faster than it can be sent.
    /// [`Self::stop_log`] and [`Self::pause`] end it.
    ///
    /// vCPUs run. Called between rounds, each time with a higher value. The default does nothing, which is right if
    /// the monitor cannot throttle: the rounds then converge later or not at all. Set
    /// [`Limits::throttle_max`](crate::Limits::throttle_max) to 0 then, or the report shows a throttle that does not exist.
    ///
    /// # Errors
    /// Returns why the vCPUs cannot be throttled.
    fn throttle(&mut self, percent: u32) -> Result<(), GuestError> {
        let _ = percent;
        Ok(())
    }

    /// Stops every vCPU and every device: nothing may write to guest memory after it.
    ///
    /// Called once, while vCPUs run. It has nothing to stop if the guest was paused when the migration began.
    ///
    /// # Errors
    /// Returns why the guest cannot be paused, or that it has ended. The guest must then run as before.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Lets the guest go on as it was before [`Self::pause`]: one that was paused when the migration began stays
    /// paused.
    ///
    /// The guest is paused; it may run already if `pause` panicked. Called once if the migration fails after
    /// `pause`.
    ///
    /// # Errors
    /// Returns why the guest cannot be resumed. It then stays paused at the source.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Returns the state of vCPUs and devices: each required section that [`Self::describe`] announced, once.
    ///
    /// The guest is paused. Called once.
    ///
    /// # Errors
    /// Returns why the state cannot be saved.
    fn save(&self) -> Result<Vec<Section>, GuestError>;
}

/// An empty place that a guest arrives in.
///
/// The engine calls [`prepare`](Self::prepare) once, then [`write_pages`](Self::write_pages) very often, then
/// [`restore`](Self::restore), and after COMMIT [`taken_over`](Self::taken_over) and [`resume`](Self::resume). No vCPU
/// runs before `resume`. If `receive` fails, drop the place: whatever has arrived must never run, because the source
/// has the guest.
pub trait DestinationGuest {
    /// Type of guest memory.
    type Memory: GuestMemoryBackend;

    /// Takes the guest or refuses it, and allocates its memory, all zero.
    ///
    /// Called once. Whatever could fail later must be checked here, while the guest still runs undisturbed at the
    /// source: compare the facts of the description with this host, and its sections with [`misfits`](crate::misfits).
    /// May take as long as the source waits, [`Deadlines::agreeing`](crate::Deadlines::agreeing): the engine tells it
    /// meanwhile that this side is alive.
    ///
    /// # Errors
    /// Returns the reason to refuse the guest, for the source's user to read.
    fn prepare(&mut self, description: &Description) -> Result<(), GuestError>;

    /// Returns guest memory, or `None` before [`Self::prepare`] has succeeded.
    fn memory(&self) -> Option<&Self::Memory>;

    /// Returns the tracker of guest memory, or `None` before [`Self::prepare`] has succeeded.
    ///
    /// The engine reads from it which pages have been written, so that a page of zeros that was never written is not
    /// populated.
    fn tracker(&self) -> Option<&Arc<Tracker>>;

    /// Writes `bytes`, some whole pages, to guest memory from the page `start` on, and marks them in the tracker.
    ///
    /// Called for each run of pages that arrives, which lies inside one range of guest memory. The default
    /// writes through [`Self::memory`] and marks the pages as [`Source::Monitor`].
    ///
    /// # Errors
    /// Returns why the pages cannot be written.
    fn write_pages(&self, start: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        let (Some(memory), Some(tracker)) = (self.memory(), self.tracker()) else {
            return Err("there is no guest memory yet".into());
        };
        memory.write_slice(bytes, GuestAddress(start.0))?;
        let length = u64::try_from(bytes.len())?;
        tracker.mark(start, length, Source::Monitor);
        Ok(())
    }

    /// Returns the ranges of guest memory that are populated, page-aligned, ascending and disjoint.
    ///
    /// Called once, before [`Self::restore`], if the source compares digests. The default returns all memory.
    ///
    /// # Errors
    /// Returns why the ranges cannot be found.
    fn populated(&self) -> Result<Vec<GpaRange>, GuestError> {
        self.memory().map_or_else(|| Ok(Vec::new()), all_memory)
    }

    /// Restores vCPUs and devices from `sections`, in the order in which the source sent them, without running them.
    ///
    /// Each required section that the source announced is there, once. Look sections up by name, with [`Section::find`].
    ///
    /// Called once, after all pages have arrived, while the guest is paused at the source: the time counts as downtime,
    /// and the source waits for [`Deadlines::ready`](crate::Deadlines::ready). The values come from the other side and
    /// need the same checks as values that a guest writes.
    ///
    /// # Errors
    /// Returns which section cannot be restored and why. The guest then goes on at the source.
    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError>;

    /// Learns that this side has the guest from now on.
    ///
    /// Called once, after COMMIT and before [`Self::resume`]. The default does nothing, which is right if the
    /// monitor looks only at the result of `receive`.
    fn taken_over(&mut self) {}

    /// Runs the guest. Called once, unless the guest stays paused.
    ///
    /// # Errors
    /// Returns why the guest cannot run. It must not run later either: the source is told to resume it.
    fn resume(&mut self) -> Result<(), GuestError>;
}

/// Returns the ranges of `memory`.
fn all_memory<M: GuestMemoryBackend>(memory: &M) -> Result<Vec<GpaRange>, GuestError> {
    memory
        .iter()
        .map(|region| {
            let start = Gpa(region.start_addr().raw_value());
            let range = GpaRange::with_len(start, region.len());
            range.map_err(|error| {
                format!(
                    "guest memory at {:#x} is not made of whole {PAGE_SIZE}-byte pages: {error}",
                    start.0
                )
                .into()
            })
        })
        .collect()
}
