//! The limit: a loop over the leaf tables of 1 GiB by a program that knows where they are.
//!
//! Entries are as in Intel's EPT. Live ones are atomics, detached ones are integers.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{BLOCK, FIRST, Halves, PAGE, PAGES, PageTable, Protects, Splits, Unmaps, frames};

/// The address bits of an entry.
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Readable, writable, executable, write-back.
const LEAF: u64 = 0x37;
const PRESENT: u64 = 7;
const WRITE: u64 = 2;

pub(crate) struct Plain {
    /// The leaf tables, one after the other.
    words: &'static [AtomicU64],
    /// The table above.
    upper: &'static [AtomicU64],
}

fn pages() -> usize {
    usize::try_from(PAGES).expect("64 bits")
}

/// Every page's entry.
fn entries(first: u64) -> impl Iterator<Item = u64> {
    let leaf = black_box(LEAF);
    (0..).map(move |page: u64| (first + page * PAGE) | leaf)
}

impl PageTable for Plain {
    const NAME: &'static str = "plain loop";

    fn new() -> Self {
        Self {
            words: frames::aligned(pages()),
            upper: frames::aligned(512),
        }
    }

    fn map(&mut self) {
        for (word, entry) in self.words.iter().zip(entries(FIRST)) {
            word.store(entry, Ordering::Relaxed);
        }
    }

    fn sum(&self) -> u64 {
        let mut sum = 0_u64;
        for word in self.words {
            let raw = word.load(Ordering::Acquire);
            if raw & PRESENT != 0 {
                sum = sum.wrapping_add(raw & ADDRESS);
            }
        }
        sum
    }
}

impl Unmaps for Plain {
    fn unmap(&mut self) {
        for word in self.words {
            word.store(0, Ordering::Relaxed);
        }
    }
}

fn protect(words: &[AtomicU64]) {
    for word in words {
        word.fetch_and(!WRITE, Ordering::SeqCst);
    }
}

fn release(words: &[AtomicU64]) {
    for word in words {
        word.fetch_or(WRITE, Ordering::SeqCst);
    }
}

impl Protects for Plain {
    fn protect(&mut self) {
        protect(self.words);
    }

    fn release(&mut self) {
        release(self.words);
    }

    fn writable(&self) -> u64 {
        let raws = self.words.iter().map(|word| word.load(Ordering::Relaxed));
        raws.filter(|raw| raw & WRITE != 0).count() as u64
    }
}

impl Halves for Plain {
    fn toggle(&self, half: usize) {
        let half = &self.words[half * pages() / 2..][..pages() / 2];
        protect(half);
        release(half);
    }
}

impl Splits for Plain {
    fn fill(&mut self) {
        self.unmap();
    }

    fn split(&mut self, block: u64) {
        let block_index = usize::try_from(block).expect("64 bits");
        let table = &self.words[block_index * 512..][..512];
        for (word, entry) in table.iter().zip(entries(FIRST + block * BLOCK)) {
            word.store(entry, Ordering::Relaxed);
        }
        self.upper[block_index].swap(PRESENT, Ordering::SeqCst);
    }
}

/// The same where nobody else sees the tables.
pub(crate) struct PlainDetached {
    words: Vec<u64>,
}

impl PageTable for PlainDetached {
    const NAME: &'static str = "plain loop";

    fn new() -> Self {
        let words = vec![0; pages()];
        Self { words }
    }

    fn map(&mut self) {
        for (word, entry) in self.words.iter_mut().zip(entries(FIRST)) {
            *word = entry;
        }
    }

    fn sum(&self) -> u64 {
        let present = self.words.iter().filter(|raw| **raw & PRESENT != 0);
        present.map(|raw| raw & ADDRESS).sum()
    }
}

impl Protects for PlainDetached {
    fn protect(&mut self) {
        for word in &mut self.words {
            *word &= !WRITE;
        }
    }

    fn release(&mut self) {
        for word in &mut self.words {
            *word |= WRITE;
        }
    }

    fn writable(&self) -> u64 {
        self.words.iter().filter(|raw| **raw & WRITE != 0).count() as u64
    }
}
