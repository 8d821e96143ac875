//! Sequence protocol: the side of the reader.

use alloc::sync::Arc;
use core::fmt;

use crate::addr::GpaRange;
use crate::notify::state::State;
use crate::sync::SpinLock;

/// Ticket of a reader that uses translations of a range.
///
/// It is registered with the notifier until it is dropped. Only changes that overlap its range make it stale.
#[must_use = "a ticket is there to be checked"]
pub struct ReadTicket {
    state: Arc<SpinLock<State>>,
    range: GpaRange,
    /// Registration; `None` if there was no memory for it. Then every check reports a stale ticket.
    id: Option<u64>,
}

impl ReadTicket {
    pub(crate) fn new(state: &Arc<SpinLock<State>>, range: GpaRange) -> Self {
        Self {
            state: state.clone(),
            range,
            id: state.lock().begin_read(range),
        }
    }

    /// Returns the range whose translations the reader uses.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    pub(crate) fn is_stale(&self) -> bool {
        self.id.is_none_or(|id| self.state.lock().is_stale(id))
    }
}

impl Drop for ReadTicket {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.state.lock().end_read(id);
        }
    }
}

impl fmt::Debug for ReadTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ReadTicket").field(&self.range).finish()
    }
}
