//! Stage-2 tables, the range walker over them, dirty trackers and notifiers.
//!
//! This crate knows neither KVM nor Linux. It keeps one map of guest-physical memory, which records which pages are dirty,
//! which are write-protected, and for which consumer.
//!
//! # The way of a dirty page
//!
//! ```text
//! guest store → KVM log ┐                      ┌ Epoch "migration" → Harvest → runs → commit
//! device DMA → Bitmap   ┼→ Tracker::mark… ─────┼ Epoch "framebuffer"            └ rollback
//! write fault → exit    ┘                      └ Epoch "dirty-rate"
//! ```
//!
//! - [`Tracker`] is the dirty set of a guest. It counts the pages that each [`Source`] marks.
//! - [`Epoch`] is a named consumer. A page that one epoch harvests stays dirty for the others.
//! - [`Harvest`] is a transaction: it is committed, or all its pages become dirty again.
//! - [`Notifier`] brackets every change of entries. [`OpenRange`] is the proof that a range is open; [`Tracker::protect`]
//!   and [`walk::Walk::change`] require it.
//! - [`walk::Walk`] is the range walker, for any [`format::Format`].
//! - [`stage2::Stage2`] is a table that hardware walks: Intel EPT, AMD NPT, Arm stage 2, RISC-V G-stage.
//! - [`apply`] has Linux's `apply_to_page_range` and `apply_to_pfn_range`, on top of the walker.
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
//! // The pages were sent and confirmed. If the harvest were dropped instead, they would be dirty again.
//! harvest.commit();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Hot-plug
//! Regions come and go while writers mark and epochs harvest. [`Tracker::add_region`] takes the region's [`Contents`]: if
//! they are unknown, all of it is dirty for every open epoch. [`Tracker::remove_region`] refuses to remove a region that
//! has dirty pages for any epoch, so that none is lost by accident; [`Tracker::discard_region`] removes it all the same.
//!
//! # Promises and their tests
//!
//! | | promise | tests (`ept/tests`) |
//! |---|---|---|
//! | S1 | ranges are checked when they are made; a huge leaf is visited once, with its true span | `walk::s1_…`, `stage2::every_format_agrees_with_a_list_of_pages` |
//! | S2 | without allocation no error for memory; with it, how far it got; the worst case can be reserved | `walk`, `shortage::s2_…`, `stage2::a_map_without_tables_says_how_far_it_got`, `stage2::a_reservation_is_kept`, `apply` |
//! | S3 | continue, descend, skip, split, again, stop | `walk::s3_every_answer`, `walk::s3_descend_makes_tables_and_split_divides`, `walk::s3_again_reads_anew` |
//! | S4 | holes with their level; a leaf table is one run | `walk::s4_a_table_is_one_run`, `walk::s2_walks_write_and_read_like_a_map` |
//! | S5 | splits on demand: complete before they are linked, dirty parts of a dirty whole, a coarse entry where memory is short | `stage2::splits_and_collapses_lose_no_dirty_flag`, `stage2::a_split_without_tables_leaves_the_huge_leaf`, `threads`, `shortage` |
//! | S6 | a collapse loses no dirty flag, and keeps to its range | `stage2::splits_and_collapses_lose_no_dirty_flag`, `stage2::nothing_collapses_across_an_edge` |
//! | S7 | every change of a live entry is one atomic read-modify-write | `stage2_threads`, `threads` |
//! | S8 | a long walk yields and goes on with progress; no table is used again while a walker may read it | `stage2::a_long_walk_yields_and_goes_on`, `stage2_order::no_table_is_reused_under_a_walk`, `stage2_order::readers_never_see_another_ranges_entries` |
//! | S9 | threads on disjoint ranges do not wait for each other; overlapping changes are ordered | `stage2_threads::disjoint_ranges_are_changed_at_once`, `stage2_order::disjoint_changes_do_not_wait`, `stage2_order::overlapping_changes_are_ordered`, `stage2_order::a_crowd_that_waits_holds_up_nobody_elsewhere` |
//! | S10–S13 | notifier ranges, sequence, two passes, subscribers that come and go | `notify` |
//! | S14 | open, change, flush, close; the whole range where another flush is pending | `protect::s14_…`, `stage2::tables_wait_for_the_flush`, `stage2_order::a_pending_flush_makes_the_next_one_whole`, `stage2_order::parts_of_one_huge_leaf_are_flushed_by_each`, `stage2_track::a_cached_fault_is_to_be_flushed` |
//! | S15 | write-protect, and clean-and-record, on every format: what really changed | `protect`, `stage2_track`, `stage2::flags_that_hardware_sets_are_harvested_once` |
//! | S16 | nothing is cleaned unrecorded | `hotplug::s16_…`, `stage2_order::a_panic_leaves_nothing_cleaned_unrecorded`, `stage2_track::a_fault_is_recorded_before_the_next_harvest`, `threads`, `shortage`, `stage2_threads::no_write_is_lost_between_hardware_and_a_harvest`, `stage2_track::no_write_is_lost_between_faults_and_a_harvest` |
//! | S17 | harvests are transactions of named consumers | `epoch`, `threads`, `hotplug` |
//! | S18 | one merged dirty set, sources counted | `tracker`, `vm_memory` |
//! | S19 | ageing loses no dirty state | `stage2::ageing_cleans_nothing` |
//! | S20 | protection by region kind | `protect::s15_protection_matches_a_set_of_pages` |
//! | S21 | figures of what was done: [`CountersSnapshot`], [`stage2::Figures`]. A vCPU's stalls are kept where vCPUs are | `tracker::s21_…`, `stage2_order::figures_are_kept` |
//! | S24 | regions come and go while pages are tracked: none is lost, and a removal that would lose one is refused | `hotplug::s24_…`, `vm_memory::s24_a_monitor_hot_plugs_memory` |
//!
//! # Features
//! - `std`: threads that wait for a lock yield.
//! - `vm-memory`: `TrackerBitmap`, which implements `vm_memory::bitmap::Bitmap` and `NewBitmap`.
#![no_std]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

mod addr;
pub mod apply;
mod arena;
#[cfg(feature = "vm-memory")]
mod bitmap;
mod clock;
mod counters;
mod epoch;
pub mod format;
mod geometry;
mod harvest;
mod marker;
#[cfg(all(test, loom))]
mod models;
mod notify;
mod region;
pub mod stage2;
mod sync;
mod tracker;
mod tracking;
pub mod walk;

pub use addr::{Gpa, GpaRange, Hpa, Level, PAGE_SIZE, RangeError, TABLE_ENTRIES};
#[cfg(feature = "vm-memory")]
pub use bitmap::{AttachError, TrackerBitmap};
pub use clock::Clock;
pub use counters::{CountersSnapshot, Source};
pub use epoch::{Epoch, EpochError, HarvestError, MAX_EPOCHS, Start};
pub use geometry::{Geometry, GeometryError};
pub use harvest::{Harvest, Runs, Words};
pub use marker::Marker;
pub use notify::{
    Notifier, OpenError, OpenRange, ReadTicket, Subscriber, Subscription, Unresponsive,
};
pub use region::{Contents, Region, RegionKind};
pub use tracker::{Fault, MAX_ADDED_REGIONS, ProtectError, RemoveError, Tracker, TrackerError};
pub use tracking::Changed;
