//! Machines on this host's KVM, with the guests of ferry-guest-images in them.

mod carry;
mod console;
mod platform;
mod stop;

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use console::Console;
use guest_images::dirtier::{Config, GuestReport, Pattern, Size};
use vmm::boot::Payload;
use vmm::kvm::dirty_log::DirtyLogMode;
use vmm::kvm::host::Host;
use vmm::machine::{EmptyMachine, Failed, Live, Shape, Wiring};
use vmm::memory::Backing;
use vmm::vcpu::GuestEnd;

/// Far more than anything here takes on an idle machine: only a hang reaches it.
const LIMIT: Duration = Duration::from_secs(60);

const SHAPE: Shape = Shape {
    cpus: 2,
    memory_bytes: 64 << 20,
    backing: Backing::Memfd,
    dirty_log: None,
};

fn host() -> Arc<Host> {
    Arc::new(Host::open().expect("these tests need a usable /dev/kvm"))
}

/// A wiring, what the guest prints, and how it ends.
fn wiring() -> (Wiring, Console, Receiver<GuestEnd>) {
    let (console, output) = Console::new();
    let (ender, ends) = channel();
    let on_end = Arc::new(move |end| drop(ender.send(end)));
    (
        Wiring {
            serial_output: output,
            on_end,
            on_loss: Arc::new(|device, why| panic!("{device}: {why}")),
        },
        console,
        ends,
    )
}

/// A guest, its console and its end.
struct Guest {
    machine: Live,
    console: Console,
    ends: Receiver<GuestEnd>,
}

/// Lets a machine run.
fn run(machine: Live) -> Live {
    match machine {
        Live::Paused(machine) => Live::Running(machine.resume().map_err(|f| f.error).unwrap()),
        running @ Live::Running(_) => running,
    }
}

/// Stops a machine.
fn pause(machine: Live) -> Live {
    match machine {
        Live::Running(machine) => match machine.pause() {
            Ok(machine) => Live::Paused(machine),
            Err(Failed { error, .. }) => panic!("{error}"),
        },
        paused @ Live::Paused(_) => paused,
    }
}

impl Guest {
    /// A dirtier that has populated its memory.
    fn dirtier(shape: &Shape, config: &Config) -> Self {
        let mut kernel = tempfile::NamedTempFile::new().unwrap();
        kernel.write_all(guest_images::DIRTIER).unwrap();
        let payload = Payload {
            kernel: kernel.path().to_owned(),
            initramfs: None,
            command_line: config.command_line().unwrap(),
        };
        let (wiring, console, ends) = wiring();
        let machine = EmptyMachine::new(&host(), shape)
            .unwrap()
            .boot(&payload, wiring)
            .unwrap();
        let guest = Self {
            machine: run(Live::Paused(machine)),
            console,
            ends,
        };
        guest
            .console
            .wait_for(|report| matches!(report, GuestReport::Ready { .. }));
        guest
    }

    /// The guest, running.
    fn resumed(self) -> Self {
        Self {
            machine: run(self.machine),
            ..self
        }
    }

    /// The guest, paused.
    fn paused(self) -> Self {
        Self {
            machine: pause(self.machine),
            ..self
        }
    }

    /// The guest checks all its memory, and ends.
    fn audit(&self) {
        assert_eq!(self.machine.serial().input(b"q"), 1);
        let verdict = self
            .console
            .wait_for(|report| !matches!(report, GuestReport::Status(_)));
        assert!(matches!(verdict, GuestReport::AuditPassed(_)), "{verdict}");
        assert_eq!(
            self.ends.recv_timeout(LIMIT).unwrap(),
            GuestEnd::DebugExit(0)
        );
    }
}

fn busy() -> Config {
    Config {
        cpus: 2,
        pattern: Pattern::Random,
        memory: Some(Size::from_mib(16)),
        cold: Some(Size::from_mib(4)),
        ..Config::default()
    }
}

#[test]
fn every_backing_and_every_dirty_log_carries_a_busy_guest() {
    for mode in DirtyLogMode::BEST_FIRST {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let shape = Shape {
                backing,
                dirty_log: Some(mode),
                ..SHAPE
            };
            let source = Guest::dirtier(&shape, &busy());
            carry::carry(source, Backing::Memfd).audit();
        }
    }
}

#[test]
fn a_guest_can_be_carried_on_and_on() {
    let mut guest = Guest::dirtier(&SHAPE, &busy());
    for _ in 0..5 {
        guest = carry::carry(guest, Backing::Memfd);
    }
    guest.audit();
}

#[test]
fn a_paused_guest_arrives_paused() {
    let source = Guest::dirtier(&SHAPE, &busy()).paused();
    let destination = carry::carry(source, Backing::Anonymous);
    assert!(matches!(destination.machine, Live::Paused(_)));
    destination.resumed().audit();
}
