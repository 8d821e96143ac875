//! The devices that every machine has, as their state tells of them.

use guest_images::dirtier::Config;
use migration::Section;
use vm_memory::{Bytes, GuestAddress};
use vmm::kvm::time::MachineTime;
use vmm::machine::{EmptyMachine, Live};
use vmm::memory::Backing;

use super::{Guest, SHAPE, busy, carry, host, wiring};

/// Saves a paused guest, and returns the state of one section.
fn state(guest: &Guest, section: &str) -> Vec<u8> {
    let sections = save(guest);
    let mut found = sections.into_iter().filter(|s| s.kind.name == section);
    found.next().unwrap().data
}

fn save(guest: &Guest) -> Vec<Section> {
    let Live::Paused(machine) = &guest.machine else {
        panic!("the guest is not paused");
    };
    machine.save().unwrap()
}

fn generation_id(guest: &Guest) -> [u8; 16] {
    let mut id = [0; 16];
    let memory = guest.machine.ram().memory();
    memory.read_slice(&mut id, GuestAddress(0xf_f000)).unwrap();
    id
}

/// This guest reads no events: what it was told waits for it, and goes with it.
#[test]
fn what_the_guest_was_told_is_carried_with_it() {
    let source = Guest::dirtier(&SHAPE, &busy()).paused();
    let before = (state(&source, "acpi"), generation_id(&source));
    source.machine.power_button().unwrap();
    let pressed = state(&source, "acpi");
    assert_ne!(pressed, before.0);
    source.machine.change_generation().unwrap();
    let told = (state(&source, "acpi"), generation_id(&source));
    assert_ne!(told.0, pressed);
    assert_ne!(told.1, before.1);
    let clock = state(&source, "rtc");
    let destination = carry::carry(source, Backing::Memfd);
    let there = (state(&destination, "acpi"), generation_id(&destination));
    assert_eq!(there, told);
    // A guest that never asked for the time has what it had.
    assert_eq!(state(&destination, "rtc"), clock);
    destination.resumed().audit();
}

#[test]
fn a_clock_for_each_vcpu_is_demanded() {
    let source = Guest::dirtier(&SHAPE, &busy()).paused();
    let mut sections = save(&source);
    for section in &mut sections {
        if section.kind.name == "time" {
            let time = MachineTime {
                tsc: vec![Some(1)],
                clock_ns: 1,
            };
            section.data = devices::encode_state(&time);
        }
    }
    let empty = EmptyMachine::new(&host(), &SHAPE).unwrap();
    let (wiring, _console, _ends) = wiring();
    let restored = empty.restore(&sections, source.machine.cpuid().to_vec(), wiring);
    let error = restored.err().unwrap().to_string();
    assert_eq!(error, "section time: 1 counters for 2 vCPUs");
}

#[test]
fn a_guest_that_has_ended_hears_nothing() {
    let guest = Guest::dirtier(&SHAPE, &Config::default());
    guest.audit();
    let refused = [
        guest.machine.power_button(),
        guest.machine.change_generation(),
    ];
    for refused in refused {
        assert_eq!(refused.unwrap_err().to_string(), "the guest has ended");
    }
}
