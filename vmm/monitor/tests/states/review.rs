//! REVIEW: tests that fail on the reviewed commit, one for each real fault that was found. Each says what should hold.

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

/// `begin_sending` waits for the worker lock with the state locked; the receiving worker locks the state.
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

/// `after()` drops PowerOff and DebugExit in any state but Ended; the state is Sending then, and nobody tells again.
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

/// The unlucky end of a window: the worker tells how the migration ended after it has let go of the guest.
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

/// `Sending::vm_state` knows Switchover and Committed, and says Running for the phases of the end.
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

/// `migration_progress` waits for the worker of the next migration if it looked at the end of the last one.
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

/// A monitor that ends (SIGTERM, shutdown-vmm) still takes a guest until its process is gone, and confirms it.
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

/// `interrupt` does nothing if the last migration is complete and there is no guest.
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

/// Passes on the reviewed commit: twenty migrations to and fro between two monitors of one process leave nothing open.
#[test]
fn migrations_to_and_fro_leave_no_descriptor_and_no_thread() {
    use vmm::config::{BalloonConfig, DevicesConfig, SerialConfig};
    use vmm::migrate::{Admission, Url};
    use vmm::monitor::Reception;

    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let resident = || {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4
    };
    let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
    let first = launching_monitor(serial.clone());
    booted(&image, &first, &serial);
    let mut here = first;
    let mut there = Monitor::new(None, Events::nowhere());
    let mut figures = Vec::new();
    for round in 0..40 {
        let name = format!("p{round}");
        let url: Url = sockets.url(&name).parse().unwrap();
        let reception = Reception {
            host: host(),
            listener: Arc::new(url.listen().unwrap()),
            admission: Admission {
                memory_limit: None,
                backing: vmm::memory::Backing::Memfd,
                devices: DevicesConfig {
                    balloon: Some(BalloonConfig::default()),
                    ..DevicesConfig::default()
                },
            },
            serial: SerialConfig::default(),
            serial_backend: Arc::new(serial.clone()),
        };
        let receiving = thread::spawn({
            let there = Arc::clone(&there);
            move || there.receive_guest(&reception)
        });
        here.send_migration(&wish(sockets.url(&name))).unwrap();
        here.release();
        receiving.join().unwrap();
        std::mem::swap(&mut here, &mut there);
        thread::sleep(Duration::from_millis(20));
        figures.push((count("fd"), count("task"), resident()));
    }
    println!("{:?} {:?} {:?}", figures[1], figures[19], figures[39]);
    assert_eq!(figures[1].0, figures[39].0, "descriptors: {figures:?}");
    assert_eq!(figures[1].1, figures[39].1, "threads: {figures:?}");
}
