//! Migrations without a fault, and with frames that are cut off, changed or lost.

use std::sync::Arc;

use migration::{Arrival, Attempt, Phase, ReceiveError, SendError, SourceGuest, Tag};

use crate::calls::Calls;
use crate::guest::{EmptyGuest, Guest, World};
use crate::relay::{Fault, Harm};
use crate::{
    Ending, Setup, assert_alive_and_whole, assert_second_try_succeeds, assert_stayed, running_guest,
};

/// Sends `source` to `empty` through a relay with one fault or none.
fn attempt(source: &mut Guest, empty: EmptyGuest, fault: Option<Fault>) -> Ending {
    let setup = Setup {
        fault,
        ..Setup::default()
    };
    setup.run(source, empty)
}

#[test]
fn a_guest_arrives_whole_while_it_writes() {
    for _ in 0..20 {
        let (world, source) = running_guest();
        assert_second_try_succeeds(&world, source);
        assert_eq!(world.running(), 0);
    }
}

#[test]
fn a_paused_guest_stays_paused() {
    let world = Arc::new(World::default());
    let mut source = Guest::new(&world);
    source.arrival = Arrival::StaysPaused;
    let (receiving, calls) = (Attempt::arriving("test"), Calls::recorded());
    let setup = Setup {
        destination_calls: calls.clone(),
        receiving: receiving.clone(),
        ..Setup::default()
    };
    let ending = setup.run(&mut source, EmptyGuest::new(&world));
    ending.sent.unwrap();
    assert_eq!(receiving.report().phase, Phase::Completed);
    let called = |method| calls.moments().iter().any(|m| m.method == method);
    assert!(called("taken_over") && !called("resume"));
    assert_eq!(world.most(), 0);
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
            let ending = attempt(&mut source, EmptyGuest::new(&world), Some(fault));
            assert!(ending.struck, "{fault:?} was never met");
            let error = ending
                .sent
                .expect_err("a migration with a fault cannot succeed");
            assert!(
                !matches!(error, SendError::Unconfirmed(_)),
                "{fault:?}: {error}"
            );
            assert!(
                ending.received.is_err(),
                "{fault:?}: the destination discards"
            );
            assert!(
                ending.arrived.is_none(),
                "{fault:?}: nothing runs at the destination"
            );
            assert_stayed(&world, source);
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
        let mut ending = attempt(&mut source, EmptyGuest::new(&world), Some(fault));
        assert!(ending.struck, "{fault:?} was never met");
        match (&ending.sent, &mut ending.arrived) {
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
    let ending = attempt(&mut source, EmptyGuest::new(&world), Some(fault));
    assert!(matches!(ending.sent, Err(SendError::Unconfirmed(_))));
    assert!(ending.arrived.is_some_and(|guest| guest.is_running()));
    assert!(!source.is_running());
    source.audit();
}

#[test]
fn the_reason_of_a_refusal_reaches_the_source() {
    let (world, mut source) = running_guest();
    let mut empty = EmptyGuest::new(&world);
    empty.refusal = Some("no room for it: 5 pages");
    let ending = attempt(&mut source, empty, None);
    match ending.sent {
        Err(SendError::Refused(reason)) => assert_eq!(reason, "no room for it: 5 pages"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(ending.received, Err(ReceiveError::Refused(_))));
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
    let ending = attempt(&mut source, EmptyGuest::new(&world), Some(fault));
    let here = ending.received.unwrap_err().to_string();
    assert!(
        here.contains("STATE frame") && here.contains("at offset"),
        "{here}"
    );
    match ending.sent {
        Err(SendError::Refused(there)) => assert_eq!(there, here),
        other => panic!("{other:?}"),
    }
}
