//! Dirty log of a back end's writes to guest memory: a bitmap in a memory file that both processes map.
//!
//! Bit `n` is the page at guest-physical address `n * 4096`. Bytes and bits are in ascending order
//! (docs/interop/vhost-user.rst, "Migration"). The back end sets a bit atomically after it has written to the page.
//! This process reads and clears a word by one atomic exchange, so that no bit is lost.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::VhostUserDirtyLogRegion;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

const PAGE_BYTES: u64 = 4096;
const WORD_BYTES: usize = size_of::<u64>();
/// Number of pages that one word covers.
const WORD_PAGES: u64 = 64;

/// Dirty log of one back end.
pub(super) struct WriteLog {
    file: Arc<File>,
    map: MmapRegion,
}

impl WriteLog {
    /// Creates an empty log for guest-physical addresses below `end`.
    ///
    /// # Errors
    /// Returns the kernel's error if the memory file cannot be created, sealed or mapped.
    pub(super) fn new(end: u64) -> io::Result<Self> {
        let bytes = end
            .div_ceil(PAGE_BYTES)
            .div_ceil(8)
            .next_multiple_of(PAGE_BYTES);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("vhost-user-log", flags)?);
        file.set_len(bytes)?;
        // If the back end could shrink the file, the next access to the mapping would kill this process with SIGBUS.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = Arc::new(file);
        let size = usize::try_from(bytes).map_err(io::Error::other)?;
        let map = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), size)
            .map_err(io::Error::other)?;
        Ok(Self { file, map })
    }

    /// Returns the description of the file that the back end maps.
    pub(super) fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: self.map.size() as u64,
            mmap_offset: 0,
            mmap_handle: self.descriptor(),
        }
    }

    fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Sets the bits of `bytes` bytes at `start`, as the back end does. Ignores pages beyond the end of the log.
    pub(super) fn mark(&self, start: u64, bytes: u64) {
        let Some(last) = bytes
            .checked_sub(1)
            .and_then(|more| start.checked_add(more))
        else {
            return;
        };
        for page in start / PAGE_BYTES..=last / PAGE_BYTES {
            if let Some(word) = usize::try_from(page / WORD_PAGES)
                .ok()
                .and_then(|w| self.word(w))
            {
                word.fetch_or(1_u64.to_le() << (page % WORD_PAGES), Ordering::SeqCst);
            }
        }
    }

    /// Takes and clears all bits. For each run of non-zero words, calls `mark` with the address of the first page and
    /// the words.
    pub(super) fn take(&self, mut mark: impl FnMut(u64, &[u64])) {
        let mut run = Vec::new();
        for index in 0..=self.map.size() / WORD_BYTES {
            // There is no word behind the last one, which ends the last run.
            match self.word(index).map_or(0, take) {
                0 if run.is_empty() => {}
                0 => {
                    let first = (index - run.len()) as u64 * WORD_PAGES;
                    mark(first * PAGE_BYTES, &run);
                    run.clear();
                }
                dirty => run.push(dirty),
            }
        }
    }

    fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.map.get_atomic_ref(index * WORD_BYTES).ok()
    }
}

/// Takes and clears a word. Most words are zero, and a load leaves their cache lines shared.
fn take(word: &AtomicU64) -> u64 {
    match word.load(Ordering::Relaxed) {
        0 => 0,
        _ => u64::from_le(word.swap(0, Ordering::SeqCst)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    fn taken(log: &WriteLog) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        log.take(|start, words| {
            assert!(words.iter().all(|word| *word != 0));
            for (index, word) in (0..).zip(words) {
                let first = start / PAGE_BYTES + index * 64;
                let set = (0..64).filter(|bit| word >> bit & 1 == 1);
                pages.extend(set.map(|bit| first + bit));
            }
        });
        pages
    }

    proptest! {
        #[test]
        fn what_is_taken_is_what_a_set_of_pages_says(
            rounds in proptest::collection::vec(
                proptest::collection::vec((0..3_000_u64 * 4096, 0..70_000_u64), 0..20), 1..4)
        ) {
            let log = WriteLog::new(3_000 * 4096).unwrap();
            let bits = log.map.size() as u64 * 8;
            for writes in rounds {
                let mut model = BTreeSet::new();
                for (start, bytes) in writes {
                    log.mark(start, bytes);
                    let last = (start + bytes).checked_sub(1).filter(|_| bytes > 0);
                    let touched = (start..start + bytes).step_by(4096).chain(last);
                    model.extend(touched.map(|byte| byte / 4096).filter(|page| *page < bits));
                }
                prop_assert_eq!(taken(&log), model);
            }
            prop_assert!(taken(&log).is_empty());
        }
    }

    #[test]
    fn bits_lie_where_the_specification_says() {
        let log = WriteLog::new(1 << 30).unwrap();
        // Page 77 is bit 5 of byte 9.
        log.file.write_all_at(&[1 << 5], 9).unwrap();
        assert_eq!(taken(&log), BTreeSet::from([77]));
        log.mark(77 * 4096 + 4095, 2);
        let mut bytes = [0; 2];
        log.file.read_exact_at(&mut bytes, 9).unwrap();
        assert_eq!(bytes, [0b110_0000, 0]);
    }

    #[test]
    fn a_bit_that_is_set_meanwhile_is_taken_once() {
        let log = WriteLog::new(64 << 20).unwrap();
        let writer = |thread: u64| {
            for page in (thread..16_384).step_by(4) {
                log.mark(page * 4096, 1);
            }
        };
        let mut found = Vec::new();
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4).map(|n| scope.spawn(move || writer(n))).collect();
            while !writers
                .iter()
                .all(std::thread::ScopedJoinHandle::is_finished)
            {
                found.extend(taken(&log));
            }
        });
        found.extend(taken(&log));
        found.sort_unstable();
        assert!(found.into_iter().eq(0..16_384));
    }

    #[test]
    fn nobody_can_make_the_file_shorter() {
        let log = WriteLog::new(64 << 20).unwrap();
        log.file.set_len(0).unwrap_err();
    }
}
