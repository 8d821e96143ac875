//! Pages on the wire: runs of them out of guest memory, and back in.
//!
//! A page is copied once, into a buffer that stays in the core's cache, and from there looked at for
//! zeros, summed up and handed to the kernel. The copy is needed: the guest may write to the page
//! meanwhile, and what was summed up must be what is sent.

use std::io::Write;

use ept::{Gpa, GpaRange, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::guest::DestinationGuest;
use super::page_buffer::PageBuffer;
use super::wire::{
    FrameHead, FrameWriter, PAGES_DATA_LIMIT, RUN_BYTES, RUNS_LIMIT, Tag, WireError,
};

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Guest memory that is not where the engine was told it is.
#[derive(Debug, thiserror::Error)]
#[error("guest memory at {address:#x}: {source}")]
pub struct MemoryAccess {
    /// The guest-physical address.
    pub address: u64,
    /// What is wrong with it.
    pub source: vm_memory::GuestMemoryError,
}

/// Why pages could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendPagesError {
    /// The connection.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The memory.
    #[error(transparent)]
    Memory(#[from] MemoryAccess),
}

/// True if `page` holds nothing but zeros.
#[must_use]
pub fn is_zero(page: &[u8; PAGE]) -> bool {
    // Most pages that are not zero show it in the first part.
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
pub struct PageSender {
    /// Pages with contents, as they will follow the table.
    data: PageBuffer,
    filled: usize,
    runs: RunTable,
    zero_runs: RunTable,
    /// Pages taken so far, and how many of them were zero.
    pub pages: u64,
    /// See `pages`.
    pub zero_pages: u64,
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
    /// Takes the pages of `range`; frames leave as they fill up.
    ///
    /// # Errors
    /// The connection's, and memory that is not there.
    pub fn send<M: GuestMemoryBackend, W: Write>(
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

    /// Sends what is still here.
    ///
    /// # Errors
    /// The connection's.
    pub fn flush<W: Write>(&mut self, frames: &mut FrameWriter<W>) -> Result<(), WireError> {
        self.flush_data(frames)?;
        self.flush_zeros(frames)
    }

    /// The page at the end of `data` is that of `address`.
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

/// The table at the head of a frame of pages: how many runs, then each run's address and pages.
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

/// Splits a payload into its table and what follows.
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

/// Puts the pages of a [`Tag::Pages`] frame where they belong. Returns how many.
///
/// # Errors
/// A frame that makes no sense for this guest, and memory that cannot be written.
pub fn receive_pages<G: DestinationGuest>(
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
        // As many as there are bytes in `data`, see above.
        let length = usize::try_from(run.pages() * PAGE_SIZE)
            .unwrap_or(usize::MAX)
            .min(data.len());
        let (bytes, rest) = data.split_at(length);
        write(guest, head, run.start(), bytes)?;
        data = rest;
    }
    Ok(pages)
}

/// Zeroes the pages of a [`Tag::ZeroPages`] frame, where something was written before. Returns how many
/// pages the frame names.
///
/// # Errors
/// A frame that makes no sense for this guest, and memory that cannot be written.
pub fn receive_zeros<G: DestinationGuest>(
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
            // The memory was new and all zero: a page that was never written still is, and touching it
            // would populate it.
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
