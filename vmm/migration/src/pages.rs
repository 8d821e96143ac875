//! Pages on the wire: runs of pages out of guest memory, and back into it.
//!
//! The source copies each page once, into a buffer that stays in the core's cache. From there the page is searched for
//! zeros, added to the checksum and written to the stream. The copy is needed because the guest may write to the page
//! meanwhile, and the checksum must fit the bytes that are sent.

use std::io::Write;

use ept::{Gpa, GpaRange, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::guest::DestinationGuest;
use crate::page_buffer::PageBuffer;
use crate::wire::{
    FrameHead, FrameWriter, PAGES_DATA_LIMIT, RUN_BYTES, RUNS_LIMIT, Tag, WireError,
};

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Guest memory could not be accessed at an address where the guest's description has memory.
#[derive(Debug, thiserror::Error)]
#[error("guest memory at {address:#x}: {source}")]
pub struct MemoryAccess {
    /// Guest-physical address.
    pub address: u64,
    /// Error of the memory.
    pub source: vm_memory::GuestMemoryError,
}

/// Why pages could not be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendPagesError {
    /// The stream failed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Guest memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryAccess),
}

/// Returns true if `page` holds only zeros.
#[must_use]
pub(crate) fn is_zero(page: &[u8; PAGE]) -> bool {
    // Most pages that are not zero have a byte that is not zero in the first part.
    page.as_chunks::<256>()
        .0
        .iter()
        .all(|part| or_of(part) == 0)
}

fn or_of(bytes: &[u8]) -> u64 {
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .fold(0, |or, word| or | u64::from_ne_bytes(*word))
}

/// Collects runs of pages into frames.
pub(crate) struct PageSender {
    /// Pages that are not zero, as they will follow the table of their frame.
    data: PageBuffer,
    /// Bytes of `data` in use.
    filled: usize,
    runs: RunTable,
    zero_runs: RunTable,
    /// Pages taken so far.
    pub(crate) pages: u64,
    /// Pages among them that held only zeros.
    pub(crate) zero_pages: u64,
}

impl Default for PageSender {
    fn default() -> Self {
        Self {
            data: PageBuffer::new(PAGES_DATA_LIMIT / PAGE),
            filled: 0,
            runs: RunTable::default(),
            zero_runs: RunTable::default(),
            pages: 0,
            zero_pages: 0,
        }
    }
}

impl PageSender {
    /// Takes the pages of `range`, and writes each frame that is full.
    ///
    /// # Errors
    /// Returns [`SendPagesError`] if the stream fails or guest memory cannot be read.
    pub(crate) fn send<M: GuestMemoryBackend, W: Write>(
        &mut self,
        memory: &M,
        range: GpaRange,
        frames: &mut FrameWriter<W>,
    ) -> Result<(), SendPagesError> {
        let mut address = range.start().0;
        for _ in 0..range.pages() {
            let page = &mut self.data[self.filled..self.filled + PAGE];
            memory
                .read_slice(page, GuestAddress(address))
                .map_err(|source| MemoryAccess { address, source })?;
            self.take(address, frames)?;
            address = address.wrapping_add(PAGE_SIZE);
        }
        Ok(())
    }

    /// Writes the frames that are not full.
    ///
    /// # Errors
    /// Returns [`WireError`] if the stream fails.
    pub(crate) fn flush<W: Write>(&mut self, frames: &mut FrameWriter<W>) -> Result<(), WireError> {
        self.flush_data(frames)?;
        self.flush_zeros(frames)
    }

    /// Takes the page of `address`, which has been copied to `data` behind the bytes in use.
    fn take<W: Write>(
        &mut self,
        address: u64,
        frames: &mut FrameWriter<W>,
    ) -> Result<(), WireError> {
        self.pages += 1;
        let page = self.data[self.filled..].first_chunk::<PAGE>();
        if page.is_some_and(is_zero) {
            self.zero_pages += 1;
            self.zero_runs.push(address);
            if self.zero_runs.is_full() {
                self.flush_zeros(frames)?;
            }
            return Ok(());
        }
        self.runs.push(address);
        self.filled += PAGE;
        if self.filled == self.data.len() || self.runs.is_full() {
            self.flush_data(frames)?;
        }
        Ok(())
    }

    fn flush_data<W: Write>(&mut self, frames: &mut FrameWriter<W>) -> Result<(), WireError> {
        if self.filled > 0 {
            let table = self.runs.take();
            frames.frame(Tag::Pages, [&table, &self.data[..self.filled]])?;
            self.filled = 0;
        }
        Ok(())
    }

    fn flush_zeros<W: Write>(&mut self, frames: &mut FrameWriter<W>) -> Result<(), WireError> {
        if !self.zero_runs.runs.is_empty() {
            frames.frame(Tag::ZeroPages, [&self.zero_runs.take(), &[]])?;
        }
        Ok(())
    }
}

/// Table at the head of a frame of pages: the number of runs, then the address and pages of each run.
#[derive(Default)]
struct RunTable {
    runs: Vec<(u64, u32)>,
}

impl RunTable {
    fn push(&mut self, address: u64) {
        if let Some((start, pages)) = self.runs.last_mut()
            && start.wrapping_add(u64::from(*pages) * PAGE_SIZE) == address
            && *pages < u32::MAX
        {
            *pages += 1;
            return;
        }
        self.runs.push((address, 1));
    }

    fn is_full(&self) -> bool {
        self.runs.len() == RUNS_LIMIT
    }

    fn take(&mut self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(4 + self.runs.len() * RUN_BYTES);
        // At most RUNS_LIMIT.
        bytes.extend(
            u32::try_from(self.runs.len())
                .unwrap_or(u32::MAX)
                .to_le_bytes(),
        );
        for (address, pages) in self.runs.drain(..) {
            bytes.extend(address.to_le_bytes());
            bytes.extend(pages.to_le_bytes());
        }
        bytes
    }
}

/// Splits the payload of a frame of pages into its runs, which are checked against `memory`, and the contents.
fn parse<'a>(
    head: &FrameHead,
    payload: &'a [u8],
    memory: &[GpaRange],
) -> Result<(Vec<GpaRange>, &'a [u8]), WireError> {
    let (count, rest) = payload
        .split_first_chunk::<4>()
        .ok_or_else(|| head.malformed("it has no table of runs"))?;
    let count = u32::from_le_bytes(*count) as usize;
    if count > RUNS_LIMIT {
        return Err(head.malformed(format!("{count} runs, at most {RUNS_LIMIT} are allowed")));
    }
    let (table, data) = rest
        .split_at_checked(count * RUN_BYTES)
        .ok_or_else(|| head.malformed(format!("its table of {count} runs is cut short")))?;
    let mut runs = Vec::with_capacity(count);
    for run in table.as_chunks::<RUN_BYTES>().0 {
        let [a0, a1, a2, a3, a4, a5, a6, a7, p0, p1, p2, p3] = *run;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let pages = u64::from(u32::from_le_bytes([p0, p1, p2, p3]));
        let range = GpaRange::with_len(Gpa(address), pages * PAGE_SIZE).map_err(|error| {
            head.malformed(format!("run at {address:#x}, {pages} pages: {error}"))
        })?;
        if !memory.iter().any(|piece| piece.covers(&range)) {
            return Err(head.malformed(format!(
                "run at {address:#x}, {pages} pages: not in guest memory"
            )));
        }
        if runs
            .last()
            .is_some_and(|last: &GpaRange| last.end_page() > range.first_page())
        {
            return Err(head.malformed(format!(
                "run at {address:#x}: it is not above the run before it"
            )));
        }
        runs.push(range);
    }
    Ok((runs, data))
}

/// Writes the pages of a [`Tag::Pages`] frame to guest memory. Returns their number.
///
/// # Errors
/// Returns [`WireError::Malformed`] if the frame does not fit the guest or guest memory cannot be written.
pub(crate) fn receive_pages<G: DestinationGuest>(
    guest: &G,
    memory: &[GpaRange],
    head: &FrameHead,
    payload: &[u8],
) -> Result<u64, WireError> {
    let (runs, mut data) = parse(head, payload, memory)?;
    let pages: u64 = runs.iter().map(GpaRange::pages).sum();
    if pages.checked_mul(PAGE_SIZE) != Some(data.len() as u64) {
        return Err(head.malformed(format!("{} bytes of data for {pages} pages", data.len())));
    }
    for run in runs {
        // All runs together have as many bytes as `data`, so this never exceeds it.
        let length = usize::try_from(run.pages() * PAGE_SIZE)
            .unwrap_or(usize::MAX)
            .min(data.len());
        let (bytes, rest) = data.split_at(length);
        write(guest, head, run.start(), bytes)?;
        data = rest;
    }
    Ok(pages)
}

/// Zeroes those pages of a [`Tag::ZeroPages`] frame that were written before. Returns the number of pages in the frame.
///
/// # Errors
/// Returns [`WireError::Malformed`] if the frame does not fit the guest or guest memory cannot be written.
pub(crate) fn receive_zeros<G: DestinationGuest>(
    guest: &G,
    memory: &[GpaRange],
    head: &FrameHead,
    payload: &[u8],
) -> Result<u64, WireError> {
    let (runs, data) = parse(head, payload, memory)?;
    if !data.is_empty() {
        return Err(head.malformed(format!("{} bytes behind its table", data.len())));
    }
    let Some(tracker) = guest.tracker() else {
        return Err(head.malformed("there is no guest memory yet"));
    };
    let mut pages = 0;
    for run in runs {
        pages += run.pages();
        for page in (0..run.pages()).map(|page| Gpa(run.start().0 + page * PAGE_SIZE)) {
            // Guest memory was all zero at the beginning. Writing zeros to a page that has never been written would
            // only populate it.
            if tracker.dirty_at(page) {
                write(guest, head, page, &[0; PAGE])?;
            }
        }
    }
    Ok(pages)
}

fn write<G: DestinationGuest>(
    guest: &G,
    head: &FrameHead,
    start: Gpa,
    bytes: &[u8],
) -> Result<(), WireError> {
    guest
        .write_pages(start, bytes)
        .map_err(|error| head.malformed(format!("run at {:#x}: {error}", start.0)))
}
