//! Cancelling in each phase, at each side, and while a side waits for the other one.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ept::{Gpa, Source};
use migration::{Attempt, Limits, Phase, ReceiveError, SendError, SendOptions, Tag, TooLate};

use crate::calls::{Calls, Moment, Observed, When};
use crate::guest::EmptyGuest;
use crate::relay::{Fault, Harm};
use crate::{Setup, assert_alive_and_whole, assert_stayed, running_guest};

fn cancel_at(method: &'static str, nth: usize, attempt: &Attempt) -> Arc<Calls> {
    let attempt = attempt.clone();
    let moment = Moment {
        method,
        nth,
        when: When::Before,
    };
    Calls::at(moment, move || attempt.cancel().unwrap())
}

#[test]
fn a_cancelled_migration_leaves_the_guest_at_the_source() {
    let (world, mut source) = running_guest();
    let sending = Attempt::new("test");
    let setup = Setup::default();
    // A downtime that is never reached keeps the migration in the rounds, as does a page that is always dirty.
    let limits = Limits {
        downtime: Duration::from_nanos(1),
        ..setup.send.limits
    };
    source.on_sync = {
        let (tracker, attempt) = (Arc::clone(&source.tracker), sending.clone());
        Some(Box::new(move |syncs| {
            tracker.mark(Gpa(0), 1, Source::Monitor);
            if syncs == 4 {
                attempt.cancel().unwrap();
            }
        }))
    };
    let setup = Setup {
        send: SendOptions {
            limits,
            ..setup.send
        },
        sending: sending.clone(),
        ..setup
    };
    let ending = setup.run(&mut source, EmptyGuest::new(&world));
    assert_eq!(sending.report().rounds.len(), 3);
    assert_eq!(sending.report().phase, Phase::Cancelled);
    source.on_sync = None;
    assert!(
        matches!(ending.sent, Err(SendError::Cancelled)),
        "{:?}",
        ending.sent
    );
    ending.received.unwrap_err();
    assert_stayed(&world, source);
}

#[test]
fn the_source_can_cancel_up_to_commit() {
    let calls = [
        ("describe", 1),
        ("start_log", 1),
        ("populated", 1),
        ("sync_log", 1),
        ("clear_log", 1),
        ("sync_log", 2),
        ("pause", 1),
        ("save", 1),
        // The digest, while the destination gets ready.
        ("populated", 2),
    ];
    for (method, nth) in calls {
        let (world, mut source) = running_guest();
        let sending = Attempt::new("test");
        let setup = Setup {
            source_calls: cancel_at(method, nth, &sending),
            sending: sending.clone(),
            ..Setup::default()
        };
        let ending = setup.run(&mut source, EmptyGuest::new(&world));
        assert!(
            matches!(ending.sent, Err(SendError::Cancelled)),
            "{method} {nth}: {:?}",
            ending.sent
        );
        assert_eq!(sending.report().phase, Phase::Cancelled);
        ending.received.unwrap_err();
        assert!(ending.arrived.is_none(), "{method} {nth}");
        assert_stayed(&world, source);
    }
}

#[test]
fn the_destination_can_cancel_up_to_commit_and_the_source_is_told() {
    for method in ["prepare", "write_pages", "populated", "restore"] {
        let (world, mut source) = running_guest();
        let receiving = Attempt::arriving("test");
        let setup = Setup {
            destination_calls: cancel_at(method, 1, &receiving),
            receiving: receiving.clone(),
            ..Setup::default()
        };
        let ending = setup.run(&mut source, EmptyGuest::new(&world));
        assert!(
            matches!(ending.received, Err(ReceiveError::Cancelled)),
            "{method}: {:?}",
            ending.received
        );
        assert_eq!(receiving.report().phase, Phase::Cancelled);
        match ending.sent {
            Err(SendError::Refused(reason)) => {
                assert_eq!(reason, "cancelled at the destination", "{method}");
            }
            other => panic!("{method}: {other:?}"),
        }
        assert_stayed(&world, source);
    }
}

#[test]
fn the_reason_of_a_destination_that_cancels_arrives_over_tcp() {
    let (world, mut source) = running_guest();
    let receiving = Attempt::arriving("test");
    let calls = cancel_at("write_pages", 1, &receiving);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let Setup { send, receive, .. } = Setup::default();
    let mut empty = EmptyGuest::new(&world);
    let receiver = thread::spawn(move || {
        let guest = &mut empty;
        migration::receive(&mut Observed { guest, calls }, far, &receive, &receiving)
    });
    match migration::send(&mut source, near, &send, &Attempt::new("test")) {
        Err(SendError::Refused(reason)) => assert_eq!(reason, "cancelled at the destination"),
        other => panic!("{other:?}"),
    }
    let received = receiver.join().unwrap();
    assert!(matches!(received, Err(ReceiveError::Cancelled)));
    assert_stayed(&world, source);
}

#[test]
fn a_cancel_after_commit_is_too_late_at_both_sides() {
    let (world, mut source) = running_guest();
    let (sending, receiving) = (Attempt::new("test"), Attempt::arriving("test"));
    let too_late = |attempt: &Attempt| {
        let attempt = attempt.clone();
        move || {
            let phase = Phase::Committed;
            assert_eq!(attempt.cancel(), Err(TooLate { phase }));
            assert!(attempt.is_committed());
        }
    };
    let at_source = too_late(&sending);
    let sending = sending.observed(move |_, report| {
        if report.phase == Phase::Committed {
            at_source();
        }
    });
    let moment = Moment {
        method: "taken_over",
        nth: 1,
        when: When::Before,
    };
    let setup = Setup {
        destination_calls: Calls::at(moment, too_late(&receiving)),
        sending: sending.clone(),
        receiving: receiving.clone(),
        ..Setup::default()
    };
    let ending = setup.run(&mut source, EmptyGuest::new(&world));
    ending.sent.unwrap();
    assert_alive_and_whole(&mut ending.arrived.unwrap());
    for attempt in [sending, receiving] {
        let phase = Phase::Completed;
        assert_eq!(attempt.cancel(), Err(TooLate { phase }));
    }
}

#[test]
fn a_cancel_wakes_a_side_that_waits() {
    let stalled = [
        (Tag::Accept, Phase::Agreeing),
        (Tag::RoundAck, Phase::Rounds),
        (Tag::Ready, Phase::Switchover),
    ];
    for (tag, phase) in stalled {
        let (world, mut source) = running_guest();
        let sending = Attempt::new("test");
        let canceller = cancel_in(phase, &sending);
        let harm = Harm::Stall;
        let setup = Setup {
            fault: Some(Fault { tag, harm }),
            sending,
            ..Setup::default()
        };
        let began = Instant::now();
        let ending = setup.run(&mut source, EmptyGuest::new(&world));
        assert!(
            matches!(ending.sent, Err(SendError::Cancelled)),
            "{tag}: {:?}",
            ending.sent
        );
        canceller.join().unwrap();
        // Much less than the deadlines of the test.
        assert!(began.elapsed() < Duration::from_secs(30), "{tag}");
        assert_stayed(&world, source);
    }
}

#[test]
fn a_cancel_wakes_a_destination_that_waits() {
    for (tag, phase) in [
        (Tag::Pages, Phase::Rounds),
        (Tag::Commit, Phase::Switchover),
    ] {
        let (world, mut source) = running_guest();
        let receiving = Attempt::arriving("test");
        let canceller = cancel_in(phase, &receiving);
        let harm = Harm::Stall;
        let setup = Setup {
            fault: Some(Fault { tag, harm }),
            receiving,
            ..Setup::default()
        };
        let began = Instant::now();
        let ending = setup.run(&mut source, EmptyGuest::new(&world));
        assert!(
            matches!(ending.received, Err(ReceiveError::Cancelled)),
            "{tag}: {:?}",
            ending.received
        );
        canceller.join().unwrap();
        assert!(began.elapsed() < Duration::from_secs(30), "{tag}");
        // Also after COMMIT: the destination says that it has nothing.
        assert!(matches!(ending.sent, Err(SendError::Refused(_))));
        assert_stayed(&world, source);
    }
}

/// Cancels `attempt` some time after it has entered `phase`.
fn cancel_in(phase: Phase, attempt: &Attempt) -> thread::JoinHandle<()> {
    let attempt = attempt.clone();
    thread::spawn(move || {
        while attempt.report().phase != phase {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(50));
        attempt.cancel().unwrap();
    })
}

#[test]
fn an_attempt_that_was_cancelled_before_it_began_touches_nothing() {
    let (world, mut source) = running_guest();
    let sending = Attempt::new("test");
    sending.cancel().unwrap();
    let calls = Calls::recorded();
    let setup = Setup {
        sending,
        source_calls: calls.clone(),
        ..Setup::default()
    };
    let ending = setup.run(&mut source, EmptyGuest::new(&world));
    assert!(matches!(ending.sent, Err(SendError::Cancelled)));
    assert_eq!(calls.moments(), []);
    assert_stayed(&world, source);
}
