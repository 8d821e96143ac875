//! Stage-2 maps, the range walker over them, dirty trackers and notifiers.
//!
//! This crate knows neither KVM nor Linux. It keeps one map of guest-physical memory in which it is
//! written which pages are dirty, which are write-protected, and for whom.
//!
//! # The way of a dirty page
//!
//! ```text
//! guest store → KVM log ┐                      ┌ Epoch "migration" → Harvest → runs → commit
//! device DMA → Bitmap   ┼→ Tracker::mark… ─────┼ Epoch "framebuffer"            └ rollback
//! write fault → exit    ┘                      └ Epoch "dirty-rate"
//! ```
//!
//! - [`Tracker`] is the one dirty set; each [`Source`] that marks it is counted.
//! - [`Epoch`] is a named consumer; what one harvests stays dirty for the others.
//! - [`Harvest`] is a transaction: committed, or every page is dirty again.
//! - [`Notifier`] brackets every change of entries; [`OpenRange`] is the proof, which
//!   [`Tracker::protect`] and [`walk::Walk::change`] ask for.
//! - [`walk::Walk`] is the one range walker, over any [`format::Format`].
//! - [`stage2::Stage2`] is a table that hardware walks: Intel EPT, AMD NPT, Arm stage 2, RISC-V G-stage.
//! - [`apply`] has the walker's ancestors by name.
//!
//! ```
//! use std::sync::Arc;
//! use ept::{Epoch, Gpa, GpaRange, Region, RegionKind, Source, Start, Tracker};
//!
//! let ram = GpaRange::with_len(Gpa(0), 1 << 30)?;
//! let tracker = Arc::new(Tracker::new(&[Region { range: ram, kind: RegionKind::Ram }])?);
//! let migration = Epoch::begin(&tracker, "migration", Start::Clean)?;
//!
//! // A device wrote 5000 bytes: data first, mark after.
//! tracker.mark(Gpa(0x1234), 5000, Source::Device);
//!
//! let harvest = migration.harvest(ram)?;
//! assert_eq!(harvest.pages(), 2);
//! for run in harvest.runs() {
//!     assert_eq!(run, GpaRange::new(Gpa(0x1000), Gpa(0x3000))?);
//! }
//! // Sent and confirmed. Dropped instead, the pages would be dirty again.
//! harvest.commit();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//! `std`: waiting threads yield. `vm-memory`: `TrackerBitmap`, a `vm_memory::bitmap::Bitmap`.
#![no_std]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

mod addr;
pub mod apply;
mod arena;
#[cfg(feature = "vm-memory")]
mod bitmap;
mod counters;
mod epoch;
pub mod format;
mod geometry;
mod harvest;
mod notify;
mod region;
pub mod stage2;
mod sync;
mod tracker;
mod tracking;
pub mod walk;

pub use addr::{Gpa, GpaRange, Hpa, Level, PAGE_SIZE, RangeError, TABLE_ENTRIES};
#[cfg(feature = "vm-memory")]
pub use bitmap::TrackerBitmap;
pub use counters::{CountersSnapshot, Source};
pub use epoch::{Epoch, EpochError, HarvestError, MAX_EPOCHS, Start};
pub use geometry::{Geometry, GeometryError};
pub use harvest::{Harvest, Runs, Words};
pub use notify::{
    Notifier, OpenError, OpenRange, ReadTicket, Subscriber, Subscription, Unresponsive,
};
pub use region::{Region, RegionKind};
pub use tracker::{Fault, ProtectError, Tracker, TrackerError};
pub use tracking::Changed;
