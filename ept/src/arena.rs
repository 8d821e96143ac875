//! Storage for tables. A table is named by its index. Memory is allocated in chunks when it is first needed, and a failed
//! allocation is an error.

use crate::sync::atomic::{AtomicUsize, Ordering};
use alloc::collections::TryReserveError;
use alloc::vec::Vec;

use crate::format::{OutOfTables, TableId};
use crate::sync::{OnceArray, SpinLock, try_box};

/// Store of tables of one kind. A chunk `C` holds `CHUNK` of them.
pub(crate) struct Arena<C, const CHUNK: usize> {
    chunks: OnceArray<[C; 1]>,
    /// Maximum number of tables.
    capacity: usize,
    state: SpinLock<Vacant>,
    chunks_made: AtomicUsize,
}

/// The places that hold no table.
struct Vacant {
    /// Index of the first place that was never used.
    next: usize,
    /// Indices of tables that were given back.
    free: Vec<usize>,
}

impl<C: Default, const CHUNK: usize> Arena<C, CHUNK> {
    /// Creates a store with room for `capacity` tables, none of them allocated.
    pub(crate) fn try_new(capacity: usize) -> Result<Self, TryReserveError> {
        Ok(Self {
            chunks: OnceArray::try_new(capacity.div_ceil(CHUNK))?,
            capacity,
            state: SpinLock::new(Vacant {
                next: 0,
                free: Vec::new(),
            }),
            chunks_made: AtomicUsize::new(0),
        })
    }

    /// Returns the chunk that holds `table`, and the index of the table in it.
    ///
    /// # Panics
    /// Panics if [`Arena::allocate`] did not return `table`.
    #[inline]
    pub(crate) fn get(&self, table: TableId) -> (&C, usize) {
        let index = usize::try_from(table.0).unwrap_or(usize::MAX);
        match self.chunks.get(index / CHUNK) {
            Some([chunk]) => (chunk, index % CHUNK),
            None => unknown(table),
        }
    }

    /// Returns a table that has no other user. Its contents are those that its last user left.
    pub(crate) fn allocate(&self) -> Result<TableId, OutOfTables> {
        loop {
            let missing = match self.reuse_or_extend()? {
                Ok(index) => return Ok(TableId(index as u64)),
                Err(chunk) => chunk,
            };
            // Allocated without the lock. If two threads allocate the same chunk, one of the two is dropped.
            let chunk = try_box(C::default()).ok_or(OutOfTables)?;
            self.chunks.fill(missing, chunk);
            self.chunks_made.fetch_max(missing + 1, Ordering::Relaxed);
        }
    }

    /// Takes back a table that was allocated but never linked.
    pub(crate) fn give_back(&self, table: TableId) {
        let mut vacant = self.state.lock();
        // If there is no memory to remember the place, it is not reused, and freed with the arena.
        if vacant.free.try_reserve(1).is_ok()
            && let Ok(index) = usize::try_from(table.0)
        {
            vacant.free.push(index);
        }
    }

    /// Returns the number of bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.chunks_made.load(Ordering::Relaxed) * size_of::<C>()
            + self.chunks.len() * size_of::<usize>()
    }

    /// Returns a vacant place, or else the index of the chunk that must be allocated first.
    fn reuse_or_extend(&self) -> Result<Result<usize, usize>, OutOfTables> {
        let mut vacant = self.state.lock();
        if let Some(index) = vacant.free.pop() {
            return Ok(Ok(index));
        }
        let index = vacant.next;
        if index >= self.capacity {
            return Err(OutOfTables);
        }
        if self.chunks.get(index / CHUNK).is_none() {
            return Ok(Err(index / CHUNK));
        }
        vacant.next += 1;
        Ok(Ok(index))
    }
}

#[cold]
fn unknown(table: TableId) -> ! {
    panic!("no table {} in this store", table.0)
}
