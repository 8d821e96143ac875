//! Marks, protections and harvests of a tracker, done to sets of pages, too.
//!
//! With all the tables that it wants, each epoch finds exactly the pages of its set. With fewer it may find more, but
//! only pages of the regions and, while nothing was noted as coarse, only pages that were dirty once; never fewer.

mod checked;
mod script;

pub use script::Script;
