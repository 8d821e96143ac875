//! Storage for tables: named by index, allocated in chunks when first needed, and able to say no.

use crate::sync::atomic::{AtomicUsize, Ordering};
use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;

use crate::format::{OutOfTables, TableId};
use crate::sync::{OnceArray, SpinLock};

/// Tables of one kind, `CHUNK` of them in each `C`.
pub(crate) struct Arena<C, const CHUNK: usize> {
    chunks: OnceArray<[C; 1]>,
    /// Most tables that may exist.
    capacity: usize,
    state: SpinLock<Vacant>,
    chunks_made: AtomicUsize,
}

/// Which places hold no table.
struct Vacant {
    /// Places from here on were never used.
    next: usize,
    /// Places that were given back, as many as were reserved for by the tables in flight.
    free: Vec<usize>,
}

impl<C: Default, const CHUNK: usize> Arena<C, CHUNK> {
    /// Room for `capacity` tables, none of them allocated.
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

    /// The chunk that holds the table named `table`, and its place there.
    ///
    /// # Panics
    /// On an id that [`Arena::allocate`] did not give out.
    #[inline]
    pub(crate) fn get(&self, table: TableId) -> (&C, usize) {
        let index = usize::try_from(table.0).unwrap_or(usize::MAX);
        match self.chunks.get(index / CHUNK) {
            Some([chunk]) => (chunk, index % CHUNK),
            None => unknown(table),
        }
    }

    /// A table that nobody else has, with whatever its last owner left in it.
    pub(crate) fn allocate(&self) -> Result<TableId, OutOfTables> {
        loop {
            let missing = match self.reuse_or_extend()? {
                Ok(index) => return Ok(TableId(index as u64)),
                Err(chunk) => chunk,
            };
            // Memory is asked for outside the lock; where two threads do, one chunk is dropped.
            self.chunks.fill(missing, new_chunk()?);
            self.chunks_made.fetch_max(missing + 1, Ordering::Relaxed);
        }
    }

    /// Takes back a table that was allocated and never linked.
    pub(crate) fn give_back(&self, table: TableId) {
        let mut vacant = self.state.lock();
        // Without memory for the note the place is lost to reuse, and freed with the arena.
        if vacant.free.try_reserve(1).is_ok()
            && let Ok(index) = usize::try_from(table.0)
        {
            vacant.free.push(index);
        }
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.chunks_made.load(Ordering::Relaxed) * size_of::<C>()
            + self.chunks.len() * size_of::<usize>()
    }

    /// A vacant place, or the chunk that must be made first.
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

/// A box that can fail; `Box::new` cannot.
fn new_chunk<C: Default>() -> Result<Box<[C; 1]>, OutOfTables> {
    let mut one = Vec::new();
    one.try_reserve_exact(1).map_err(|_| OutOfTables)?;
    one.push(C::default());
    one.into_boxed_slice().try_into().map_err(|_| OutOfTables)
}

#[cold]
fn unknown(table: TableId) -> ! {
    panic!("no table {} in this store", table.0)
}
