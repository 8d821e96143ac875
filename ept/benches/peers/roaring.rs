//! `roaring` 0.12: taken out with `mem::take` and read with `next_range`, whose ranges end at every 65,536 pages and
//! are joined here; `insert` and `insert_range`. No two threads may touch it at once. It is as insertion leaves it:
//! `optimize` is not called.

use std::mem;

use roaring::RoaringBitmap;

use super::{Consumer, Dirt, DirtySet, MarkedSet, Marks, RUN};

pub(crate) struct Roaring {
    set: RoaringBitmap,
    /// What `dirty` makes it, once that was asked for.
    dirty: Option<RoaringBitmap>,
}

fn inserted(dirt: &Dirt) -> RoaringBitmap {
    let bytes: Vec<u8> = dirt.iter().flat_map(|word| word.to_le_bytes()).collect();
    RoaringBitmap::from_lsb0_bytes(0, &bytes)
}

impl DirtySet for Roaring {
    const NAME: &'static str = "RoaringBitmap";

    fn new(_: &Dirt) -> Self {
        Self {
            set: RoaringBitmap::new(),
            dirty: None,
        }
    }

    fn dirty(&mut self, dirt: &Dirt) {
        let dirty = self.dirty.get_or_insert_with(|| inserted(dirt));
        self.set = dirty.clone();
    }

    fn harvest(&mut self, consumer: &mut Consumer) {
        let taken = mem::take(&mut self.set);
        let mut pages = taken.iter();
        let mut open: Option<(u64, u64)> = None;
        while let Some(range) = pages.next_range() {
            let (first, end) = (u64::from(*range.start()), u64::from(*range.end()) + 1);
            open = match open {
                Some((start, until)) if until == first => Some((start, end)),
                Some((start, until)) => {
                    consumer.run(start, until - start);
                    Some((first, end))
                }
                None => Some((first, end)),
            };
        }
        if let Some((start, until)) = open {
            consumer.run(start, until - start);
        }
    }

    fn bytes(&self) -> usize {
        self.set.serialized_size()
    }
}

impl MarkedSet for Roaring {
    fn marks(&mut self) -> impl Marks {
        &mut self.set
    }
}

impl Marks for &mut RoaringBitmap {
    #[inline]
    fn mark_page(&mut self, page: u64) {
        self.insert(number(page));
    }

    #[inline]
    fn mark_run(&mut self, first_page: u64) {
        self.insert_range(number(first_page)..number(first_page + RUN));
    }
}

fn number(page: u64) -> u32 {
    u32::try_from(page).expect("below 16 TiB")
}
