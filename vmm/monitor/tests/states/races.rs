//! Calls, ends and migrations that meet in the middle of each other.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm::events::Events;
use vmm::monitor::{Launcher, Monitor, OnReset, Resolution, StateKind, VmState};

use crate::guest::{Image, TestSerial, host, launching_monitor, wait_for_state, wait_until};
use crate::peers::{Destination, Silent, Sockets, lose_confirmation};
use crate::walk::wish;

const PATIENCE: Duration = Duration::from_secs(15);

/// Runs `work` on a thread; true if it returned in time. The thread is left behind otherwise.
fn returns(work: impl FnOnce() + Send + 'static) -> bool {
    let (done, over) = channel();
    thread::spawn(move || {
        work();
        let _gone = done.send(());
    });
    over.recv_timeout(PATIENCE).is_ok()
}

fn booted(image: &Image, monitor: &Monitor, serial: &TestSerial) {
    monitor.create(image.config(), Vec::new()).unwrap();
    monitor.boot().unwrap();
    serial.wait_for("ready");
}

fn launching_with(events: Events, serial: &TestSerial) -> Arc<Monitor> {
    let launcher = Launcher {
        host: host(),
        dirty_log: None,
        serial: Arc::new(serial.clone()),
        on_reset: OnReset::End,
    };
    Monitor::new(Some(launcher), events)
}

fn names(path: &std::path::Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|event| event["event"].as_str().unwrap().to_owned())
        .filter(|name| name.starts_with("migration-") && name != "migration-phase")
        .collect()
}

/// The thread that received the guest still settles its migration when the next one begins.
#[test]
fn a_guest_can_be_sent_on_the_moment_it_has_arrived() {
    for round in 0..20 {
        let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
        let source = launching_monitor(serial.clone());
        booted(&image, &source, &serial);
        let destination = Destination::start(&sockets, "d");
        let middle = Arc::clone(&destination.monitor);
        let nowhere = wish(sockets.url("nowhere"));
        let (began, has_begun) = channel();
        let sending_on = thread::spawn({
            let middle = Arc::clone(&middle);
            move || {
                began.send(()).unwrap();
                while middle.state_kind() != StateKind::Running {
                    std::hint::spin_loop();
                }
                drop(middle.send_migration(&nowhere));
            }
        });
        has_begun.recv().unwrap();
        let to = wish(sockets.url("d"));
        source.send_migration(&to).unwrap();
        assert!(
            returns(move || drop(sending_on.join())),
            "round {round}: send_migration hangs"
        );
        assert!(
            returns(move || drop(middle.info())),
            "round {round}: every call hangs"
        );
    }
}

/// The vCPU reports the end while a worker owns the guest.
#[test]
fn the_end_of_a_guest_that_is_being_sent_is_not_lost() {
    let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
    let monitor = launching_monitor(serial.clone());
    booted(&image, &monitor, &serial);
    let waiting = thread::spawn({
        let monitor = Arc::clone(&monitor);
        move || monitor.wait_for_end()
    });
    let peer = Silent::start(&sockets, "silent");
    let sending = thread::spawn({
        let (monitor, wish) = (Arc::clone(&monitor), wish(sockets.url("silent")));
        move || drop(monitor.send_migration(&wish))
    });
    wait_for_state(&monitor, StateKind::Sending);
    serial.type_in(b"q");
    serial.wait_for("audit");
    thread::sleep(Duration::from_millis(300));
    peer.cut();
    sending.join().unwrap();
    wait_for_state(&monitor, StateKind::Ended);
    assert!(
        returns(move || drop(waiting.join())),
        "the guest has ended, and wait_for_end does not return"
    );
}

/// A resolution that comes at once is told after the event that it resolves.
#[test]
fn an_unconfirmed_hand_over_is_told_before_it_is_resolved() {
    for _ in 0..15 {
        let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
        let path = sockets.path("events");
        let monitor = launching_with(Events::to(File::create(&path).unwrap()).unwrap(), &serial);
        booted(&image, &monitor, &serial);
        let resolving = thread::spawn({
            let monitor = Arc::clone(&monitor);
            move || {
                while monitor.state_kind() != StateKind::Unconfirmed {
                    std::hint::spin_loop();
                }
                monitor.resolve_migration(Resolution::Resume).unwrap();
            }
        });
        let losing = lose_confirmation(&sockets, "losing");
        monitor
            .send_migration(&wish(sockets.url("losing")))
            .unwrap_err();
        resolving.join().unwrap();
        losing.join().unwrap();
        monitor.events().flush();
        assert_eq!(
            names(&path),
            [
                "migration-started",
                "migration-unconfirmed",
                "migration-failed"
            ]
        );
    }
}

#[test]
fn a_failed_migration_is_told_before_the_next_one() {
    for _ in 0..30 {
        let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
        let path = sockets.path("events");
        let monitor = launching_with(Events::to(File::create(&path).unwrap()).unwrap(), &serial);
        booted(&image, &monitor, &serial);
        let again = thread::spawn({
            let (monitor, wish) = (Arc::clone(&monitor), wish(sockets.url("nowhere")));
            move || {
                wait_until("sending", || monitor.state_kind() == StateKind::Sending);
                while monitor.state_kind() != StateKind::Running {
                    std::hint::spin_loop();
                }
                drop(monitor.send_migration(&wish));
            }
        });
        let peer = Silent::start(&sockets, "silent");
        let cutting = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            peer.cut();
        });
        drop(monitor.send_migration(&wish(sockets.url("silent"))));
        cutting.join().unwrap();
        again.join().unwrap();
        monitor.events().flush();
        let (started, failed) = ("migration-started", "migration-failed");
        assert_eq!(names(&path), [started, failed, started, failed]);
    }
}

/// Once the engine has paused the guest for a hand-over that succeeds, the guest runs here no more.
#[test]
fn a_guest_that_was_handed_over_is_never_shown_as_running_here() {
    for _ in 0..15 {
        let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
        let source = launching_monitor(serial.clone());
        booted(&image, &source, &serial);
        let destination = Destination::start(&sockets, "d");
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let watching = thread::spawn({
            let (source, stop, seen) = (Arc::clone(&source), Arc::clone(&stop), Arc::clone(&seen));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let state = source.info().ok().map(|info| info.state);
                    let mut seen = seen.lock().unwrap();
                    if seen.last() != Some(&state) {
                        seen.push(state);
                    }
                }
            }
        });
        source.send_migration(&wish(sockets.url("d"))).unwrap();
        stop.store(true, Ordering::Relaxed);
        watching.join().unwrap();
        let (_destination, _serial) = destination.arrived();
        let seen = seen.lock().unwrap();
        let paused = seen.iter().position(|s| *s == Some(VmState::Paused));
        let after = paused.map_or(&[][..], |at| &seen[at..]);
        assert!(!after.contains(&Some(VmState::Running)), "{seen:?}");
    }
}

/// A reader that looked at the end of one migration does not wait for the next one.
#[test]
fn the_progress_is_read_at_once() {
    let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
    let monitor = launching_monitor(serial.clone());
    booted(&image, &monitor, &serial);
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (monitor, stop) = (Arc::clone(&monitor), Arc::clone(&stop));
            thread::spawn(move || {
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let _report = monitor.migration_progress();
                    longest = longest.max(began.elapsed());
                }
                longest
            })
        })
        .collect();
    for round in 0..40 {
        let name = format!("s{round}");
        let peer = Silent::start(&sockets, &name);
        let cutting = thread::spawn(move || {
            thread::sleep(Duration::from_millis(250));
            peer.cut();
        });
        drop(monitor.send_migration(&wish(sockets.url(&name))));
        cutting.join().unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    stop.store(true, Ordering::Relaxed);
    let longest = readers.into_iter().map(|r| r.join().unwrap()).max();
    assert!(longest < Some(Duration::from_millis(200)), "{longest:?}");
}

/// The process of a monitor that ends would take the guest with it.
#[test]
fn a_monitor_that_has_ended_takes_no_guest() {
    let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
    let source = launching_monitor(serial.clone());
    booted(&image, &source, &serial);
    let destination = Destination::start(&sockets, "d");
    destination.monitor.end_all().unwrap();
    let end = destination.monitor.wait_for_end();
    destination.monitor.finish(&end);
    let sent = source.send_migration(&wish(sockets.url("d")));
    assert!(
        sent.is_err(),
        "the guest was handed over to a monitor whose process is about to exit"
    );
}

/// A completed migration that brought the guest is no reason to ignore an interrupt.
#[test]
fn an_interrupt_ends_a_monitor_whose_received_guest_was_deleted() {
    let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
    let source = launching_monitor(serial.clone());
    booted(&image, &source, &serial);
    let destination = Destination::start(&sockets, "d");
    source.send_migration(&wish(sockets.url("d"))).unwrap();
    let (monitor, _serial) = destination.arrived();
    monitor.delete().unwrap();
    monitor.interrupt();
    assert!(
        returns(move || drop(monitor.wait_for_end())),
        "the interrupt had no effect"
    );
}
