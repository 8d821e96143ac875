//! Live migration: moves a guest from a source to a destination while it runs.
//!
//! ```text
//! source                                          destination
//!   │ header (description of the guest) ───────────► │ checks everything that could fail later
//!   │ ◄──────────────────────────── ACCEPT or REFUSE │
//!   │ ZERO PAGES, PAGES … ROUND END ───────────────► │   rounds, while the guest runs
//!   │ ◄─────────────────────────────────── ROUND ACK │
//!   ╞ the guest is paused                            │
//!   │ PAGES …, STATE …, FINISH ────────────────────► │ restores vCPUs and devices
//!   │ ◄──────────────────────────── READY (digest)   │
//!   │ COMMIT ──────────────────────────────────────► ╞ the guest runs
//!   │ ◄──────────────────────────────────────── DONE │
//! ```
//!
//! **Never two running.** The destination runs the guest only after COMMIT. Once a byte of COMMIT has left, the source
//! never runs the guest by itself again: if DONE does not come, the guest stays paused there with its memory, in
//! [`Phase::HandedOverUnconfirmed`], until somebody says which side has it ([`Attempt::resolve`]). A destination that
//! never saw COMMIT discards everything. Before COMMIT every failure leaves the guest running at the source, its dirty
//! bits rolled back and its logging off.
//!
//! The destination says ALIVE while it prepares, computes a digest or restores, so that the source can tell slow
//! work from a dead peer.
//!
//! A REFUSE may come instead of any reply, with the reason as text. After COMMIT it means that the destination does
//! not run the guest and never will, so the source then does.
//!
//! **What a monitor provides.** The engine knows no KVM and no device. A monitor implements [`SourceGuest`] and
//! [`DestinationGuest`], keeps an [`ept::Tracker`] of dirty pages, and calls [`send`] on one side and [`receive`] on
//! the other, each with a [`Stream`] and an [`Attempt`]. Both functions block until the migration has ended, set their own
//! deadlines ([`Deadlines`]), and turn panics into errors.

mod answers;
mod arbiter;
mod attempt;
mod deadlines;
mod decide;
mod description;
mod destination;
mod digest;
mod guest;
mod header;
mod page_buffer;
mod pages;
mod panic;
mod progress;
mod rates;
mod replies;
mod report;
mod section;
mod source;
mod stream;
mod watchdog;
mod wire;

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use attempt::{Attempt, NotUnconfirmed, Resolved, TooLate};
pub use deadlines::Deadlines;
pub use decide::{Limits, TimeoutStrategy};
pub use description::{Arrival, Description, MemoryRange};
pub use destination::{ReceiveError, ReceiveOptions, Received, receive};
pub use digest::Digest;
pub use guest::{DestinationGuest, GuestError, SourceGuest};
pub use header::STREAM_VERSION;
pub use pages::MemoryAccess;
pub use report::{Phase, Report, Round};
pub use section::{Need, Section, SectionKind, misfits};
pub use source::{DigestCheck, SendError, SendOptions, send};
pub use stream::{EndStream, Halves, MemoryStream, Playback, Recording, Stream, memory_pair};
pub use wire::{Tag, WireError};
