//! Live migration: one guest, carried from a source to a destination while it runs.
//!
//! ```text
//! source                                          destination
//!   │ header (who, what, how much) ────────────────► │ looks at everything that could fail later
//!   │ ◄──────────────────────────── ACCEPT or REFUSE │
//!   │ ZERO PAGES, PAGES … ROUND END ───────────────► │   rounds, while the guest runs
//!   │ ◄─────────────────────────────────── ROUND ACK │
//!   ╞ the guest stops                                │
//!   │ PAGES …, STATE …, FINISH ────────────────────► │ restores, stopped
//!   │ ◄──────────────────────────── READY (digest)   │
//!   │ COMMIT ──────────────────────────────────────► ╞ the guest runs
//!   │ ◄──────────────────────────────────────── DONE │
//! ```
//!
//! **Never two running.** The destination runs the guest only after COMMIT. Once a byte of COMMIT has
//! left, the source never runs it by itself again: if DONE does not come it stays stopped, with its
//! memory, as *handed over, unconfirmed*, until a person says which side has it. A destination that never
//! saw COMMIT discards all it had. Before COMMIT every failure leaves the guest running at the source, its
//! dirty bits rolled back and its logging off.
//!
//! A REFUSE may come instead of any reply, with the reason in words. After COMMIT it is the destination's
//! word that it does not run the guest and never will, so then the source does.
//!
//! The engine knows no device and no KVM: [`guest`] is all it asks of a monitor.

pub mod decide;
pub mod destination;
pub mod digest;
pub mod guest;
pub mod header;
mod page_buffer;
pub mod pages;
pub mod progress;
mod rates;
pub mod replies;
pub mod source;
pub mod transport;
pub mod wire;
