//! The reader's side of the sequence protocol.

use alloc::sync::Arc;
use core::fmt;

use crate::addr::GpaRange;
use crate::notify::state::State;
use crate::sync::SpinLock;

/// Work in progress from translations of a range.
///
/// The notifier notes it until it is dropped, so that exactly the changes that overlap its range
/// make it stale, however many others there are.
#[must_use = "a ticket is there to be checked"]
pub struct ReadTicket {
    state: Arc<SpinLock<State>>,
    range: GpaRange,
    /// `None` where there was no memory to note it: then every check says stale.
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

    /// The range it works from.
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
