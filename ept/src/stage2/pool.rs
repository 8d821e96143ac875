//! Memory for tables, lent by the embedder as a slice of atomics.
//!
//! Which tables are free, and which wait for a flush or for a walk, is kept beside the tables, because those may
//! still be read: a list through their own words would be read as entries.

use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;

use crate::addr::{Hpa, PAGE_SIZE, TABLE_ENTRIES};
use crate::format::{OutOfTables, TableId};
use crate::stage2::readers::{Readers, Reading};
use crate::sync::SpinLock;

/// No table.
const NONE: u32 = u32::MAX;

/// Tables, by number, in memory that is not ours.
pub(super) struct Pool<'m> {
    words: &'m [AtomicU64],
    base: Hpa,
    /// For a table in a list, the next one.
    next: Box<[AtomicU32]>,
    free: SpinLock<Free>,
    readers: Readers,
}

struct Free {
    /// The first table that was never used.
    unused: u32,
    /// Tables that may be used again.
    list: Chain,
    /// Tables that wait for the walks of the other crowd.
    leaving: Chain,
    /// Tables that were given back since the crowds changed last.
    retired: Chain,
}

/// A list of tables, in no order. Whoever has it has the tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain {
    first: u32,
    last: u32,
    count: usize,
}

impl Chain {
    pub(super) const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
        count: 0,
    };

    pub(super) fn len(&self) -> usize {
        self.count
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl<'m> Pool<'m> {
    /// `words` at `base`, of which the first `reserved` tables are the root's.
    pub(super) fn try_new(
        words: &'m [AtomicU64],
        base: Hpa,
        reserved: usize,
    ) -> Result<Self, TryReserveError> {
        let tables = (words.len() / TABLE_ENTRIES).min(NONE as usize);
        let mut next = Vec::new();
        next.try_reserve_exact(tables)?;
        next.resize_with(tables, || AtomicU32::new(NONE));
        Ok(Self {
            words,
            base,
            next: next.into_boxed_slice(),
            free: SpinLock::new(Free {
                unused: u32::try_from(reserved).unwrap_or(NONE),
                list: Chain::EMPTY,
                leaving: Chain::EMPTY,
                retired: Chain::EMPTY,
            }),
            readers: Readers::new(),
        })
    }

    pub(super) fn root_id(&self) -> TableId {
        TableId(self.base.0)
    }

    pub(super) fn root(&self, entries: usize) -> &'m [AtomicU64] {
        &self.words[..entries]
    }

    /// # Panics
    /// On an id that this pool did not give out.
    #[inline]
    pub(super) fn table(&self, table: TableId) -> &'m [AtomicU64] {
        let first = usize::try_from((table.0 - self.base.0) / size_of::<u64>() as u64);
        let first = first.unwrap_or(usize::MAX);
        &self.words[first..][..TABLE_ENTRIES]
    }

    /// A walk begins.
    #[inline]
    pub(super) fn reading(&self) -> Reading<'_> {
        self.readers.enter()
    }

    pub(super) fn allocate(&self) -> Result<TableId, OutOfTables> {
        let mut free = self.free.lock();
        if free.list.is_empty() {
            self.reclaim(&mut free);
        }
        if !free.list.is_empty() {
            let number = free.list.first;
            free.list.first = self.link(number).load(Ordering::Relaxed);
            free.list.count -= 1;
            return Ok(self.id(number));
        }
        let number = free.unused;
        if number as usize >= self.next.len() {
            return Err(OutOfTables);
        }
        free.unused += 1;
        Ok(self.id(number))
    }

    /// Tables that [`Self::allocate`] can still give.
    pub(super) fn available(&self) -> usize {
        let mut free = self.free.lock();
        self.reclaim(&mut free);
        free.list.count + self.next.len().saturating_sub(free.unused as usize)
    }

    /// Frees the tables whose walks are over. At most two changes of crowds free everything if nobody walks.
    fn reclaim(&self, free: &mut Free) {
        while !(free.leaving.is_empty() && free.retired.is_empty()) {
            if !self.readers.other_is_gone() {
                return;
            }
            self.append(&mut free.list, free.leaving);
            free.leaving = core::mem::replace(&mut free.retired, Chain::EMPTY);
            if !free.leaving.is_empty() {
                self.readers.change();
            }
        }
    }

    /// Puts a table before `chain`.
    pub(super) fn push(&self, chain: &mut Chain, table: TableId) {
        let number = self.number(table);
        self.link(number).store(chain.first, Ordering::Relaxed);
        if chain.is_empty() {
            chain.last = number;
        }
        chain.first = number;
        chain.count += 1;
    }

    /// Puts `front` before `chain`.
    fn append(&self, chain: &mut Chain, front: Chain) {
        if front.is_empty() {
            return;
        }
        self.link(front.last).store(chain.first, Ordering::Relaxed);
        if chain.is_empty() {
            chain.last = front.last;
        }
        chain.first = front.first;
        chain.count += front.count;
    }

    /// Takes back a table that was never linked: nobody can be reading it.
    pub(super) fn give_back(&self, table: TableId) {
        let mut free = self.free.lock();
        self.push(&mut free.list, table);
    }

    /// Takes back tables that were taken out of the tree and flushed; they are free when every walk is over that may
    /// have found them before.
    pub(super) fn retire(&self, chain: Chain) {
        if chain.is_empty() {
            return;
        }
        let mut free = self.free.lock();
        self.append(&mut free.retired, chain);
    }

    fn link(&self, number: u32) -> &AtomicU32 {
        &self.next[number as usize]
    }

    fn id(&self, number: u32) -> TableId {
        TableId(self.base.0 + u64::from(number) * PAGE_SIZE)
    }

    fn number(&self, table: TableId) -> u32 {
        u32::try_from((table.0 - self.base.0) / PAGE_SIZE).unwrap_or(NONE)
    }
}
