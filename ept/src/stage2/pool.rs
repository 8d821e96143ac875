//! Memory for tables, lent by the embedder as a slice of atomics.
//!
//! Which tables are free, and which wait for a flush, is kept beside the tables, because hardware may still
//! read those: a list through their own words would be read as entries.

use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;

use crate::addr::{Hpa, PAGE_SIZE, TABLE_ENTRIES};
use crate::format::{OutOfTables, TableId};
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
}

struct Free {
    /// The first table that was never used.
    unused: u32,
    /// Tables given back.
    list: Chain,
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
            }),
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

    pub(super) fn allocate(&self) -> Result<TableId, OutOfTables> {
        let mut free = self.free.lock();
        if free.list.first != NONE {
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
        let free = self.free.lock();
        free.list.count + self.next.len().saturating_sub(free.unused as usize)
    }

    /// Puts a table before `chain`.
    pub(super) fn push(&self, chain: &mut Chain, table: TableId) {
        let number = self.number(table);
        self.link(number).store(chain.first, Ordering::Relaxed);
        if chain.first == NONE {
            chain.last = number;
        }
        chain.first = number;
        chain.count += 1;
    }

    /// Frees every table of `chain`.
    pub(super) fn give_back(&self, chain: Chain) {
        if chain.first == NONE {
            return;
        }
        let mut free = self.free.lock();
        self.link(chain.last)
            .store(free.list.first, Ordering::Relaxed);
        free.list.first = chain.first;
        free.list.count += chain.count;
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
