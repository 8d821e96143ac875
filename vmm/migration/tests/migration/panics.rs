//! Panics in each method of each side, before and after the method has done its work.

use migration::{Attempt, Phase, ReceiveError, SendError, SourceGuest, Tag};

use crate::calls::{Calls, Moment, When};
use crate::guest::EmptyGuest;
use crate::relay::{Fault, Harm};
use crate::{
    Setup, assert_alive_and_whole, assert_second_try_succeeds, assert_stayed, running_guest,
};

/// The moments of one migration without a fault, at the source and at the destination.
fn moments() -> [Vec<Moment>; 2] {
    let (world, mut source) = running_guest();
    let (setup, here, there) = (Setup::default(), Calls::recorded(), Calls::recorded());
    let setup = Setup {
        source_calls: here.clone(),
        destination_calls: there.clone(),
        ..setup
    };
    setup
        .run(&mut source, EmptyGuest::new(&world))
        .sent
        .unwrap();
    [here.moments(), there.moments()]
}

fn panic_at(moment: Moment) -> std::sync::Arc<Calls> {
    Calls::at(moment, || panic!("injected"))
}

#[test]
fn a_panic_at_the_source_before_commit_leaves_the_guest_there() {
    let [moments, _] = moments();
    let methods = ["describe", "memory", "populated", "clear_log", "pause"];
    assert!(
        methods
            .iter()
            .all(|method| moments.iter().any(|moment| moment.method == *method)),
        "{moments:?}"
    );
    for moment in moments {
        let (world, mut source) = running_guest();
        let (calls, sending) = (panic_at(moment), Attempt::new("test"));
        let setup = Setup {
            source_calls: calls.clone(),
            sending: sending.clone(),
            ..Setup::default()
        };
        let ending = setup.run(&mut source, EmptyGuest::new(&world));
        if !calls.struck() {
            // This migration had fewer rounds.
            ending.sent.unwrap();
            continue;
        }
        let error = ending.sent.unwrap_err();
        assert!(
            matches!(error, SendError::Panicked { .. }) && error.to_string().contains("injected"),
            "{moment:?}: {error}"
        );
        assert_eq!(sending.report().phase, Phase::Failed);
        assert_eq!(sending.report().message, Some(error.to_string()));
        ending.received.unwrap_err();
        assert!(ending.arrived.is_none(), "{moment:?}");
        assert_stayed(&world, source);
    }
}

#[test]
fn a_panic_at_the_destination_never_makes_two() {
    let [_, moments] = moments();
    let methods = ["prepare", "write_pages", "restore", "taken_over", "resume"];
    assert!(
        methods
            .iter()
            .all(|method| moments.iter().any(|moment| moment.method == *method)),
        "{moments:?}"
    );
    for moment in moments {
        let (world, mut source) = running_guest();
        let (calls, receiving) = (panic_at(moment), Attempt::arriving("test"));
        let setup = Setup {
            destination_calls: calls.clone(),
            receiving: receiving.clone(),
            ..Setup::default()
        };
        let ending = setup.run(&mut source, EmptyGuest::new(&world));
        if !calls.struck() {
            ending.sent.unwrap();
            continue;
        }
        let received = ending.received.unwrap_err();
        assert!(received.to_string().contains("injected"), "{received}");
        if !matches!(moment.method, "taken_over" | "resume") {
            assert!(
                matches!(received, ReceiveError::Panicked { .. }),
                "{moment:?}: {received}"
            );
            assert_eq!(receiving.report().phase, Phase::Failed);
            match ending.sent {
                Err(SendError::Refused(reason)) => assert!(reason.contains("injected"), "{reason}"),
                other => panic!("{moment:?}: {other:?}"),
            }
            assert!(ending.arrived.is_none(), "{moment:?}");
            assert_stayed(&world, source);
            continue;
        }
        // After COMMIT: nobody is told that the guest does not run, because it may.
        assert!(received.is_in_doubt(), "{moment:?}: {received}");
        assert_eq!(receiving.report().phase, Phase::HandedOverUnconfirmed);
        assert!(
            ending.sent.as_ref().is_err_and(SendError::is_in_doubt),
            "{moment:?}: {:?}",
            ending.sent
        );
        assert!(!source.is_running(), "{moment:?}");
        let runs = moment.method == "resume" && moment.when == When::After;
        assert_eq!(ending.arrived.is_some(), runs, "{moment:?}");
        match ending.arrived {
            Some(mut arrived) => assert_alive_and_whole(&mut arrived),
            None => {
                SourceGuest::resume(&mut source).unwrap();
                assert_second_try_succeeds(&world, source);
            }
        }
        assert_eq!(world.most(), 1, "{moment:?}: two copies ran at once");
    }
}

#[test]
fn a_panic_while_the_guest_is_put_back_is_told_with_the_first_failure() {
    for method in ["stop_log", "resume"] {
        let (world, mut source) = running_guest();
        let setup = Setup {
            fault: Some(Fault {
                tag: Tag::Ready,
                harm: Harm::CutBefore,
            }),
            source_calls: panic_at(Moment {
                method,
                nth: 1,
                when: When::Before,
            }),
            ..Setup::default()
        };
        let ending = setup.run(&mut source, EmptyGuest::new(&world));
        let error = ending.sent.unwrap_err();
        assert!(matches!(error, SendError::Twice { .. }), "{error}");
        assert!(error.to_string().contains("injected"), "{error}");
        assert_eq!(source.is_running(), method == "stop_log");
        SourceGuest::resume(&mut source).unwrap();
        assert_stayed(&world, source);
    }
}
