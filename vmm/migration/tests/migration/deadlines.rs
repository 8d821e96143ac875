//! Peers that are silent or slow: whatever they do, each phase ends within its deadline, and the error says what was
//! due.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use migration::{
    Attempt, Deadlines, DigestCheck, Phase, ReceiveError, ReceiveOptions, SendError, SendOptions,
    SourceGuest, Tag, TimeoutStrategy, receive, send,
};

use crate::calls::{Calls, Moment, When};
use crate::guest::EmptyGuest;
use crate::peer::alive_instead_of;
use crate::relay::{Fault, Harm};
use crate::{
    PATIENT, Setup, assert_alive_and_whole, assert_second_try_succeeds, assert_stayed,
    running_guest,
};

/// Long enough for an honest message on a loaded host, and shorter than any message that drips.
const SHORT: Deadlines = Deadlines {
    message: Duration::from_millis(400),
    agreeing: Duration::from_secs(60),
    ready: Duration::from_secs(60),
};

/// Far beyond the short deadlines, far below the patient ones.
const IN_TIME: Duration = Duration::from_secs(30);

#[test]
fn the_source_gives_up_on_a_destination_that_is_silent_or_drips() {
    for tag in [Tag::Accept, Tag::RoundAck, Tag::Ready, Tag::Done] {
        for harm in [Harm::Stall, Harm::Drip] {
            let fault = Fault { tag, harm };
            let (world, mut source) = running_guest();
            let setup = Setup::default();
            let send = SendOptions {
                deadlines: SHORT,
                ..setup.send
            };
            let setup = Setup {
                fault: Some(fault),
                send,
                ..setup
            };
            let began = Instant::now();
            let ending = setup.run(&mut source, EmptyGuest::new(&world));
            assert!(began.elapsed() < IN_TIME, "{fault:?}");
            let error = ending.sent.unwrap_err();
            let words = format!("no {tag} from the other side for 400 ms");
            assert!(error.to_string().contains(&words), "{fault:?}: {error}");
            if tag == Tag::Done {
                assert!(error.is_in_doubt(), "{fault:?}: {error}");
                assert!(ending.arrived.is_some() && !source.is_running());
                assert_eq!(world.most(), 1);
            } else {
                ending.received.unwrap_err();
                assert_stayed(&world, source);
            }
        }
    }
}

#[test]
fn the_source_gives_up_on_a_destination_that_takes_nothing() {
    let (world, mut source) = running_guest();
    let setup = Setup::default();
    let send = SendOptions {
        deadlines: SHORT,
        ..setup.send
    };
    let setup = Setup {
        fault: Some(Fault {
            tag: Tag::Pages,
            harm: Harm::DripTake,
        }),
        // So that a frame of pages does not fit the buffer.
        capacity: Some(4096),
        send,
        ..setup
    };
    let began = Instant::now();
    let ending = setup.run(&mut source, EmptyGuest::new(&world));
    assert!(began.elapsed() < IN_TIME);
    let error = ending.sent.unwrap_err().to_string();
    let words = "the other side did not take PAGES for 400 ms";
    assert!(error.contains(words), "{error}");
    assert_stayed(&world, source);
}

#[test]
fn the_destination_gives_up_on_a_source_that_is_silent_or_drips_and_says_so() {
    let tags = [
        Tag::ZeroPages,
        Tag::Pages,
        Tag::RoundEnd,
        Tag::State,
        Tag::Finish,
        Tag::Commit,
    ];
    for tag in tags {
        for harm in [Harm::Stall, Harm::Drip] {
            let fault = Fault { tag, harm };
            let (world, mut source) = running_guest();
            let setup = Setup {
                fault: Some(fault),
                receive: ReceiveOptions { deadlines: SHORT },
                ..Setup::default()
            };
            let began = Instant::now();
            let ending = setup.run(&mut source, EmptyGuest::new(&world));
            assert!(began.elapsed() < IN_TIME, "{fault:?}");
            let due = match tag {
                Tag::Commit => "COMMIT",
                _ => "memory or state",
            };
            let words = format!("no {due} from the other side for 400 ms");
            let error = ending.received.unwrap_err().to_string();
            assert_eq!(error, words, "{fault:?}");
            match ending.sent {
                Err(SendError::Refused(reason)) => assert_eq!(reason, words, "{fault:?}"),
                other => panic!("{fault:?}: {other:?}"),
            }
            assert_stayed(&world, source);
        }
    }
}

#[test]
fn a_source_that_never_completes_its_header_is_given_up() {
    for drips in [false, true] {
        let (mut near, far) = UnixStream::pair().unwrap();
        let dripping = thread::spawn(move || {
            use std::io::Write;
            while drips && near.write_all(b"F").is_ok() {
                thread::sleep(Duration::from_millis(50));
            }
            near
        });
        let mut empty = EmptyGuest::new(&std::sync::Arc::default());
        let attempt = Attempt::arriving("test");
        let options = ReceiveOptions { deadlines: SHORT };
        let error = receive(&mut empty, far, &options, &attempt).unwrap_err();
        let words = "no header from the other side for 400 ms";
        assert_eq!(error.to_string(), words, "drips: {drips}");
        assert_eq!(attempt.report().phase, Phase::Failed);
        drop(dripping.join());
    }
}

#[test]
fn a_destination_that_is_alive_for_ever_exceeds_the_total_of_its_phase() {
    let total = Duration::from_millis(600);
    let deadlines = Deadlines {
        agreeing: total,
        ready: total,
        ..PATIENT
    };
    for (kept_back, phase) in [
        (Tag::Accept, Phase::Agreeing),
        (Tag::Ready, Phase::Switchover),
    ] {
        let (world, mut source) = running_guest();
        let (near, far) = UnixStream::pair().unwrap();
        let peer = thread::spawn(move || alive_instead_of(kept_back, far));
        let options = SendOptions {
            digest: DigestCheck::Skip,
            deadlines,
            ..Setup::default().send
        };
        let attempt = Attempt::new("test");
        let error = send(&mut source, near, &options, &attempt).unwrap_err();
        let words = format!("phase {phase} took longer than 600 ms, at {kept_back}");
        assert!(error.to_string().contains(&words), "{error}");
        peer.join().unwrap();
        assert_stayed(&world, source);
    }
}

#[test]
fn a_destination_that_works_longer_than_a_message_may_take_is_waited_for() {
    for method in ["prepare", "populated", "restore"] {
        let (world, mut source) = running_guest();
        let setup = Setup::default();
        let moment = Moment {
            method,
            nth: 1,
            when: When::Before,
        };
        let setup = Setup {
            send: SendOptions {
                deadlines: SHORT,
                ..setup.send
            },
            receive: ReceiveOptions { deadlines: SHORT },
            destination_calls: Calls::at(moment, || thread::sleep(SHORT.message * 3)),
            ..setup
        };
        // The destination waits for nothing meanwhile, so that its own limit does not matter.
        let ending = setup.run(&mut source, EmptyGuest::new(&world));
        ending.sent.unwrap();
        assert_alive_and_whole(&mut ending.arrived.unwrap());
        assert_eq!(world.most(), 1, "{method}");
    }
}

#[test]
fn the_time_for_the_rounds_ends_a_round_that_has_begun() {
    let (world, mut source) = running_guest();
    let setup = Setup::default();
    let mut send = setup.send;
    send.limits.timeout = Duration::from_millis(300);
    send.limits.strategy = TimeoutStrategy::Cancel;
    let setup = Setup {
        fault: Some(Fault {
            tag: Tag::RoundAck,
            harm: Harm::Stall,
        }),
        send,
        ..setup
    };
    let ending = setup.run(&mut source, EmptyGuest::new(&world));
    match ending.sent {
        Err(SendError::GaveUp(why)) => assert_eq!(why, "the rounds took longer than 300 ms"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(ending.received, Err(ReceiveError::Wire(_))));
    assert_stayed(&world, source);
}

#[test]
fn a_commit_that_is_held_back_is_refused_and_the_source_goes_on() {
    let (world, mut source) = running_guest();
    let setup = Setup {
        fault: Some(Fault {
            tag: Tag::Commit,
            harm: Harm::Stall,
        }),
        receive: ReceiveOptions { deadlines: SHORT },
        ..Setup::default()
    };
    let ending = setup.run(&mut source, EmptyGuest::new(&world));
    assert!(ending.arrived.is_none());
    assert!(source.is_running(), "{:?}", ending.sent);
    // Pausing and resuming it by hand is still possible.
    source.pause().unwrap();
    SourceGuest::resume(&mut source).unwrap();
    assert_second_try_succeeds(&world, source);
}
