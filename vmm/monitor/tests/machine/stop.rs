//! Stopping vCPUs: by a pause, by a notifier range, and both at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use guest_images::dirtier::{Config, Report};
use migration::source::SendError;
use vmm::memory::Backing;
use vmm::vcpu::{GuestEnd, Vcpu};

use super::{LIMIT, Running, SHAPE, busy, carry};

/// The guest answers: it runs.
fn assert_answers(guest: &Running) {
    assert_eq!(guest.machine.serial().input(b"s"), 1);
    guest
        .console
        .wait_for(|report| matches!(report, Report::Status(_)));
}

fn stops(guest: &Running) -> u64 {
    guest
        .machine
        .vcpus()
        .iter()
        .map(|vcpu| vcpu.gate().stats().stops)
        .sum()
}

#[test]
fn a_guest_is_paused_and_resumed_a_thousand_times() {
    let guest = Running::dirtier(&SHAPE, &busy());
    // A pause that comes before a vCPU has left the gate again stops nobody: not all of them count.
    let before = stops(&guest);
    let mut pauses = 0_u32;
    while stops(&guest) < before + 1000 {
        guest.machine.pause().unwrap();
        guest.machine.resume().unwrap();
        pauses += 1;
        assert!(pauses < 1_000_000, "pauses that stop nobody");
        thread::yield_now();
    }
    assert_answers(&guest);
    guest.audit();
}

/// While memory is held for a change no vCPU is in the guest, whoever pauses and resumes meanwhile.
#[test]
fn an_open_range_holds_every_vcpu_through_pauses() {
    let guest = Running::dirtier(&SHAPE, &busy());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                guest.machine.pause().unwrap();
                guest.machine.resume().unwrap();
            }
        });
        for _ in 0..200 {
            let range = guest.machine.ram().ranges().next().unwrap();
            let open = guest.machine.notifier().open(range).unwrap();
            // A vCPU in the guest would have its vCPU's lock.
            let vcpus = guest.machine.vcpus().iter().map(Vcpu::gate);
            let registers: Vec<u64> = vcpus
                .map(|gate| gate.fd().get_regs().unwrap().rip)
                .collect();
            assert_eq!(registers.len(), 2);
            drop(open);
        }
        done.store(true, Ordering::SeqCst);
    });
    guest.machine.resume().unwrap();
    guest.audit();
}

/// A guest that ends during a migration ends here, and arrives nowhere.
#[test]
fn a_guest_that_ends_while_it_is_sent_does_not_arrive() {
    // Between none and all of the rounds.
    for passes in [50, 100, 200, 400] {
        let config = Config {
            passes: Some(passes),
            ..busy()
        };
        let source = Running::dirtier(&SHAPE, &config);
        let (sent, arrived) = carry::attempt(&source, Backing::Memfd);
        match (sent, arrived) {
            (Ok(_), Some(destination)) => {
                assert!(!source.machine.is_running());
                assert_eq!(
                    destination.ends.recv_timeout(LIMIT).unwrap(),
                    GuestEnd::DebugExit(0)
                );
            }
            (Err(SendError::Guest { .. }), None) => {
                assert_eq!(
                    source.ends.recv_timeout(LIMIT).unwrap(),
                    GuestEnd::DebugExit(0)
                );
            }
            (sent, arrived) => panic!("{sent:?}, arrived: {}", arrived.is_some()),
        }
    }
}

#[test]
fn a_guest_can_be_dropped_in_any_state() {
    drop(Running::dirtier(&SHAPE, &busy()));
    let paused = Running::dirtier(&SHAPE, &busy());
    paused.machine.pause().unwrap();
    drop(paused);
}
