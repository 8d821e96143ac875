//! Operations on a table, done to a list of pages, too.
//!
//! Whatever is done, four must agree on every page: the list, what the crate reads, what hardware reads in the raw
//! words, and what the operation said.

mod apply;
mod change;
mod guest;
mod script;

pub use script::Script;
