//! Stopping vCPUs: by a pause, by a notifier range, and both at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use guest_images::dirtier::{Config, GuestReport};
use migration::SendError;
use vmm::memory::Backing;
use vmm::vcpu::{GuestEnd, Vcpu};

use vmm::machine::Live;

use super::{Guest, LIMIT, SHAPE, busy, carry, pause, run};

/// The guest answers: it runs.
fn assert_answers(guest: &Guest) {
    assert_eq!(guest.machine.serial().input(b"s"), 1);
    guest
        .console
        .wait_for(|report| matches!(report, GuestReport::Status(_)));
}

fn stops(guest: &Guest) -> u64 {
    guest
        .machine
        .vcpus()
        .iter()
        .map(|vcpu| vcpu.gate().stats().stops)
        .sum()
}

#[test]
fn a_guest_is_paused_and_resumed_a_thousand_times() {
    let mut guest = Guest::dirtier(&SHAPE, &busy());
    // A pause that comes before a vCPU has left the gate again stops nobody: not all of them count.
    let before = stops(&guest);
    let mut pauses = 0_u32;
    while stops(&guest) < before + 1000 {
        guest = guest.paused().resumed();
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
    let Guest {
        mut machine,
        console,
        ends,
    } = Guest::dirtier(&SHAPE, &busy());
    let range = machine.ram().ranges().next().unwrap();
    let notifier = machine.notifier().clone();
    let gates: Vec<_> = machine.vcpus().iter().map(Vcpu::gate).cloned().collect();
    let done = AtomicBool::new(false);
    let machine = thread::scope(|scope| {
        let pausing = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                machine = run(pause(machine));
            }
            machine
        });
        for _ in 0..200 {
            let open = notifier.open(range).unwrap();
            // A vCPU in the guest would have its vCPU's lock.
            let registers: Vec<u64> = gates
                .iter()
                .map(|gate| gate.fd().get_regs().unwrap().rip)
                .collect();
            assert_eq!(registers.len(), 2);
            drop(open);
        }
        done.store(true, Ordering::SeqCst);
        pausing.join().unwrap()
    });
    let guest = Guest {
        machine,
        console,
        ends,
    };
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
        let source = Guest::dirtier(&SHAPE, &config);
        let carry::Attempted {
            sent,
            source,
            arrived,
        } = carry::attempt(source, Backing::Memfd);
        match (sent, arrived) {
            (Ok(_), Some(destination)) => {
                assert!(matches!(source.machine, Live::Paused(_)));
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
    drop(Guest::dirtier(&SHAPE, &busy()));
    drop(Guest::dirtier(&SHAPE, &busy()).paused());
}
