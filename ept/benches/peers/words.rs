//! A plain array of atomic words: read one after the other, exchanged where there is something, and scanned.
//!
//! Some words are taken before any is scanned: an exchange is a barrier, and what comes before it and after it is
//! not done at once.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Consumer, Dirt, DirtySet, Marks, RUN, SharedSet, scan};

pub(crate) struct Words(Vec<AtomicU64>);

/// Words that are taken at once.
const TAKEN: usize = 64;

/// Takes up to [`TAKEN`] words; there are zeroes in place of more.
#[inline]
fn take(words: &[AtomicU64]) -> [u64; TAKEN] {
    let mut taken = [0; TAKEN];
    for (taken, word) in taken.iter_mut().zip(words) {
        if word.load(Ordering::SeqCst) != 0 {
            *taken = word.swap(0, Ordering::SeqCst);
        }
    }
    taken
}

fn index(page: u64) -> usize {
    usize::try_from(page / 64).expect("64 bits")
}

impl DirtySet for Words {
    const NAME: &'static str = "u64 scan";

    fn new(dirt: &Dirt) -> Self {
        Self(dirt.iter().map(|_| AtomicU64::new(0)).collect())
    }

    fn dirty(&mut self, dirt: &Dirt) {
        for (word, bits) in self.0.iter_mut().zip(dirt.iter()) {
            *word.get_mut() = *bits;
        }
    }

    fn harvest(&mut self, consumer: &mut Consumer) {
        let taken = self.0.chunks(TAKEN).map(take);
        scan::runs(taken.flatten(), consumer);
    }

    fn bytes(&self) -> usize {
        size_of_val(self.0.as_slice())
    }
}

impl SharedSet for Words {
    fn shared_marks(&self) -> impl Marks {
        self
    }
}

impl Marks for &Words {
    #[inline]
    fn mark_page(&mut self, page: u64) {
        self.0[index(page)].fetch_or(1 << (page % 64), Ordering::SeqCst);
    }

    #[inline]
    fn mark_run(&mut self, first_page: u64) {
        let end = first_page + RUN;
        let mut page = first_page;
        while page < end {
            let next = (page / 64 + 1) * 64;
            let last = end.min(next);
            let bits = u64::MAX >> (64 - (last - page)) << (page % 64);
            self.0[index(page)].fetch_or(bits, Ordering::SeqCst);
            page = last;
        }
    }
}
