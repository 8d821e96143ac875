//! The engine between two guests without KVM, with every fault at every frame and in every call.
//!
//! After each fault: at most one copy ran at any time; in the end exactly one runs, or the source is paused as handed
//! over and unconfirmed; no write is lost; and a second try succeeds.

mod calls;
mod cancel;
mod deadlines;
mod guest;
mod harm;
mod panics;
mod peer;
mod recordings;
mod relay;
mod streams;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use calls::{Calls, Observed};
use guest::{EmptyGuest, Guest, World};
use migration::{
    Attempt, Deadlines, DigestCheck, Limits, ReceiveError, ReceiveOptions, Received, SendError,
    SendOptions, TimeoutStrategy, memory_pair, receive, send,
};
use relay::{Fault, Relay};

/// Far longer than any step of a test takes, however loaded the host is.
const PATIENT: Deadlines = Deadlines {
    message: Duration::from_secs(60),
    agreeing: Duration::from_secs(60),
    ready: Duration::from_secs(60),
};

/// A migration to run: from which calls and through which link.
struct Setup {
    fault: Option<Fault>,
    /// Buffers of this size between the sides instead of sockets.
    capacity: Option<usize>,
    source_calls: Arc<Calls>,
    destination_calls: Arc<Calls>,
    send: SendOptions,
    receive: ReceiveOptions,
    sending: Attempt,
    receiving: Attempt,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            fault: None,
            capacity: None,
            source_calls: Calls::recorded(),
            destination_calls: Calls::recorded(),
            send: SendOptions {
                limits: Limits {
                    downtime: Duration::from_millis(50),
                    timeout: Duration::from_secs(20),
                    strategy: TimeoutStrategy::Ignore,
                    throttle_max: 0,
                },
                digest: DigestCheck::Compare,
                deadlines: PATIENT,
            },
            receive: ReceiveOptions { deadlines: PATIENT },
            sending: Attempt::new("test"),
            receiving: Attempt::arriving("test"),
        }
    }
}

/// How a migration ended.
struct Ending {
    sent: Result<(), SendError>,
    received: Result<Received, ReceiveError>,
    /// The guest, if it runs at the destination.
    arrived: Option<Guest>,
    struck: bool,
}

impl Setup {
    /// Sends `source` to `empty`.
    fn run(self, source: &mut Guest, empty: EmptyGuest) -> Ending {
        if let Some(capacity) = self.capacity {
            return self.over(source, empty, memory_pair(capacity), memory_pair(capacity));
        }
        let (near, far) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        self.over(source, empty, near, far)
    }

    fn over<S: migration::Stream + Send + 'static>(
        self,
        source: &mut Guest,
        mut empty: EmptyGuest,
        (near, relay_near): (S, S),
        (far, relay_far): (S, S),
    ) -> Ending {
        let relay = Relay::start(relay_near, relay_far, self.fault);
        let (options, attempt) = (self.receive, self.receiving);
        let calls = self.destination_calls;
        let receiver = thread::spawn(move || {
            let guest = &mut empty;
            let received = receive(&mut Observed { guest, calls }, far, &options, &attempt);
            (received, empty.take())
        });
        let mut observed = Observed {
            guest: source,
            calls: self.source_calls,
        };
        let sent = send(&mut observed, near, &self.send, &self.sending);
        let (received, arrived) = receiver.join().unwrap();
        Ending {
            sent,
            received,
            arrived,
            struck: relay.join(),
        }
    }
}

fn running_guest() -> (Arc<World>, Guest) {
    let world = Arc::new(World::default());
    let mut guest = Guest::new(&world);
    guest.run();
    while guest.stamps() < 200 {
        thread::yield_now();
    }
    (world, guest)
}

/// The guest makes progress, and has lost nothing.
fn assert_alive_and_whole(guest: &mut Guest) {
    let before = guest.stamps();
    while guest.stamps() < before + 200 {
        thread::yield_now();
    }
    guest.halt();
    guest.audit();
    guest.run();
}

/// The guest can be sent from where it is now, and arrives whole.
fn assert_second_try_succeeds(world: &Arc<World>, mut source: Guest) {
    let ending = Setup::default().run(&mut source, EmptyGuest::new(world));
    ending.sent.unwrap();
    assert!(!source.is_running());
    assert_alive_and_whole(&mut ending.arrived.unwrap());
    assert_eq!(world.most(), 1, "two copies ran at once");
}

/// The migration has changed nothing for the source's guest, which can be sent again.
fn assert_stayed(world: &Arc<World>, mut source: Guest) {
    assert!(source.is_running(), "the source runs on");
    assert_alive_and_whole(&mut source);
    assert_second_try_succeeds(world, source);
}
