//! A migration from one machine of this process to another.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use migration::decide::{Limits, TimeoutStrategy};
use migration::destination::receive;
use migration::progress::{Phase, Progress, Snapshot};
use migration::source::{DigestCheck, SendError, SendOptions, send};
use migration::transport::Connection;
use vmm::carrier::{Admission, Incoming, Outgoing};
use vmm::config::DevicesConfig;
use vmm::memory::Backing;

use super::{Running, host, wiring};

const OPTIONS: SendOptions = SendOptions {
    limits: Limits {
        downtime: Duration::from_millis(100),
        timeout: Duration::from_secs(20),
        strategy: TimeoutStrategy::Ignore,
        throttle_max: 80,
    },
    digest: DigestCheck::Compare,
};

/// Carries the guest of `source` to a new machine, whose memory is backed by `backing`.
pub(crate) fn carry(source: &Running, backing: Backing) -> Running {
    let (sent, arrived) = attempt(source, backing);
    let progress = sent.unwrap();
    assert!(progress.digest.is_some());
    arrived.expect("it was sent, and did not arrive")
}

/// One attempt, and what arrived.
pub(crate) fn attempt(
    source: &Running,
    backing: Backing,
) -> (Result<Snapshot, SendError>, Option<Running>) {
    let (near, far) = UnixStream::pair().unwrap();
    let receiver = thread::spawn(move || {
        let (wiring, console, ends) = wiring();
        let admission = Admission {
            memory_limit: None,
            backing,
            devices: DevicesConfig::default(),
        };
        let mut incoming = Incoming::new(host(), admission, wiring, Box::new(|_| {}));
        let received = receive(&mut incoming, &Connection::Unix(far), &Progress::new());
        received.ok()?;
        let machine = Arc::clone(incoming.machine()?);
        Some(Running {
            machine,
            console,
            ends,
        })
    });
    let progress = Progress::new();
    progress.begin(Phase::Connecting, "test".into()).unwrap();
    let mut outgoing = Outgoing::new(Arc::clone(&source.machine));
    let sent = send(&mut outgoing, Connection::Unix(near), &OPTIONS, &progress);
    (sent.map(|()| progress.snapshot()), receiver.join().unwrap())
}
