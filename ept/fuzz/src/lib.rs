//! The parts of the fuzz targets: scripts that fuzzed bytes are read as, and the models that their results are compared
//! with.

pub mod decode;
mod formats;
mod hostile;
// Written from the manuals, and independent of the crate under test.
#[path = "../../tests/mmu/mod.rs"]
mod mmu;
// The model of pages is shared with the integration tests.
#[path = "../../tests/model/mod.rs"]
mod model;
mod pages;
pub mod stage2;
mod steps;
pub mod tracker;
