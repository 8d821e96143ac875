//! The source's side of a migration: the phases in order, with one failure arm.

mod error;

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ept::{Epoch, GpaRange, Harvest, Start};
pub use error::SendError;

use crate::attempt::Attempt;
use crate::deadlines::{self, Deadlines};
use crate::decide::{Decision, Limits, Measured, TimeoutStrategy, decide, will_not_converge};
use crate::digest::{self, Digest};
use crate::guest::{GuestError, SourceGuest};
use crate::header;
use crate::pages::PageSender;
use crate::panic::caught;
use crate::rates::Rates;
use crate::replies::{Replies, Reply, ReplyError};
use crate::report::{Phase, Round};
use crate::section::{self, SectionKind};
use crate::stream::{EndStream, Halves, Stream};
use crate::watchdog::Watchdog;
use crate::wire::{CommitError, FINISH_PLAIN, FINISH_WITH_DIGEST, FrameWriter, Tag, WireError};

/// How [`send`] migrates a guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendOptions {
    /// When to pause the guest, and when to give up.
    pub limits: Limits,
    /// Whether source and destination compare a digest of all memory.
    pub digest: DigestCheck,
    /// How long to wait for the destination.
    pub deadlines: Deadlines,
}

/// Whether source and destination compare a digest of all memory before the hand-over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigestCheck {
    /// They compare it while the guest is paused, and a guest whose memory differs is not handed over.
    Compare,
    /// They do not compare it.
    #[default]
    Skip,
}

type Result<T> = std::result::Result<T, SendError>;

fn guest_error(doing: &'static str) -> impl Fn(GuestError) -> SendError {
    move |source| SendError::Guest { doing, source }
}

/// Memory that is cleared in the dirty log at once, before it is sent: a multiple of every slot's alignment.
const CHUNK_BYTES: u64 = 32 << 20;
/// What a switchover takes besides copying and the digest, before one has been measured: pausing vCPUs, saving
/// and restoring state, two messages each way.
const SWITCHOVER_OVERHEAD: Duration = Duration::from_millis(10);
/// Time for the reason of a destination that has ended the stream to arrive.
const REASON_LIMIT: Duration = Duration::from_secs(1);

/// Sends `guest` over `stream` and hands it over. Returns `Ok` when the destination has it; it stays paused here
/// and must not be resumed.
///
/// `attempt` must be new, from [`Attempt::new`]; it is ended before `send` returns. This thread may be blocked
/// for as long as the migration runs.
///
/// # Errors
/// Returns [`SendError`] if the guest was not handed over. It is as it was before (logging and
/// throttling are off, and it runs again if it was paused), except for [`SendError::Unconfirmed`] and
/// [`SendError::Twice`].
pub fn send<G: SourceGuest>(
    guest: &mut G,
    stream: impl Stream,
    options: &SendOptions,
    attempt: &Attempt,
) -> Result<()> {
    attempt.begin_sending().map_err(SendError::AttemptUsed)?;
    let halves = caught(|| stream.split());
    let sent =
        prepared(halves, attempt).and_then(|halves| send_over(guest, halves, options, attempt));
    let (phase, message) = match &sent {
        Ok(()) => (Phase::Completed, None),
        Err(error @ SendError::Cancelled) => (Phase::Cancelled, Some(error.to_string())),
        Err(error) if error.is_in_doubt() => {
            (Phase::HandedOverUnconfirmed, Some(error.to_string()))
        }
        Err(error) => (Phase::Failed, Some(error.to_string())),
    };
    attempt.progress().end(phase, message);
    sent
}

/// Checks the stream that was split, and that the attempt has not been cancelled already.
fn prepared(
    halves: std::result::Result<std::io::Result<Halves>, String>,
    attempt: &Attempt,
) -> Result<Halves> {
    match halves {
        _ if attempt.is_cancelled() => Err(SendError::Cancelled),
        Ok(halves) => halves.map_err(SendError::Stream),
        Err(message) => Err(panicked(attempt, message)),
    }
}

fn panicked(attempt: &Attempt, message: String) -> SendError {
    let phase = attempt.report().phase;
    SendError::Panicked { phase, message }
}

fn send_over<G: SourceGuest>(
    guest: &mut G,
    halves: Halves,
    options: &SendOptions,
    attempt: &Attempt,
) -> Result<()> {
    let end = Arc::clone(&halves.end);
    let mut sender = caught(|| Sender::new(guest, halves, options, attempt))
        .unwrap_or_else(|message| Err(panicked(attempt, message)))?;
    let sent = match caught(|| sender.phases()) {
        Ok(sent) => sent.map_err(|error| sender.explained(error)),
        Err(message) => Err(sender.panicked(message)),
    };
    attempt.arbiter().release();
    // Also ends the thread that reads the replies. A stream that panics here has ended, or never will.
    let _ended = caught(|| end(Shutdown::Both));
    match sent {
        Err(error) if !error.is_in_doubt() => Err(sender.back_to_running(error)),
        sent => sent,
    }
}

struct Sender<'a, G> {
    guest: &'a mut G,
    frames: FrameWriter<Box<dyn Write + Send>>,
    replies: Replies,
    watchdog: Watchdog,
    options: &'a SendOptions,
    attempt: &'a Attempt,
    epoch: Epoch,
    memory: Vec<GpaRange>,
    announced: Vec<SectionKind>,
    pausing: Pausing,
    paused_at: Instant,
    commit: Commit,
    digest_estimate: Duration,
    pages: PageSender,
    last_harvest: Option<Harvest>,
    rates: Rates,
    measured: Option<Measured>,
}

/// Whether the guest has to be resumed if the migration fails.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pausing {
    /// It runs.
    NotBegun,
    /// It is paused, or its `pause` panicked.
    Begun,
}

/// Whether the destination may have COMMIT.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Commit {
    /// No byte of COMMIT has been written.
    NotSent,
    /// A byte of COMMIT may have been written.
    MayHaveLeft,
}

impl<'a, G: SourceGuest> Sender<'a, G> {
    fn new(
        guest: &'a mut G,
        halves: Halves,
        options: &'a SendOptions,
        attempt: &'a Attempt,
    ) -> Result<Self> {
        let epoch = Epoch::begin(guest.tracker(), "migration", Start::Clean)?;
        let Halves {
            reader,
            writer,
            end,
        } = halves;
        let deadlines = &options.deadlines;
        let watchdog =
            Watchdog::start(Arc::clone(&end), deadlines.message).map_err(SendError::Stream)?;
        let frames = FrameWriter::timed(writer, watchdog.writing());
        let replies = Replies::start(reader, watchdog.reading()).map_err(SendError::Stream)?;
        wake_by(attempt, end);
        Ok(Self {
            guest,
            frames,
            replies,
            watchdog,
            options,
            attempt,
            epoch,
            memory: Vec::new(),
            announced: Vec::new(),
            pausing: Pausing::NotBegun,
            paused_at: Instant::now(),
            commit: Commit::NotSent,
            digest_estimate: Duration::ZERO,
            pages: PageSender::default(),
            last_harvest: None,
            rates: Rates::begin(),
            measured: None,
        })
    }

    fn phases(&mut self) -> Result<()> {
        self.agree()?;
        self.rounds()?;
        self.pause()?;
        self.final_round()?;
        self.state()?;
        self.ready()?;
        self.commit()
    }

    /// Describes the guest to the destination, which may refuse it.
    fn agree(&mut self) -> Result<()> {
        self.watchdog
            .begin_phase(Phase::Agreeing, Some(self.options.deadlines.agreeing));
        let description = self
            .guest
            .describe()
            .map_err(guest_error("describing the guest"))?;
        self.memory = description
            .ranges()
            .map_err(|why| guest_error("describing the guest")(why.into()))?;
        self.attempt
            .progress()
            .update(|report| report.memory_bytes = description.memory_bytes());
        header::write(&mut self.frames, &description)?;
        self.announced = description.sections;
        self.replies.expect(Tag::Accept, &self.watchdog)?;
        Ok(())
    }

    /// Sends memory while the guest runs, until what is left fits the downtime.
    fn rounds(&mut self) -> Result<()> {
        let timeout = self.options.limits.timeout;
        let limit = match self.options.limits.strategy {
            TimeoutStrategy::Cancel => Some(timeout),
            TimeoutStrategy::Ignore => None,
        };
        self.enter(Phase::Rounds, limit);
        self.guest
            .start_log()
            .map_err(guest_error("starting the dirty log"))?;
        // After the log has been started: pages that are populated later are in the log.
        let populated = self.populated()?;
        if self.options.digest == DigestCheck::Compare {
            self.digest_estimate = digest::estimate(self.guest.memory(), &populated)?;
        }
        populated.iter().for_each(|range| self.epoch.mark(*range));
        self.rates = Rates::begin();
        loop {
            let harvest = self.harvest()?;
            self.measure(&harvest);
            match self.decide(&harvest) {
                Decision::Round { throttle } => {
                    self.throttle(throttle)?;
                    self.round(harvest)?;
                }
                // The drop of the harvest rolls it back: the final round sends its pages with those that the
                // guest dirties until it is paused.
                Decision::StopAndCopy => return Ok(()),
                Decision::GiveUp(why) => return Err(SendError::GaveUp(why)),
            }
        }
    }

    /// Takes all pages that are dirty now.
    fn harvest(&mut self) -> Result<Harvest> {
        self.guest
            .sync_log()
            .map_err(guest_error("reading the dirty log"))?;
        let ranges = self.memory.iter().copied();
        let span = ranges.reduce(|all, next| all.hull(&next));
        Ok(self.epoch.harvest(span.unwrap_or(GpaRange::ALL))?)
    }

    /// Updates the dirty rate from a harvest of the guest that ran until now.
    fn measure(&mut self, harvest: &Harvest) {
        let Some(rate) = self.rates.harvested(harvest.pages() * ept::PAGE_SIZE) else {
            return;
        };
        self.attempt.progress().update(|report| {
            if let Some(round) = report.rounds.last_mut() {
                round.dirty_bytes_per_s = rate;
            }
        });
    }

    fn decide(&mut self, harvest: &Harvest) -> Decision {
        let measured = self.rates.measured(
            harvest.pages() * ept::PAGE_SIZE,
            // Both sides compute the digest at once and share the memory's bandwidth.
            SWITCHOVER_OVERHEAD + self.digest_estimate * 3 / 2,
        );
        self.attempt
            .progress()
            .update(|report| report.message = will_not_converge(&measured));
        let decision = decide(&measured, &self.options.limits);
        self.measured = Some(measured);
        decision
    }

    fn throttle(&mut self, percent: u32) -> Result<()> {
        if percent != self.rates.throttle {
            self.guest
                .throttle(percent)
                .map_err(guest_error("throttling the guest"))?;
            self.rates.throttle = percent;
            self.attempt
                .progress()
                .update(|report| report.throttle_percent = percent);
        }
        Ok(())
    }

    /// Sends the pages of `harvest` while the guest runs, and waits until they have arrived.
    fn round(&mut self, harvest: Harvest) -> Result<()> {
        let began = Instant::now();
        let before = self.frames.offset();
        self.replies.look_out();
        self.send_pages(&harvest, LogClear::BeforeCopy)?;
        self.frames.frame(Tag::RoundEnd, [&[], &[]])?;
        self.replies.expect(Tag::RoundAck, &self.watchdog)?;
        harvest.commit();
        let took = began.elapsed();
        let bytes = self.frames.offset() - before;
        self.rates.sent(bytes, took);
        self.end_round(took, bytes);
        Ok(())
    }

    fn send_pages(&mut self, harvest: &Harvest, clear: LogClear) -> Result<()> {
        self.pages.pages = 0;
        self.pages.zero_pages = 0;
        let due = harvest.pages();
        self.attempt
            .progress()
            .update(|report| (report.round_pages, report.round_pages_sent) = (due, 0));
        for chunk in chunks(&self.memory) {
            let dirty: Vec<u64> = harvest.words_in(chunk).collect();
            if dirty.iter().all(|word| *word == 0) {
                continue;
            }
            self.check_for_end()?;
            if clear == LogClear::BeforeCopy {
                self.guest
                    .clear_log(chunk, &dirty)
                    .map_err(guest_error("clearing the dirty log"))?;
            }
            for run in harvest.runs_in(chunk) {
                self.pages
                    .send(self.guest.memory(), run, &mut self.frames)?;
            }
            // Every chunk ends with a write, so that the destination does not wait for pages that are held back.
            self.pages.flush(&mut self.frames)?;
            let (sent, bytes) = (self.pages.pages, self.frames.offset());
            self.attempt
                .progress()
                .update(|report| (report.round_pages_sent, report.bytes_sent) = (sent, bytes));
        }
        Ok(())
    }

    /// Pauses the guest: nothing writes to memory any more.
    fn pause(&mut self) -> Result<()> {
        // The limit of the rounds is over: the decision to pause was made within it.
        self.watchdog.begin_phase(Phase::Switchover, None);
        self.check_for_end()?;
        self.enter(Phase::Switchover, None);
        self.paused_at = Instant::now();
        self.pausing = Pausing::Begun;
        self.guest.pause().map_err(|error| {
            self.pausing = Pausing::NotBegun;
            guest_error("pausing the guest")(error)
        })?;
        let pause = millis(self.paused_at.elapsed());
        self.attempt
            .progress()
            .update(|report| report.pause_ms = pause);
        Ok(())
    }

    /// Sends the pages that are left. Their harvest is committed when the destination has the guest.
    fn final_round(&mut self) -> Result<()> {
        let harvest = self.harvest()?;
        let began = Instant::now();
        let before = self.frames.offset();
        // A short round is over before a refusal could be seen.
        if harvest.pages() * ept::PAGE_SIZE > CHUNK_BYTES {
            self.replies.look_out();
        }
        self.send_pages(&harvest, LogClear::NotNeeded)?;
        let bytes = self.frames.offset() - before;
        self.end_round(began.elapsed(), bytes);
        self.last_harvest = Some(harvest);
        Ok(())
    }

    /// Sends the state of devices and vCPUs.
    fn state(&mut self) -> Result<()> {
        let saving = guest_error("saving the guest's state");
        let sections = self.guest.save().map_err(&saving)?;
        section::check_complete(&self.announced, &sections).map_err(|why| saving(why.into()))?;
        for section in sections {
            let kind = section::encode_kind(&section.kind).map_err(|why| SendError::Guest {
                doing: "encoding the guest's state",
                source: why.into(),
            })?;
            self.frames.frame(Tag::State, [&kind, &section.data])?;
        }
        Ok(())
    }

    /// Waits until the destination could run the guest, and compares digests if that was asked for.
    fn ready(&mut self) -> Result<()> {
        let compare = self.options.digest == DigestCheck::Compare;
        let finish = match compare {
            true => FINISH_WITH_DIGEST,
            false => FINISH_PLAIN,
        };
        self.frames.frame(Tag::Finish, [&[finish], &[]])?;
        let digests = self.digest_estimate.saturating_mul(4);
        let limit = self.options.deadlines.ready.saturating_add(digests);
        self.watchdog.begin_phase(Phase::Switchover, Some(limit));
        let here = if compare { Some(self.digest()?) } else { None };
        let there = self.replies.expect(Tag::Ready, &self.watchdog)?;
        self.watchdog.begin_phase(Phase::Switchover, None);
        let Some(source_digest) = here else {
            return Ok(());
        };
        let Reply { head, payload } = there;
        let digest = payload.as_slice().try_into().map_err(|_| {
            head.malformed(format!("a digest of {} bytes, 16 are due", payload.len()))
        })?;
        let destination_digest = Digest(u128::from_le_bytes(digest));
        if source_digest != destination_digest {
            return Err(SendError::DigestsDiffer {
                source_digest,
                destination_digest,
            });
        }
        self.attempt
            .progress()
            .update(|report| report.digest = Some(source_digest.to_string()));
        Ok(())
    }

    fn digest(&mut self) -> Result<Digest> {
        let began = Instant::now();
        let populated = self.populated()?;
        let digest = digest::of_memory(self.guest.memory(), &populated)?;
        let took = millis(began.elapsed());
        self.attempt
            .progress()
            .update(|report| report.digest_ms = took);
        Ok(digest)
    }

    /// Hands the guest over. From here on the source never runs it again, unless the destination says that it does
    /// not run there, or the user does.
    fn commit(&mut self) -> Result<()> {
        if !self.attempt.arbiter().commit() {
            return Err(SendError::Cancelled);
        }
        self.enter(Phase::Committed, None);
        self.commit = Commit::MayHaveLeft;
        match self.frames.commit() {
            Ok(()) => {}
            Err(CommitError::InDoubt(error)) => {
                return Err(SendError::Unconfirmed(error.to_string()));
            }
            Err(CommitError::NothingSent(error)) => {
                self.commit = Commit::NotSent;
                return Err(SendError::Wire(error));
            }
        }
        match self.replies.expect(Tag::Done, &self.watchdog) {
            Ok(_) => {}
            // The destination says itself that it does not run the guest and never will.
            Err(ReplyError::Refused(reason)) => return Err(SendError::Refused(reason)),
            Err(ReplyError::Wire(error)) => return Err(SendError::Unconfirmed(error.to_string())),
        }
        if let Some(harvest) = self.last_harvest.take() {
            harvest.commit();
        }
        let downtime = millis(self.paused_at.elapsed());
        let bytes = self.frames.offset();
        self.attempt
            .progress()
            .update(|report| (report.downtime_ms, report.bytes_sent) = (downtime, bytes));
        Ok(())
    }

    /// Returns the error that a failed phase means for the user.
    fn explained(&mut self, error: SendError) -> SendError {
        let SendError::Wire(wire) = error else {
            return error;
        };
        // The cancel ended the stream.
        if self.attempt.is_cancelled() {
            return SendError::Cancelled;
        }
        match wire {
            WireError::PhaseTooLong {
                phase: Phase::Rounds,
                limit,
                ..
            } => {
                let why = self.measured.as_ref().and_then(will_not_converge);
                SendError::GaveUp(why.unwrap_or_else(|| {
                    format!("the rounds took longer than {}", deadlines::text(limit))
                }))
            }
            WireError::Io { .. } | WireError::NotTaken { .. } => {
                // A destination that took too long has said why by now, if it says so at all.
                let limit = match wire {
                    WireError::Io { .. } => REASON_LIMIT,
                    _ => Duration::ZERO,
                };
                match self.replies.reason_of_end(limit) {
                    Some(reason) => SendError::Refused(reason),
                    None => SendError::Wire(wire),
                }
            }
            wire => SendError::Wire(wire),
        }
    }

    fn panicked(&self, message: String) -> SendError {
        match self.commit {
            Commit::NotSent => panicked(self.attempt, message),
            Commit::MayHaveLeft => SendError::Unconfirmed(format!("a panic: {message}")),
        }
    }

    /// The failure arm: puts the guest back as it was. Returns `error`, and what failed meanwhile.
    fn back_to_running(&mut self, error: SendError) -> SendError {
        // Rolls the harvest back. Those of the rounds have rolled back when they were dropped.
        drop(self.last_harvest.take());
        let stopped = self.in_failure_arm("stopping the dirty log", SourceGuest::stop_log);
        let resumed = match self.pausing {
            Pausing::Begun => self.in_failure_arm("resuming the guest", SourceGuest::resume),
            Pausing::NotBegun => Ok(()),
        };
        // A guest that does not run is worse than a log that is still on.
        match resumed.and(stopped) {
            Ok(()) => error,
            Err(second) => SendError::Twice {
                first: Box::new(error),
                second: Box::new(second),
            },
        }
    }

    fn in_failure_arm(
        &mut self,
        doing: &'static str,
        call: impl FnOnce(&mut G) -> std::result::Result<(), GuestError>,
    ) -> Result<()> {
        match caught(|| call(self.guest)) {
            Ok(called) => called.map_err(guest_error(doing)),
            Err(message) => Err(guest_error(doing)(format!("a panic: {message}").into())),
        }
    }

    /// Looks between two chunks whether the migration was cancelled, has taken too long or was refused.
    fn check_for_end(&mut self) -> Result<()> {
        if self.attempt.is_cancelled() {
            return Err(SendError::Cancelled);
        }
        if let Some(expired) = self.watchdog.expired_phase() {
            return Err(WireError::not_sent("the end of the round", expired).into());
        }
        Ok(self.replies.check_for_refusal()?)
    }

    fn populated(&self) -> Result<Vec<GpaRange>> {
        let finding = guest_error("finding populated memory");
        let populated = self.guest.populated().map_err(&finding)?;
        check_populated(&populated, &self.memory).map_err(|why| finding(why.into()))?;
        Ok(populated)
    }

    fn enter(&self, phase: Phase, limit: Option<Duration>) {
        self.watchdog.begin_phase(phase, limit);
        self.attempt.progress().enter(phase);
    }

    fn end_round(&self, took: Duration, bytes: u64) {
        let (pages, zero_pages) = (self.pages.pages, self.pages.zero_pages);
        let round = Round {
            pages,
            zero_pages,
            bytes,
            ms: millis(took),
            dirty_bytes_per_s: 0.0,
        };
        let total = self.frames.offset();
        self.attempt.progress().update(|report| {
            report.rounds.push(round);
            report.bytes_sent = total;
        });
    }
}

/// Whether the dirty log of a chunk is cleared before the chunk is copied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LogClear {
    /// It is, because the guest runs: its writes after the copy must be logged again.
    BeforeCopy,
    /// It is not, because the guest is paused.
    NotNeeded,
}

/// Registers that a cancel ends the stream in both directions.
fn wake_by(attempt: &Attempt, end: EndStream) {
    attempt.arbiter().on_cancel(move || end(Shutdown::Both));
}

/// Splits memory into pieces of [`CHUNK_BYTES`], none across the end of a range.
fn chunks(memory: &[GpaRange]) -> Vec<GpaRange> {
    const CHUNK_PAGES: u64 = CHUNK_BYTES / ept::PAGE_SIZE;
    let of_range = |range: &GpaRange| {
        let (first, end) = (range.first_page(), range.end_page());
        (first..end)
            .step_by(usize::try_from(CHUNK_PAGES).unwrap_or(usize::MAX))
            .filter_map(move |at| GpaRange::from_pages(at, CHUNK_PAGES.min(end - at)).ok())
    };
    memory.iter().flat_map(of_range).collect()
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
/// Checks that `populated` is ascending and disjoint, and lies in `memory`.
fn check_populated(populated: &[GpaRange], memory: &[GpaRange]) -> std::result::Result<(), String> {
    for (index, range) in populated.iter().enumerate() {
        let before = index.checked_sub(1).map(|before| populated[before]);
        if before.is_some_and(|before| before.end_page() > range.first_page()) {
            return Err(format!("{range:?} is not above the range before it"));
        }
        if !memory.iter().any(|part| part.covers(range)) {
            return Err(format!("{range:?} is not in guest memory"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn populated_ranges_must_be_in_order_and_in_memory() {
        let range = |first, pages| GpaRange::from_pages(first, pages).unwrap();
        let memory = [range(0, 16), range(32, 16)];
        check_populated(&[], &memory).unwrap();
        check_populated(&[range(0, 4), range(4, 2), range(32, 16)], &memory).unwrap();
        for (populated, why) in [
            ([range(8, 4), range(4, 2)], "not above"),
            ([range(0, 4), range(3, 2)], "not above"),
            ([range(0, 4), range(14, 4)], "not in guest memory"),
        ] {
            let error = check_populated(&populated, &memory).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
