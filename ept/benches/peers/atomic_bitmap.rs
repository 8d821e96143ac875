//! vm-memory's `AtomicBitmap`: `get_and_reset`, whose words are then scanned by hand; `set_bit`, and
//! `set_addr_range` for runs.

use std::num::NonZeroUsize;

use vm_memory::bitmap::AtomicBitmap;

use super::{Consumer, Dirt, DirtySet, Marks, PAGE, RUN, SharedSet, scan};

pub(crate) struct Atomic(AtomicBitmap);

fn size(number: u64) -> usize {
    usize::try_from(number).expect("64 bits")
}

impl DirtySet for Atomic {
    const NAME: &'static str = "AtomicBitmap";

    fn new(dirt: &Dirt) -> Self {
        let page = NonZeroUsize::new(size(PAGE)).expect("4096");
        Self(AtomicBitmap::new(dirt.len() * 64 * page.get(), page))
    }

    fn dirty(&mut self, dirt: &Dirt) {
        for (index, word) in dirt.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                self.0.set_bit(64 * index + left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
    }

    fn harvest(&mut self, consumer: &mut Consumer) {
        scan::runs(self.0.get_and_reset().into_iter(), consumer);
    }

    fn bytes(&self) -> usize {
        size_of::<AtomicBitmap>() + self.0.len().div_ceil(64) * 8
    }
}

impl SharedSet for Atomic {
    fn shared_marks(&self) -> impl Marks {
        &self.0
    }
}

impl Marks for &AtomicBitmap {
    #[inline]
    fn mark_page(&mut self, page: u64) {
        self.set_bit(size(page));
    }

    #[inline]
    fn mark_run(&mut self, first_page: u64) {
        self.set_addr_range(size(first_page * PAGE), size(RUN * PAGE));
    }
}
