//! The hot loops that stamp and check pages.
//!
//! Unsafe: reads and writes the area by guest-physical address. The area is identity mapped, each page
//! belongs to one vCPU, and it contains no Rust objects. The accesses are volatile because the order
//! of the writes matters (head first, tail last) and because the program exists to detect that the
//! memory changed.

use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use crate::dirtier::{Finding, Leg, PLACES, Stamp, WORDS, judge};
use crate::memory::Runs;

/// A range of positions of a leg, and the memory in which the pages of the leg are numbered.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<'a> {
    pub(crate) memory: &'a Runs,
    pub(crate) leg: Leg,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) cpu: u32,
}

impl Chunk<'_> {
    /// Calls `visit` with the address of each page until it returns false. Returns the number of pages
    /// for which it returned true, and the address of the page for which it returned false.
    #[inline(always)]
    fn each(&self, visit: impl Fn(u64) -> bool) -> (u64, Option<u64>) {
        let mut pages = 0;
        for position in self.from..self.to {
            let Some(page) = self.leg.order.page(position) else {
                continue;
            };
            let gpa = self.memory.gpa(self.leg.first + page);
            if !visit(gpa) {
                return (pages, Some(gpa));
            }
            pages += 1;
        }
        (pages, None)
    }

    /// Stamps all pages without checking them. Returns their number.
    pub(crate) fn populate(&self, iteration: u64) -> u64 {
        self.each(|gpa| {
            write(Stamp::new(iteration, gpa, self.cpu), gpa);
            true
        })
        .0
    }

    /// Checks each page and stamps it with `iteration`. Returns the number of pages.
    ///
    /// # Errors
    /// Returns the address of the first page that does not hold its expected stamp. That page and the
    /// following ones are not written.
    pub(crate) fn rewrite(&self, iteration: u64) -> Result<u64, u64> {
        let (pages, stopped) = self.each(|gpa| {
            let good = holds(Stamp::new(self.leg.expected, gpa, self.cpu), gpa);
            if good {
                write(Stamp::new(iteration, gpa, self.cpu), gpa);
            }
            good
        });
        stopped.map_or(Ok(pages), Err)
    }

    /// Checks each page and calls `report` with the address of every page that does not hold its
    /// expected stamp.
    pub(crate) fn check(mut self, mut report: impl FnMut(u64)) {
        while self.from < self.to {
            let all = self;
            let (_, stopped) =
                all.each(|gpa| holds(Stamp::new(all.leg.expected, gpa, all.cpu), gpa));
            let Some(gpa) = stopped else { return };
            report(gpa);
            self.from = 1 + self.position_of(gpa);
        }
    }

    /// Returns the position of a page. It searches, because it is needed only after an error.
    fn position_of(&self, gpa: u64) -> u64 {
        let at = |position| {
            self.leg
                .order
                .page(position)
                .map(|page| self.memory.gpa(self.leg.first + page))
        };
        (self.from..self.to)
            .find(|position| at(*position) == Some(gpa))
            .unwrap_or(self.to)
    }
}

/// Returns the result of the check of the page at `gpa`, which vCPU `cpu` writes.
pub(crate) fn examine(gpa: u64, cpu: u32) -> Finding {
    let owner = Stamp::new(0, gpa, cpu).owner;
    judge(owner, [0, 1, 2].map(|place| read(gpa, place)))
}

/// Returns true if all places of the page hold this stamp.
#[inline(always)]
fn holds(stamp: Stamp, gpa: u64) -> bool {
    let mut difference = 0;
    for place in 0..PLACES.len() {
        let (found, wanted) = (read(gpa, place), stamp.words(place));
        for word in 0..WORDS {
            difference |= found[word] ^ wanted[word];
        }
    }
    difference == 0
}

#[inline(always)]
fn read(gpa: u64, place: usize) -> [u64; WORDS] {
    let at = with_exposed_provenance::<u64>((gpa + PLACES[place]) as usize);
    // SAFETY: see the head of the file. All places are aligned.
    [0, 1, 2].map(|word| unsafe { at.add(word).read_volatile() })
}

#[inline(always)]
fn write(stamp: Stamp, gpa: u64) {
    for (place, offset) in PLACES.iter().enumerate() {
        let at = with_exposed_provenance_mut::<u64>((gpa + offset) as usize);
        for (word, value) in stamp.words(place).into_iter().enumerate() {
            // SAFETY: see the head of the file. All places are aligned.
            unsafe { at.add(word).write_volatile(value) };
        }
    }
}
