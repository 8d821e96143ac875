//! Every call in every state: allowed and refused just as the table says, and a refused call changes nothing.

use std::sync::Arc;
use std::thread;

use migration::Phase;
use vmm::monitor::{
    Call, DirtyRateData, Monitor, MonitorError, Refusal, ResizeData, Resolution, SendMigrationData,
    StateKind, refusal,
};

use crate::guest::{Image, TestSerial, launching_monitor, wait_for_state, wait_until};
use crate::peers::{Destination, Silent, Sockets, lose_confirmation};

/// A monitor in a wanted state, and what keeps it there.
struct Prepared {
    monitor: Arc<Monitor>,
    image: Image,
    sockets: Sockets,
    ending: Option<Box<dyn FnOnce()>>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(end) = self.ending.take() {
            end();
        }
    }
}

pub(crate) fn wish(url: String) -> SendMigrationData {
    let json = serde_json::json!({ "destination_url": url });
    serde_json::from_value(json).unwrap()
}

fn prepare(state: StateKind) -> Prepared {
    let (image, sockets) = (Image::new(), Sockets::new());
    if state == StateKind::Arriving {
        return arriving(image, sockets);
    }
    let serial = TestSerial::default();
    let monitor = launching_monitor(serial.clone());
    let mut ending: Option<Box<dyn FnOnce()>> = None;
    if !matches!(state, StateKind::Empty | StateKind::Closed) {
        monitor.create(image.config(), Vec::new()).unwrap();
    }
    let has_run = [
        StateKind::Running,
        StateKind::Paused,
        StateKind::Ended,
        StateKind::Off,
        StateKind::Sending,
        StateKind::Unconfirmed,
    ];
    if has_run.contains(&state) {
        monitor.boot().unwrap();
        serial.wait_for("ready");
    }
    match state {
        StateKind::Empty | StateKind::Created | StateKind::Running | StateKind::Arriving => {}
        StateKind::Vacated => monitor.delete().unwrap(),
        StateKind::Closed => monitor.end_all().unwrap(),
        StateKind::Paused => monitor.pause().unwrap(),
        StateKind::Off => monitor.shut_down().unwrap(),
        StateKind::Ended => serial.type_in(b"q"),
        StateKind::Sending => {
            let peer = Silent::start(&sockets, "silent");
            let sending = thread::spawn({
                let (monitor, wish) = (Arc::clone(&monitor), wish(sockets.url("silent")));
                move || drop(monitor.send_migration(&wish))
            });
            wait_until("agreeing", || {
                monitor.migration_progress().phase == Phase::Agreeing
            });
            ending = Some(Box::new(move || {
                peer.cut();
                sending.join().unwrap();
            }));
        }
        StateKind::Unconfirmed => {
            let losing = lose_confirmation(&sockets, "losing");
            let sent = monitor.send_migration(&wish(sockets.url("losing")));
            assert!(sent.unwrap_err().to_string().contains("migration-resolve"));
            losing.join().unwrap();
        }
    }
    wait_for_state(&monitor, state);
    Prepared {
        monitor,
        image,
        sockets,
        ending,
    }
}

fn arriving(image: Image, sockets: Sockets) -> Prepared {
    let destination = Destination::start(&sockets, "arriving");
    let monitor = Arc::clone(&destination.monitor);
    let silent = std::os::unix::net::UnixStream::connect(sockets.path("arriving")).unwrap();
    wait_for_state(&monitor, StateKind::Arriving);
    Prepared {
        monitor,
        image,
        sockets,
        // The destination goes on waiting for a guest, on a thread that ends with this process.
        ending: Some(Box::new(move || drop(silent))),
    }
}

/// Makes a call. Receiving is no call, and is not made here.
fn make(call: Call, prepared: &Prepared) -> Result<(), MonitorError> {
    let monitor = &prepared.monitor;
    match call {
        Call::Create => monitor.create(prepared.image.config(), Vec::new()),
        Call::Boot => monitor.boot(),
        Call::ShutDown => monitor.shut_down(),
        Call::Delete => monitor.delete(),
        Call::Reboot => monitor.reboot(),
        Call::Pause => monitor.pause(),
        Call::Resume => monitor.resume(),
        Call::PowerButton => monitor.power_button(),
        Call::Resize => monitor.resize(&ResizeData { desired_balloon: 0 }),
        Call::Info => monitor.info().map(drop),
        Call::Counters => monitor.counters().map(drop),
        Call::DirtyRate => {
            let measured = monitor.dirty_rate(&DirtyRateData { interval_ms: 10 });
            measured.map(drop)
        }
        Call::SendMigration => {
            let nowhere = wish(prepared.sockets.url("nowhere"));
            monitor.send_migration(&nowhere).map(drop)
        }
        Call::CancelMigration => monitor.cancel_migration(),
        Call::ResolveMigration => monitor.resolve_migration(Resolution::Resume),
        Call::ShutDownMonitor => monitor.end_all(),
        Call::Receive => unreachable!("receiving is no call"),
    }
}

fn calls() -> impl Iterator<Item = Call> {
    Call::ALL.into_iter().filter(|call| *call != Call::Receive)
}

/// Why a call was refused, if it was.
fn refused(result: &Result<(), MonitorError>) -> Option<Refusal> {
    match result {
        Err(MonitorError::Refused { refusal, .. }) => Some(*refusal),
        Err(MonitorError::Migrating { .. }) => Some(Refusal::Migrating),
        Err(MonitorError::NoMigration { .. }) => Some(Refusal::NoMigration),
        _ => None,
    }
}

/// The state that follows from an allowed call which succeeds.
pub(crate) fn follows(call: Call, state: StateKind) -> StateKind {
    match (call, state) {
        (Call::Create, _) => StateKind::Created,
        (Call::Boot | Call::Reboot | Call::Resume, _) => StateKind::Running,
        (Call::ShutDown, _) => StateKind::Off,
        (Call::Pause, _) => StateKind::Paused,
        (Call::Delete, StateKind::Empty) => StateKind::Empty,
        (Call::ShutDownMonitor, StateKind::Empty | StateKind::Vacated | StateKind::Closed) => {
            StateKind::Closed
        }
        (Call::Delete, _) => StateKind::Vacated,
        // The guest ran when the migration began.
        (Call::ResolveMigration, _) => StateKind::Running,
        (_, state) => state,
    }
}

#[test]
fn every_call_in_every_state_is_refused_as_the_table_says() {
    for state in StateKind::ALL {
        let prepared = prepare(state);
        for call in calls() {
            let Some(expected) = refusal(call, state) else {
                continue;
            };
            let result = make(call, &prepared);
            assert_eq!(
                refused(&result),
                Some(expected),
                "{call:?} in {state:?}: {result:?}"
            );
            assert_eq!(
                prepared.monitor.state_kind(),
                state,
                "{call:?} in {state:?}"
            );
        }
    }
}

#[test]
fn every_call_in_every_state_is_allowed_as_the_table_says() {
    for state in StateKind::ALL {
        for call in calls().filter(|call| refusal(*call, state).is_none()) {
            let prepared = prepare(state);
            let result = make(call, &prepared);
            assert_eq!(refused(&result), None, "{call:?} in {state:?}: {result:?}");
            match call {
                // Nobody listens there: the guest stays as it was.
                Call::SendMigration => assert!(result.is_err()),
                // It ends a moment later.
                Call::CancelMigration => {
                    result.unwrap();
                    let cancelled =
                        || prepared.monitor.migration_progress().phase == Phase::Cancelled;
                    if state == StateKind::Sending {
                        wait_until("cancelled", cancelled);
                        assert_eq!(prepared.monitor.state_kind(), StateKind::Running);
                    }
                    continue;
                }
                _ => result.unwrap(),
            }
            assert_eq!(
                prepared.monitor.state_kind(),
                follows(call, state),
                "after {call:?} in {state:?}"
            );
        }
    }
}
