//! What the fuzz targets share: the models, and the scripts that fuzzed bytes are read as.

pub mod decode;
mod formats;
mod hostile;
// Written from the manuals, with nothing of the crate.
#[path = "../../tests/mmu/mod.rs"]
mod mmu;
mod pages;
pub mod stage2;
mod steps;
pub mod tracker;
