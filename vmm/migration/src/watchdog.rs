//! Ends a stream half when the message or the phase that waits for it takes too long.
//!
//! The thread that sends or receives only counts: one relaxed store when a message begins and one when it ends,
//! without a look at the clock, because a frame of 64 KiB takes only tens of microseconds. The watchdog's thread
//! looks at the counters several times within the limit. A counter that still stands in the same message
//! after the limit means that the message is late.

use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

use crate::panic::caught;
use crate::report::Phase;
use crate::stream::EndStream;

/// How often the counters are looked at within the limit of a message, and the longest time between two looks.
const LOOKS: u32 = 16;
const LONGEST_PERIOD: Duration = Duration::from_millis(250);

/// Supervises one stream. Dropping it ends its thread.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
}

struct Shared {
    message_limit: Duration,
    end: EndStream,
    reading: Direction,
    writing: Direction,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    phase: Option<PhaseLimit>,
    stopped: bool,
}

#[derive(Clone, Copy)]
struct PhaseLimit {
    phase: Phase,
    limit: Duration,
    until: Instant,
}

/// One direction of the stream.
#[derive(Default)]
struct Direction {
    /// Counts beginnings and ends of messages: odd while one is under way.
    count: AtomicU64,
    expired: OnceLock<Expired>,
}

/// The limit that passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expired {
    /// The limit of a message.
    Message(Duration),
    /// The limit of a phase.
    Phase(Phase, Duration),
}

impl Watchdog {
    /// Starts to supervise a stream, of which `end` ends the halves.
    ///
    /// # Errors
    /// Returns the system's error if no thread can be started.
    pub(crate) fn start(end: EndStream, message_limit: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            message_limit,
            end,
            reading: Direction::default(),
            writing: Direction::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let supervisor = Arc::clone(&shared);
        thread::Builder::new()
            .name("migr-deadlines".into())
            .spawn(move || supervisor.run())?;
        Ok(Self { shared })
    }

    /// Returns the timer of messages that are read.
    pub(crate) fn reading(&self) -> Timer {
        Timer(Some((Arc::clone(&self.shared), Shutdown::Read)))
    }

    /// Returns the timer of messages that are written.
    pub(crate) fn writing(&self) -> Timer {
        Timer(Some((Arc::clone(&self.shared), Shutdown::Write)))
    }

    /// Begins `phase`, which may take as long as `limit` says, in the place of the phase before it.
    pub(crate) fn begin_phase(&self, phase: Phase, limit: Option<Duration>) {
        let until = limit.and_then(|limit| Some((limit, Instant::now().checked_add(limit)?)));
        self.shared.lock().phase = until.map(|(limit, until)| PhaseLimit {
            phase,
            limit,
            until,
        });
        self.shared.changed.notify_all();
    }

    /// Returns the phase's limit if it has passed.
    pub(crate) fn expired_phase(&self) -> Option<Expired> {
        let phase = self.shared.lock().phase?;
        (phase.until <= Instant::now()).then_some(Expired::Phase(phase.phase, phase.limit))
    }

    /// Returns how long a message that begins now may take, and the limit that passes then.
    pub(crate) fn next_limit(&self) -> (Duration, Expired) {
        let message = self.shared.message_limit;
        if let Some(PhaseLimit {
            phase,
            limit,
            until,
        }) = self.shared.lock().phase
        {
            let left = until.saturating_duration_since(Instant::now());
            if left < message {
                return (left, Expired::Phase(phase, limit));
            }
        }
        (message, Expired::Message(message))
    }

    /// Returns true if the current phase has a limit.
    pub(crate) fn limits_phase(&self) -> bool {
        self.shared.lock().phase.is_some()
    }

    /// Returns a function that wakes whoever waits for the other side, but lets it be told the reason: reading
    /// ends, writing only if it is blocked now.
    pub(crate) fn interrupt(&self) -> impl FnOnce() + Send + 'static {
        let shared = Arc::clone(&self.shared);
        move || {
            (shared.end)(Shutdown::Read);
            if is_under_way(shared.writing.count.load(Ordering::Relaxed)) {
                (shared.end)(Shutdown::Write);
            }
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchdog").finish_non_exhaustive()
    }
}

impl Shared {
    fn run(&self) {
        let period = (self.message_limit / LOOKS).clamp(Duration::from_millis(1), LONGEST_PERIOD);
        let mut observed = [Observed::default(); 2];
        let mut state = self.lock();
        while !state.stopped {
            let (now, phase) = (Instant::now(), state.phase);
            // `end` is the embedder's function: it is called without the lock.
            drop(state);
            let directions = [
                (&self.reading, Shutdown::Read),
                (&self.writing, Shutdown::Write),
            ];
            for ((direction, half), observed) in directions.into_iter().zip(&mut observed) {
                if let Some(expired) = observed.look(direction, now, self.message_limit, phase) {
                    // Only the first one counts.
                    let _already = direction.expired.set(expired);
                    // A panic of the embedder's function must not end the supervision.
                    let _panicked = caught(|| (self.end)(half));
                }
            }
            state = self.lock();
            let wait = phase.map_or(period, |phase| {
                match phase.until.saturating_duration_since(now) {
                    Duration::ZERO => period,
                    left => left.min(period),
                }
            });
            if !state.stopped {
                state = self
                    .changed
                    .wait_timeout(state, wait)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Both fields are replaced as a whole, so a panic of another thread leaves nothing half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The counter of a direction as the watchdog saw it change last.
#[derive(Clone, Copy, Default)]
struct Observed {
    count: u64,
    since: Option<Instant>,
}

impl Observed {
    /// Returns the limit that the message under way exceeds.
    fn look(
        &mut self,
        direction: &Direction,
        now: Instant,
        message_limit: Duration,
        phase: Option<PhaseLimit>,
    ) -> Option<Expired> {
        let count = direction.count.load(Ordering::Relaxed);
        if count != self.count || self.since.is_none() {
            *self = Self {
                count,
                since: Some(now),
            };
        }
        if !is_under_way(count) || direction.expired.get().is_some() {
            return None;
        }
        if let Some(PhaseLimit {
            phase,
            limit,
            until,
        }) = phase
            && until <= now
        {
            return Some(Expired::Phase(phase, limit));
        }
        let waited = now.saturating_duration_since(self.since?);
        (waited >= message_limit).then_some(Expired::Message(message_limit))
    }
}

fn is_under_way(count: u64) -> bool {
    count % 2 == 1
}

/// Tells the watchdog when the messages of one direction begin and end. The default one tells nobody.
#[derive(Default)]
pub(crate) struct Timer(Option<(Arc<Shared>, Shutdown)>);

impl Timer {
    /// Starts the deadline of a message.
    pub(crate) fn begin(&self) {
        self.count(1);
    }

    /// Stops the deadline of the current message.
    pub(crate) fn end(&self) {
        self.count(0);
    }

    /// Makes the counter even or odd. Only this thread changes it, so that it need not be read and changed at once.
    fn count(&self, parity: u64) {
        if let Some(direction) = self.direction() {
            let count = direction.count.load(Ordering::Relaxed);
            let next = count.wrapping_add(1);
            let next = next.wrapping_add(u64::from(next % 2 != parity));
            direction.count.store(next, Ordering::Relaxed);
        }
    }

    /// Returns the limit for which the watchdog has ended this direction.
    pub(crate) fn expired(&self) -> Option<Expired> {
        self.direction()?.expired.get().copied()
    }

    fn direction(&self) -> Option<&Direction> {
        let (shared, half) = self.0.as_ref()?;
        Some(match half {
            Shutdown::Write => &shared.writing,
            Shutdown::Read | Shutdown::Both => &shared.reading,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(40);
    /// Far beyond every limit here.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn watchdog() -> (Watchdog, mpsc::Receiver<Shutdown>) {
        let (sender, ended) = mpsc::channel();
        let end: EndStream = Arc::new(move |half| {
            let _gone = sender.send(half);
        });
        (Watchdog::start(end, LIMIT).unwrap(), ended)
    }

    #[test]
    fn a_late_message_ends_its_own_direction_once() {
        for half in [Shutdown::Read, Shutdown::Write] {
            let (watchdog, ended) = watchdog();
            let (timer, other) = match half {
                Shutdown::Read => (watchdog.reading(), watchdog.writing()),
                _ => (watchdog.writing(), watchdog.reading()),
            };
            timer.begin();
            assert_eq!(ended.recv_timeout(PATIENCE), Ok(half));
            assert_eq!(timer.expired(), Some(Expired::Message(LIMIT)));
            assert_eq!(other.expired(), None);
            ended.recv_timeout(LIMIT * 3).unwrap_err();
        }
    }

    #[test]
    fn a_late_phase_ends_the_message_under_way_and_no_direction_that_rests() {
        let (watchdog, ended) = watchdog();
        watchdog.begin_phase(Phase::Agreeing, Some(Duration::from_millis(1)));
        ended.recv_timeout(LIMIT * 3).unwrap_err();
        let limit = Expired::Phase(Phase::Agreeing, Duration::from_millis(1));
        assert_eq!(watchdog.expired_phase(), Some(limit));
        assert_eq!(watchdog.next_limit(), (Duration::ZERO, limit));
        let timer = watchdog.writing();
        timer.begin();
        assert_eq!(ended.recv_timeout(PATIENCE), Ok(Shutdown::Write));
        assert_eq!(timer.expired(), Some(limit));
        watchdog.begin_phase(Phase::Rounds, None);
        assert_eq!(watchdog.expired_phase(), None);
    }

    #[test]
    fn an_interruption_ends_writing_only_where_it_blocks() {
        let (watchdog, ended) = watchdog();
        watchdog.interrupt()();
        assert_eq!(ended.try_iter().collect::<Vec<_>>(), [Shutdown::Read]);
        watchdog.writing().begin();
        watchdog.interrupt()();
        assert_eq!(
            ended.try_iter().take(2).collect::<Vec<_>>(),
            [Shutdown::Read, Shutdown::Write]
        );
    }

    #[test]
    fn a_timer_of_nobody_never_expires() {
        let timer = Timer::default();
        timer.begin();
        assert_eq!(timer.expired(), None);
    }
}
