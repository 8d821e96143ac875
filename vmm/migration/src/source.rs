//! The source's side of a migration: the phases, in order, with one failure arm.

use std::time::{Duration, Instant};

use ept::{Epoch, GpaRange, Harvest, Start};

use super::decide::{Decision, Limits, decide, will_not_converge};
use super::digest::{self, Digest};
use super::guest::{GuestError, SourceGuest};
use super::header;
use super::pages::{MemoryAccess, PageSender, SendPagesError};
use super::progress::{Phase, Progress, Round};
use super::rates::Rates;
use super::replies::{Replies, ReplyError};
use super::transport::Connection;
use super::wire::{FrameWriter, Tag, WireError};

/// What the user wants of a migration.
#[derive(Clone, Copy, Debug)]
pub struct SendOptions {
    /// When to stop the guest, and when to give up.
    pub limits: Limits,
    /// Whether the digest of all memory is compared before the guest is handed over.
    pub digest: DigestCheck,
}

/// Whether the digest of all memory is compared at the switchover, within the downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestCheck {
    /// It is, and a guest whose memory differs is not handed over.
    Compare,
    /// It is not.
    Skip,
}

/// Why a guest was not handed over. In every case but [`SendError::Unconfirmed`] it runs on at the
/// source.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The destination said no.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// The connection failed, or what came over it.
    #[error("the connection failed: {0}")]
    Wire(#[from] WireError),
    /// The monitor could not do its part.
    #[error("{doing}: {source}")]
    Guest {
        /// Its part.
        doing: &'static str,
        /// Why not.
        source: GuestError,
    },
    /// Guest memory is not where it should be.
    #[error(transparent)]
    Memory(#[from] MemoryAccess),
    /// The tracker has no room for one more consumer.
    #[error("dirty tracking: {0}")]
    Epoch(#[from] ept::EpochError),
    /// There is no memory to record what is dirty.
    #[error("dirty tracking: {0}")]
    Harvest(#[from] ept::HarvestError),
    /// The user cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// It did not converge in the user's time.
    #[error("gave up: {0}")]
    GaveUp(String),
    /// Source and destination hold different memory.
    #[error("the digests of memory differ: {source_digest} here, {destination_digest} there")]
    DigestsDiffer {
        /// Here.
        source_digest: Digest,
        /// There.
        destination_digest: Digest,
    },
    /// It failed, and then the guest could not be put back as it was.
    #[error("{first}; and after that: {second}")]
    Twice {
        /// Why it failed.
        first: Box<SendError>,
        /// What went wrong afterwards.
        second: Box<SendError>,
    },
    /// COMMIT was sent, its confirmation was lost: the guest may run there, and is stopped here.
    #[error(
        "COMMIT was sent and its confirmation was lost ({0}): the guest stays stopped here; find out \
         whether it runs there, then say so with migration-resolve; a destination that does not answer may \
         still run it: end its process before you resume"
    )]
    Unconfirmed(String),
}

impl From<SendPagesError> for SendError {
    fn from(error: SendPagesError) -> Self {
        match error {
            SendPagesError::Wire(error) => Self::Wire(error),
            SendPagesError::Memory(error) => Self::Memory(error),
        }
    }
}

impl From<ReplyError> for SendError {
    fn from(error: ReplyError) -> Self {
        match error {
            ReplyError::Refused(reason) => Self::Refused(reason),
            ReplyError::Wire(error) => Self::Wire(error),
        }
    }
}

type Result<T> = std::result::Result<T, SendError>;

fn guest_error(doing: &'static str) -> impl Fn(GuestError) -> SendError {
    move |source| SendError::Guest { doing, source }
}

/// How much memory is cleared in the log at once, before it is sent: a multiple of every slot's alignment.
const CHUNK_BYTES: u64 = 32 << 20;
/// What a switchover takes besides copying and the digest, until one has been measured: stopping vCPUs,
/// saving and restoring state, two messages each way.
const SWITCHOVER_OVERHEAD: Duration = Duration::from_millis(10);

/// How long a stopped guest waits for the destination, digest apart, however often that says that it is
/// still at work.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// Sends `guest` over `connection`. Returns when the other side runs it.
///
/// # Errors
/// Why it was not handed over: except for [`SendError::Unconfirmed`] the guest is as before, its logging
/// off and its dirty bits back in place.
pub fn send<G: SourceGuest>(
    guest: &mut G,
    connection: Connection,
    options: &SendOptions,
    progress: &Progress,
) -> Result<()> {
    let mut sender = Sender::new(guest, connection, options, progress)?;
    let sent = sender.phases().map_err(|error| match error {
        // The cancellation ended the connection under whoever waited for it.
        SendError::Wire(_) if progress.is_cancelled() => SendError::Cancelled,
        other => other,
    });
    progress.drop_connection();
    match sent {
        Ok(()) | Err(SendError::Unconfirmed(_)) => sent,
        Err(error) => {
            // The harvests have rolled back when they were dropped.
            if let Err(second) = sender.back_to_running() {
                return Err(SendError::Twice {
                    first: Box::new(error),
                    second: Box::new(second),
                });
            }
            Err(error)
        }
    }
}

struct Sender<'a, G> {
    guest: &'a mut G,
    frames: FrameWriter<Connection>,
    replies: Replies,
    options: &'a SendOptions,
    progress: &'a Progress,
    epoch: Epoch,
    memory: Vec<GpaRange>,
    paused: bool,
    paused_at: Instant,
    digest_estimate: Duration,
    pages: PageSender,
    last_harvest: Option<Harvest>,
    rates: Rates,
}

impl<'a, G: SourceGuest> Sender<'a, G> {
    fn new(
        guest: &'a mut G,
        connection: Connection,
        options: &'a SendOptions,
        progress: &'a Progress,
    ) -> Result<Self> {
        let epoch = Epoch::begin(guest.tracker(), "migration", Start::Clean)?;
        let on_cancel = connection.try_clone().map_err(connection_error)?;
        progress.use_connection(on_cancel);
        let replies = connection
            .try_clone()
            .and_then(Replies::new)
            .map_err(connection_error)?;
        let now = Instant::now();
        Ok(Self {
            guest,
            frames: FrameWriter::new(connection),
            replies,
            options,
            progress,
            epoch,
            memory: Vec::new(),
            paused: false,
            paused_at: now,
            digest_estimate: Duration::ZERO,
            pages: PageSender::default(),
            last_harvest: None,
            rates: Rates::begin(),
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

    /// Tells the destination what would come, and lets it refuse.
    fn agree(&mut self) -> Result<()> {
        self.enter(Phase::Agreeing);
        let description = self
            .guest
            .describe()
            .map_err(guest_error("describing the guest"))?;
        self.memory = description
            .ranges()
            .map_err(|why| SendError::Wire(WireError::Header(why)))?;
        self.progress
            .update(|p| p.memory_bytes = description.memory_bytes());
        header::write(&mut self.frames, &description)?;
        self.replies
            .expect(Tag::Accept, "the destination's answer")?;
        Ok(())
    }

    /// Sends memory while the guest runs, until the rest is small enough.
    fn rounds(&mut self) -> Result<()> {
        self.enter(Phase::Rounds);
        self.guest
            .start_log()
            .map_err(guest_error("starting the dirty log"))?;
        // After the log has begun: a page that is populated later is in the log.
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
                // What was just taken goes back, and out again with what the guest dirties until it
                // stops.
                Decision::StopAndCopy => return Ok(()),
                Decision::GiveUp(why) => return Err(SendError::GaveUp(why)),
            }
        }
    }

    /// All that is dirty now.
    fn harvest(&mut self) -> Result<Harvest> {
        self.guest
            .sync_log()
            .map_err(guest_error("reading the dirty log"))?;
        let ranges = self.memory.iter().copied();
        let span = ranges.reduce(|all, next| all.hull(&next));
        Ok(self.epoch.harvest(span.unwrap_or(GpaRange::ALL))?)
    }

    /// What a harvest says about the guest that ran until now.
    fn measure(&mut self, harvest: &Harvest) {
        let Some(rate) = self.rates.harvested(harvest.pages() * ept::PAGE_SIZE) else {
            return;
        };
        self.progress.update(|p| {
            if let Some(round) = p.rounds.last_mut() {
                round.dirty_bytes_per_s = rate;
            }
        });
    }

    fn decide(&self, harvest: &Harvest) -> Decision {
        let measured = self.rates.measured(
            harvest.pages() * ept::PAGE_SIZE,
            // Both sides take the digest at once, and share what the memory can deliver.
            SWITCHOVER_OVERHEAD + self.digest_estimate * 3 / 2,
        );
        self.progress
            .update(|p| p.message = will_not_converge(&measured));
        decide(&measured, &self.options.limits)
    }

    fn throttle(&mut self, percent: u32) -> Result<()> {
        if percent != self.rates.throttle {
            self.guest
                .throttle(percent)
                .map_err(guest_error("throttling the guest"))?;
            self.rates.throttle = percent;
            self.progress.update(|p| p.throttle_percent = percent);
        }
        Ok(())
    }

    /// Sends the pages of `harvest` while the guest runs, and waits until they have arrived.
    fn round(&mut self, harvest: Harvest) -> Result<()> {
        let began = Instant::now();
        let before = self.frames.offset();
        self.send_pages(&harvest, LogClear::BeforeCopy)?;
        self.frames.frame(Tag::RoundEnd, [&[], &[]])?;
        self.replies.expect(Tag::RoundAck, "the end of the round")?;
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
        self.progress
            .update(|p| (p.round_pages, p.round_pages_sent) = (due, 0));
        for chunk in chunks(&self.memory) {
            let dirty: Vec<u64> = harvest.words_in(chunk).collect();
            if dirty.iter().all(|word| *word == 0) {
                continue;
            }
            self.look_up()?;
            if clear == LogClear::BeforeCopy {
                self.guest
                    .clear_log(chunk, &dirty)
                    .map_err(guest_error("clearing the dirty log"))?;
            }
            for run in harvest.runs_in(chunk) {
                self.pages
                    .send(self.guest.memory(), run, &mut self.frames)?;
            }
            // At the end of each chunk something leaves, so that the destination is never left waiting.
            self.pages.flush(&mut self.frames)?;
            let (sent, bytes) = (self.pages.pages, self.frames.offset());
            self.progress
                .update(|p| (p.round_pages_sent, p.bytes_sent) = (sent, bytes));
        }
        Ok(())
    }

    /// Stops everything that writes to memory.
    fn pause(&mut self) -> Result<()> {
        self.look_up()?;
        self.enter(Phase::Switchover);
        self.paused_at = Instant::now();
        self.guest
            .pause()
            .map_err(guest_error("pausing the guest"))?;
        self.paused = true;
        let pause = millis(self.paused_at.elapsed());
        self.progress.update(|p| p.pause_ms = pause);
        Ok(())
    }

    /// Sends what is left. It stays a transaction until the destination runs the guest.
    fn final_round(&mut self) -> Result<()> {
        let harvest = self.harvest()?;
        let began = Instant::now();
        let before = self.frames.offset();
        self.send_pages(&harvest, LogClear::NotNeeded)?;
        let bytes = self.frames.offset() - before;
        self.end_round(began.elapsed(), bytes);
        self.last_harvest = Some(harvest);
        Ok(())
    }

    /// Sends the state of devices and vCPUs.
    fn state(&mut self) -> Result<()> {
        for section in self
            .guest
            .save()
            .map_err(guest_error("saving the guest's state"))?
        {
            let kind = postcard::to_stdvec(&section.kind).map_err(|source| SendError::Guest {
                doing: "encoding state",
                source: source.into(),
            })?;
            self.frames.frame(Tag::State, [&kind, &section.data])?;
        }
        Ok(())
    }

    /// Waits until the destination could run the guest, and compares memory if that was asked for.
    fn ready(&mut self) -> Result<()> {
        let compare = self.options.digest == DigestCheck::Compare;
        self.frames
            .frame(Tag::Finish, [&[u8::from(compare)], &[]])?;
        let here = if compare { Some(self.digest()?) } else { None };
        let there = self.replies.expect_within(
            Tag::Ready,
            "the destination to be ready",
            READY_LIMIT + self.digest_estimate * 4,
        )?;
        let Some(source_digest) = here else {
            return Ok(());
        };
        let there: [u8; 16] = there.as_slice().try_into().map_err(|_| {
            WireError::Header(format!("a digest of {} bytes, 16 are due", there.len()))
        })?;
        let destination_digest = Digest(u128::from_le_bytes(there));
        if source_digest != destination_digest {
            return Err(SendError::DigestsDiffer {
                source_digest,
                destination_digest,
            });
        }
        self.progress
            .update(|p| p.digest = Some(source_digest.to_string()));
        Ok(())
    }

    fn digest(&mut self) -> Result<Digest> {
        let began = Instant::now();
        let populated = self.populated()?;
        let digest = digest::of_memory::<_, SendError>(self.guest.memory(), &populated, || Ok(()))?;
        let took = millis(began.elapsed());
        self.progress.update(|p| p.digest_ms = took);
        Ok(digest)
    }

    /// Gives the guest away. From here on it is never run again without the destination's word that it
    /// does not run there, or the user's.
    fn commit(&mut self) -> Result<()> {
        if !self.progress.commit() {
            return Err(SendError::Cancelled);
        }
        if let Err((in_doubt, error)) = self.frames.commit() {
            return Err(match in_doubt {
                true => SendError::Unconfirmed(error.to_string()),
                false => SendError::Wire(error),
            });
        }
        match self
            .replies
            .expect(Tag::Done, "the destination's confirmation")
        {
            Ok(_) => {}
            // The destination's own word that it does not and will not run the guest.
            Err(ReplyError::Refused(reason)) => return Err(SendError::Refused(reason)),
            Err(ReplyError::Wire(error)) => return Err(SendError::Unconfirmed(error.to_string())),
        }
        if let Some(harvest) = self.last_harvest.take() {
            harvest.commit();
        }
        let downtime = millis(self.paused_at.elapsed());
        let bytes = self.frames.offset();
        self.progress
            .update(|p| (p.downtime_ms, p.bytes_sent) = (downtime, bytes));
        Ok(())
    }

    /// The failure arm: the guest as it was.
    fn back_to_running(&mut self) -> Result<()> {
        let logging = self
            .guest
            .stop_log()
            .map_err(guest_error("stopping the dirty log"));
        if self.paused {
            self.guest
                .resume()
                .map_err(guest_error("resuming the guest"))?;
        }
        logging
    }

    /// Between two chunks: was it cancelled, has the destination given up?
    fn look_up(&mut self) -> Result<()> {
        if self.progress.is_cancelled() {
            return Err(SendError::Cancelled);
        }
        Ok(self.replies.check_for_refusal()?)
    }

    fn populated(&self) -> Result<Vec<GpaRange>> {
        self.guest
            .populated()
            .map_err(guest_error("finding populated memory"))
    }

    fn enter(&self, phase: Phase) {
        self.progress.update(|p| p.phase = phase);
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
        self.progress.update(|p| {
            p.rounds.push(round);
            p.bytes_sent = total;
        });
    }
}

/// Whether the log of a chunk is cleared before the chunk is copied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LogClear {
    /// The guest runs: what it writes from now on must be logged again.
    BeforeCopy,
    /// The guest is stopped.
    NotNeeded,
}

/// Memory in pieces of [`CHUNK_BYTES`], none across the end of a range.
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

fn connection_error(source: std::io::Error) -> WireError {
    WireError::Io {
        doing: "preparing the connection".into(),
        offset: 0,
        source,
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
