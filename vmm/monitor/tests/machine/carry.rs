//! A migration from one machine of this process to another.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use migration::{
    Attempt, DigestCheck, Limits, ReceiveOptions, Report, SendError, SendOptions, TimeoutStrategy,
    receive, send,
};
use vmm::config::DevicesConfig;
use vmm::machine::Live;
use vmm::memory::Backing;
use vmm::migrate::{Admission, MachineDestination, MachineSource};

use super::{Guest, host, wiring};

fn options() -> SendOptions {
    SendOptions {
        limits: Limits {
            downtime: Duration::from_millis(100),
            timeout: Duration::from_secs(20),
            strategy: TimeoutStrategy::Ignore,
            throttle_max: 80,
        },
        digest: DigestCheck::Compare,
        ..SendOptions::default()
    }
}

/// Result of one attempt to send a guest.
pub(crate) struct Attempted {
    pub(crate) sent: Result<Report, SendError>,
    /// The source, as it is after the attempt.
    pub(crate) source: Guest,
    /// What arrived.
    pub(crate) arrived: Option<Guest>,
}

/// Carries the guest of `source` to a new machine, whose memory is backed by `backing`.
pub(crate) fn carry(source: Guest, backing: Backing) -> Guest {
    let attempted = attempt(source, backing);
    let report = attempted.sent.unwrap();
    assert!(report.digest.is_some());
    assert!(matches!(attempted.source.machine, Live::Paused(_)));
    attempted
        .arrived
        .expect("the guest was sent and did not arrive")
}

/// Makes one attempt to send the guest of `source`.
pub(crate) fn attempt(source: Guest, backing: Backing) -> Attempted {
    let (near, far) = UnixStream::pair().unwrap();
    let receiver = thread::spawn(move || {
        let (wiring, console, ends) = wiring();
        let admission = Admission {
            memory_limit: None,
            backing,
            devices: DevicesConfig::default(),
        };
        let arrived = Arc::new(Mutex::new(None));
        let on_arrival = {
            let arrived = Arc::clone(&arrived);
            Box::new(move |machine: Live| *arrived.lock().unwrap() = Some(machine))
        };
        let mut destination = MachineDestination::new(host(), admission, wiring, on_arrival);
        let options = ReceiveOptions::default();
        receive(&mut destination, far, &options, &Attempt::arriving("test")).ok()?;
        let machine = arrived.lock().unwrap().take()?;
        Some(Guest {
            machine,
            console,
            ends,
        })
    });
    let attempt = Attempt::new("test");
    let Guest {
        machine,
        console,
        ends,
    } = source;
    let mut outgoing = MachineSource::new(machine);
    let sent = send(&mut outgoing, near, &options(), &attempt);
    let machine = outgoing
        .into_machine()
        .expect("no change of the machine panicked");
    Attempted {
        sent: sent.map(|()| attempt.report()),
        source: Guest {
            machine,
            console,
            ends,
        },
        arrived: receiver.join().unwrap(),
    }
}
