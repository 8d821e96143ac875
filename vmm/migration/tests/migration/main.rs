//! The engine between two guests without KVM, with every fault at every frame.
//!
//! What must hold after each: at most one copy ran at any time, exactly one runs in the end or the source
//! is stopped as handed over and unconfirmed, no write is lost, and a second try succeeds.

mod guest;
mod relay;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ept::{Gpa, Source};
use guest::{Guest, Place, World};
use migration::{
    Attempt, Deadlines, DigestCheck, Limits, ReceiveError, ReceiveOptions, Received, SendError,
    SendOptions, SourceGuest, Tag, TimeoutStrategy, receive, send,
};
use relay::{Fault, Harm, Relay};

const OPTIONS: SendOptions = SendOptions {
    limits: Limits {
        downtime: Duration::from_millis(50),
        timeout: Duration::from_secs(20),
        strategy: TimeoutStrategy::Ignore,
        throttle_max: 0,
    },
    digest: DigestCheck::Compare,
    deadlines: DEADLINES,
};

const DEADLINES: Deadlines = Deadlines {
    message: Duration::from_secs(5),
    agreeing: Duration::from_secs(10),
    ready: Duration::from_secs(10),
};

const RECEIVE_OPTIONS: ReceiveOptions = ReceiveOptions {
    deadlines: DEADLINES,
};

/// What came of one attempt.
struct Outcome {
    sent: Result<(), SendError>,
    received: Result<Received, ReceiveError>,
    arrived: Option<Guest>,
    struck: bool,
}

/// Sends `source` to `place` through a relay with one fault or none.
fn attempt(source: &mut Guest, mut place: Place, fault: Option<Fault>) -> Outcome {
    let (near, relay_near) = UnixStream::pair().unwrap();
    let (far, relay_far) = UnixStream::pair().unwrap();
    let relay = Relay::start(relay_near, relay_far, fault);
    let receiver = thread::spawn(move || {
        let attempt = Attempt::arriving("test");
        let received = receive(&mut place, far, &RECEIVE_OPTIONS, &attempt);
        (received, place.take())
    });
    let sent = send(source, near, &OPTIONS, &Attempt::new("test"));
    let (received, arrived) = receiver.join().unwrap();
    Outcome {
        sent,
        received,
        arrived,
        struck: relay.join(),
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
    let outcome = attempt(&mut source, Place::new(world), None);
    outcome.sent.unwrap();
    assert!(!source.is_running());
    assert_alive_and_whole(&mut outcome.arrived.unwrap());
    assert_eq!(world.most(), 1, "two copies ran at once");
}

#[test]
fn a_guest_arrives_whole_while_it_writes() {
    for _ in 0..20 {
        let (world, source) = running_guest();
        assert_second_try_succeeds(&world, source);
        assert_eq!(world.running(), 0);
    }
}

/// Before COMMIT every fault leaves the guest running at the source, as it was.
#[test]
fn any_harm_before_commit_leaves_the_guest_at_the_source() {
    let tags = [
        Tag::Accept,
        Tag::ZeroPages,
        Tag::Pages,
        Tag::RoundEnd,
        Tag::RoundAck,
        Tag::State,
        Tag::Finish,
        Tag::Ready,
    ];
    for tag in tags {
        for harm in harms(tag) {
            let fault = Fault { tag, harm };
            let (world, mut source) = running_guest();
            let outcome = attempt(&mut source, Place::new(&world), Some(fault));
            assert!(outcome.struck, "{fault:?} was never met");
            let error = outcome
                .sent
                .expect_err("a migration with a fault cannot succeed");
            assert!(
                !matches!(error, SendError::Unconfirmed(_)),
                "{fault:?}: {error}"
            );
            assert!(
                outcome.received.is_err(),
                "{fault:?}: the destination discards"
            );
            assert!(
                outcome.arrived.is_none(),
                "{fault:?}: nothing runs at the destination"
            );
            assert!(source.is_running(), "{fault:?}: the source runs on");
            assert_alive_and_whole(&mut source);
            assert_second_try_succeeds(&world, source);
        }
    }
}

fn harms(tag: Tag) -> Vec<Harm> {
    let mut harms = vec![Harm::CutBefore, Harm::CutInside, Harm::CutAfter];
    // Tag, length, sequence, checksum; a changed length may only look like silence, see below.
    harms.extend([Harm::FlipHead(0), Harm::FlipHead(8), Harm::FlipHead(12)]);
    if !matches!(tag, Tag::Accept | Tag::RoundEnd | Tag::RoundAck) {
        harms.push(Harm::FlipPayload);
    }
    // A cut behind FINISH or READY may come before COMMIT or after it: the next test's business.
    harms.retain(|harm| !matches!(tag, Tag::Finish | Tag::Ready) || *harm != Harm::CutAfter);
    harms
}

/// At COMMIT and after it the guest is never run on both sides, and never lost.
#[test]
fn harm_at_the_hand_over_never_makes_two() {
    for (tag, harm) in [
        (Tag::Finish, Harm::CutAfter),
        (Tag::Ready, Harm::CutAfter),
        (Tag::Commit, Harm::CutBefore),
        (Tag::Commit, Harm::CutInside),
        (Tag::Commit, Harm::CutAfter),
        (Tag::Commit, Harm::FlipHead(0)),
        (Tag::Commit, Harm::FlipHead(12)),
        (Tag::Done, Harm::CutBefore),
        (Tag::Done, Harm::CutInside),
        (Tag::Done, Harm::FlipHead(12)),
    ] {
        let fault = Fault { tag, harm };
        let (world, mut source) = running_guest();
        let mut outcome = attempt(&mut source, Place::new(&world), Some(fault));
        assert!(outcome.struck, "{fault:?} was never met");
        match (&outcome.sent, &mut outcome.arrived) {
            // The destination got COMMIT and could not say so.
            (Err(SendError::Unconfirmed(_)), Some(arrived)) => {
                assert!(!source.is_running(), "{fault:?}");
                assert_alive_and_whole(arrived);
            }
            // The confirmation was quicker than a cut that came behind COMMIT.
            (Ok(()), Some(arrived)) if harm == Harm::CutAfter => {
                assert!(!source.is_running(), "{fault:?}");
                assert_alive_and_whole(arrived);
            }
            // Nobody runs until a person says that the destination has nothing.
            (Err(SendError::Unconfirmed(_)), None) => {
                assert!(!source.is_running(), "{fault:?}");
                assert_eq!(world.running(), 0);
                SourceGuest::resume(&mut source).unwrap();
                assert_alive_and_whole(&mut source);
                assert_second_try_succeeds(&world, source);
            }
            // No byte of COMMIT left, or the destination said that it has nothing.
            (Err(_), None) => {
                assert!(source.is_running(), "{fault:?}");
                assert_alive_and_whole(&mut source);
                assert_second_try_succeeds(&world, source);
            }
            (sent, arrived) => panic!("{fault:?}: {sent:?}, arrived: {}", arrived.is_some()),
        }
        assert_eq!(world.most(), 1, "{fault:?}: two copies ran at once");
    }
}

/// When the confirmation that was sent is lost, the source may not run the guest again.
#[test]
fn a_lost_confirmation_leaves_the_source_stopped() {
    let (world, mut source) = running_guest();
    let fault = Fault {
        tag: Tag::Done,
        harm: Harm::CutBefore,
    };
    let outcome = attempt(&mut source, Place::new(&world), Some(fault));
    assert!(matches!(outcome.sent, Err(SendError::Unconfirmed(_))));
    assert!(outcome.arrived.is_some_and(|guest| guest.is_running()));
    assert!(!source.is_running());
    source.audit();
}

#[test]
fn the_reason_of_a_refusal_reaches_the_source() {
    let (world, mut source) = running_guest();
    let mut place = Place::new(&world);
    place.refusal = Some("no room for it: 5 pages");
    let outcome = attempt(&mut source, place, None);
    match outcome.sent {
        Err(SendError::Refused(reason)) => assert_eq!(reason, "no room for it: 5 pages"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(outcome.received, Err(ReceiveError::Refused(_))));
    assert!(source.is_running());
    assert_second_try_succeeds(&world, source);
}

/// A frame that was changed is refused by name and place, and the source hears it in words.
#[test]
fn a_changed_frame_is_named_on_both_sides() {
    let (world, mut source) = running_guest();
    let fault = Fault {
        tag: Tag::State,
        harm: Harm::FlipPayload,
    };
    let outcome = attempt(&mut source, Place::new(&world), Some(fault));
    let here = outcome.received.unwrap_err().to_string();
    assert!(
        here.contains("STATE frame") && here.contains("at offset"),
        "{here}"
    );
    match outcome.sent {
        Err(SendError::Refused(there)) => assert_eq!(there, here),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cancelled_migration_leaves_the_guest_at_the_source() {
    let (world, mut source) = running_guest();
    let (near, far) = UnixStream::pair().unwrap();
    let attempt = Attempt::new("test");
    // A downtime that is never reached keeps it in the rounds, as does a page that is always dirty.
    let options = SendOptions {
        limits: Limits {
            downtime: Duration::from_nanos(1),
            ..OPTIONS.limits
        },
        ..OPTIONS
    };
    let mut place = Place::new(&world);
    let receiver = thread::spawn(move || {
        receive(
            &mut place,
            far,
            &RECEIVE_OPTIONS,
            &Attempt::arriving("test"),
        )
        .map(drop)
    });
    source.on_sync = {
        let (tracker, attempt) = (Arc::clone(&source.tracker), attempt.clone());
        Some(Box::new(move |syncs| {
            tracker.mark(Gpa(0), 1, Source::Monitor);
            if syncs == 4 {
                attempt.cancel().unwrap();
            }
        }))
    };
    let sent = send(&mut source, near, &options, &attempt);
    assert_eq!(attempt.report().rounds.len(), 3);
    source.on_sync = None;
    assert!(matches!(sent, Err(SendError::Cancelled)), "{sent:?}");
    receiver.join().unwrap().unwrap_err();
    assert!(source.is_running());
    assert_alive_and_whole(&mut source);
    assert_second_try_succeeds(&world, source);
}
