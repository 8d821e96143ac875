//! Back ends that fail after the connection was made: they misbehave, or end.

use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use super::*;

/// Registers a callback that sends the reasons for which the back end is lost.
fn losses(disk: &VhostUser<Memory>) -> Receiver<String> {
    let (tell, losses) = channel();
    disk.on_loss(move |why| tell.send(why.to_owned()).unwrap());
    losses
}

#[test]
fn a_failed_start_has_the_driver_told() {
    for (request, reaction, why) in [
        (
            SET_FEATURES,
            Reaction::Answer(1),
            "refused (setting features)",
        ),
        (
            SET_MEM_TABLE,
            Reaction::Close,
            "closed the connection (sharing guest memory)",
        ),
        (
            SET_VRING_NUM,
            Reaction::Answer(1),
            "refused (setting up a queue)",
        ),
        (
            SET_VRING_KICK,
            Reaction::Bytes(vec![7; 20]),
            "invalid reply (starting a queue)",
        ),
        (
            SET_VRING_ENABLE,
            Reaction::Silent,
            "no answer within 5 s (starting a queue;",
        ),
        (
            SET_VRING_CALL,
            Reaction::Close,
            "closed the connection (starting a queue)",
        ),
    ] {
        let back_end = BackEnd::start(Behavior::with(request, reaction));
        let (mut driver, disk) = guest(&back_end);
        let losses = losses(&disk);
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, 16);
        driver.set(0x70, RUNNING);
        driver.wait_needs_reset();
        let error = losses.recv().unwrap();
        assert!(error.contains(why), "{request}: {error}");
        assert_eq!(
            disk.check_connected().unwrap_err().to_string(),
            format!("the back end is gone: {error}")
        );
        // After a reset, the driver can use a back end that works.
        back_end.behavior.lock().unwrap().reactions.clear();
        driver.start(0);
        write_sector(&mut driver, 5, 5);
        assert_eq!(back_end.seen().connections, 2);
    }
}

#[test]
fn rings_outside_of_memory_never_reach_the_back_end() {
    for (register, address) in [
        (0x80, LOW_END),
        (0x90, HIGH - 2),
        (0xa0, LOW_END - 64),
        (0xa4, 1),
    ] {
        let back_end = BackEnd::start(Behavior::default());
        let (mut driver, disk) = guest(&back_end);
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, 16);
        driver.set(0x44, 0);
        driver.set(register, u32::try_from(address).unwrap());
        driver.set(0x44, 1);
        driver.set(0x70, RUNNING);
        driver.wait_needs_reset();
        assert!(back_end.bodies(SET_VRING_ADDR).is_empty());
        // The driver caused the failure, so the back end is still connected.
        disk.check_connected().unwrap();
        driver.start(0);
        write_sector(&mut driver, 5, 5);
    }
}

#[test]
fn the_end_of_the_back_end_is_told_at_once_and_holds_nobody_up() {
    let mut back_end = BackEnd::start(Behavior::default());
    let (mut driver, disk) = guest(&back_end);
    let losses = losses(&disk);
    driver.start(EVENT_INDEX);
    disk.start_log().unwrap();
    write_sector(&mut driver, 1, 1);
    back_end.kill();
    driver.wait_needs_reset();
    let error = losses.recv().unwrap();
    assert!(
        error.contains("the back end closed the connection"),
        "{error}"
    );
    let began = Instant::now();
    driver.device.pause();
    disk.stop_log().unwrap();
    disk.can_log().unwrap_err();
    disk.start_log().unwrap_err();
    driver.device.resume();
    driver.notify(0);
    driver.set(0x70, 0);
    assert!(began.elapsed() < spec::REPLY_LIMIT);
    // The next driver finds no back end either.
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16);
    driver.set(0x70, RUNNING);
    driver.wait_needs_reset();
    assert!(losses.try_recv().is_err(), "the loss was reported twice");
}

/// The callback runs on the thread that supervises the connection, and must not take the device down with it.
#[test]
fn a_listener_that_panics_leaves_a_device_that_can_be_paused_and_dropped() {
    let mut back_end = BackEnd::start(Behavior::default());
    let (mut driver, disk) = guest(&back_end);
    let (tell, told) = channel();
    driver.device.on_failure(move |why| {
        tell.send(why.to_owned()).unwrap();
        panic!("injected");
    });
    driver.start(EVENT_INDEX);
    write_sector(&mut driver, 1, 1);
    back_end.kill();
    driver.wait_needs_reset();
    assert!(told.recv().unwrap().contains("closed the connection"));
    driver.device.pause();
    assert!(driver.device.save().unwrap().transport.needs_reset);
    driver.device.resume();
    disk.check_connected().unwrap_err();
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
}

#[test]
fn a_back_end_that_ends_before_there_is_a_driver_is_connected_again() {
    let back_end = BackEnd::start(Behavior::default());
    let (mut driver, disk) = guest(&back_end);
    let losses = losses(&disk);
    // The back end closes the connection at this message.
    back_end
        .behavior
        .lock()
        .unwrap()
        .reactions
        .insert(SET_FEATURES, Reaction::Close);
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16);
    driver.set(0x70, RUNNING);
    losses.recv().unwrap();
    *back_end.behavior.lock().unwrap() = Behavior {
        features: FEATURES & !FLUSH,
        ..Behavior::default()
    };
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16);
    driver.set(0x70, RUNNING);
    driver.wait_needs_reset();
    let why = driver.device.failure().unwrap();
    assert!(why.contains("the back end has changed"), "{why}");
    *back_end.behavior.lock().unwrap() = Behavior::default();
    driver.start(0);
    write_sector(&mut driver, 5, 5);
    assert!(losses.try_recv().is_err());
}

#[test]
fn requests_that_do_not_end_hold_a_pause_up_for_a_while() {
    let back_end = BackEnd::start(Behavior {
        keeps_requests: true,
        ..Behavior::default()
    });
    let (mut driver, disk) = guest(&back_end);
    let losses = losses(&disk);
    driver.start(0);
    header(&driver, 1, 1);
    driver.add(
        0,
        &[
            Part::Out(HEADER, 16),
            Part::Out(DATA, 512),
            Part::In(STATUS, 1),
        ],
    );
    driver.notify(0);
    driver.device.pause();
    let error = losses.recv().unwrap();
    assert!(
        error.contains("requests are still in flight after 10 s"),
        "{error}"
    );
    assert!(driver.device.save().unwrap().transport.needs_reset);
    disk.check_connected().unwrap_err();
}

#[test]
fn a_stop_that_is_answered_with_nonsense_loses_the_back_end() {
    for (answer, why) in [
        (0x0001_0000_0000_0000, "not an index of a split queue"),
        (1000 << 32, "1000 entries ahead"),
    ] {
        let back_end = BackEnd::start(Behavior::with(GET_VRING_BASE, Reaction::Answer(answer)));
        let (mut driver, disk) = guest(&back_end);
        let losses = losses(&disk);
        driver.start(0);
        driver.device.pause();
        let error = losses.recv().unwrap();
        assert!(error.contains(why), "{error}");
        disk.check_connected().unwrap_err();
    }
}

#[test]
fn a_back_end_without_a_log_says_so_before_it_is_asked_to_log() {
    for (features, protocol, lacks) in [
        (FEATURES & !LOG_ALL, PROTOCOL, "VHOST_F_LOG_ALL"),
        (
            FEATURES,
            PROTOCOL & !(1 << 1),
            "VHOST_USER_PROTOCOL_F_LOG_SHMFD",
        ),
    ] {
        let back_end = BackEnd::start(Behavior {
            features,
            protocol,
            ..Behavior::default()
        });
        let (mut driver, disk) = guest(&back_end);
        driver.start(0);
        for refused in [disk.can_log(), disk.start_log()] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(lacks), "{error}");
        }
        assert!(back_end.bodies(SET_LOG_BASE).is_empty());
        write_sector(&mut driver, 5, 5);
    }
}

/// A back end without REPLY_ACK may still be handling the request to log when the front end has sent it.
#[test]
fn whatever_is_written_once_the_log_has_begun_is_in_it() {
    for protocol in [PROTOCOL, PROTOCOL & !REPLY_ACK] {
        let back_end = BackEnd::start(Behavior {
            protocol,
            logs_late: true,
            ..Behavior::default()
        });
        let (mut driver, disk) = guest(&back_end);
        driver.start(EVENT_INDEX);
        disk.start_log().unwrap();
        read_sector(&mut driver, 1, DATA);
        driver.device.pause();
        assert!(taken(&disk).contains(&(DATA / 4096)), "{protocol:#x}");
    }
}

/// A vCPU may be stopped after it made a request available and before it notified the queue.
#[test]
fn a_pause_ends_requests_that_nobody_was_notified_of() {
    let back_end = BackEnd::start(Behavior::default());
    let (mut driver, disk) = guest(&back_end);
    driver.start(EVENT_INDEX);
    // After this request, the back end has handled the notifications of its start.
    write_sector(&mut driver, 1, 1);
    header(&driver, 1, 1);
    let parts = [
        Part::Out(HEADER, 16),
        Part::Out(DATA, 512),
        Part::In(STATUS, 1),
    ];
    let head = driver.add(0, &parts);
    driver.device.pause();
    disk.check_connected().unwrap();
    assert_eq!(driver.used(0), Some((head, 1)));
}

/// An invalid available index does not count as a request.
#[test]
fn an_index_far_ahead_holds_up_no_pause() {
    let back_end = BackEnd::start(Behavior {
        keeps_requests: true,
        ..Behavior::default()
    });
    let (mut driver, disk) = guest(&back_end);
    driver.start(0);
    driver.set_available_index(0, 1000);
    driver.device.pause();
    disk.check_connected().unwrap();
}

#[test]
fn a_guest_is_not_taken_by_a_back_end_that_cannot_have_its_memory() {
    for refused in [SET_MEM_TABLE, SET_FEATURES] {
        let back_end = BackEnd::start(Behavior::default());
        let (mut driver, _disk) = guest(&back_end);
        driver.start(EVENT_INDEX);
        write_sector(&mut driver, 1, 1);
        driver.device.pause();
        let other = BackEnd::start(Behavior::with(refused, Reaction::Close));
        let (_driver, disk) = moved(driver, &other);
        disk.check_connected().unwrap_err();
    }
}

#[test]
fn why_a_back_end_was_lost_is_known_after_a_reset() {
    let back_end = BackEnd::start(Behavior::with(SET_FEATURES, Reaction::Close));
    let (mut driver, disk) = guest(&back_end);
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16);
    driver.set(0x70, RUNNING);
    driver.wait_needs_reset();
    driver.set(0x70, 0);
    let error = disk.check_connected().unwrap_err().to_string();
    assert!(error.contains("closed the connection"), "{error}");
}

#[test]
fn a_log_that_is_answered_with_nonsense_loses_the_back_end() {
    let other_request = [7_u32, 5, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    let too_long = [6_u32, 5, 1 << 30]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    for (reaction, why) in [
        (Reaction::Bytes(other_request), "request 7"),
        (Reaction::Bytes(too_long), "1073741824 bytes"),
        (
            Reaction::Close,
            "closed the connection (sharing the dirty log)",
        ),
        (
            Reaction::Silent,
            "no answer within 5 s (sharing the dirty log;",
        ),
    ] {
        let back_end = BackEnd::start(Behavior::with(SET_LOG_BASE, reaction));
        let (mut driver, disk) = guest(&back_end);
        driver.start(0);
        let error = disk.start_log().unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        driver.wait_needs_reset();
        disk.stop_log().unwrap();
    }
}
