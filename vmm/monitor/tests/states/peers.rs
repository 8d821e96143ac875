//! The other sides of migrations: one that takes the guest, one that is silent, one whose confirmation is lost.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use migration::{Attempt, Halves, ReceiveOptions, Stream, receive};
use tempfile::TempDir;
use vmm::config::{BalloonConfig, DevicesConfig, SerialConfig};
use vmm::events::Events;
use vmm::machine::{Live, Wiring};
use vmm::memory::Backing;
use vmm::migrate::{Admission, MachineDestination, Url};
use vmm::monitor::{Monitor, Reception};

use crate::guest::{TestSerial, host};

/// A folder for sockets.
pub(crate) struct Sockets(TempDir);

impl Sockets {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn url(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }
}

/// The devices of the guest, which a destination must have too.
fn admission() -> Admission {
    Admission {
        memory_limit: None,
        backing: Backing::Memfd,
        devices: DevicesConfig {
            balloon: Some(BalloonConfig::default()),
            ..DevicesConfig::default()
        },
    }
}

/// A monitor that receives a guest at the socket `name`.
pub(crate) struct Destination {
    pub(crate) monitor: Arc<Monitor>,
    pub(crate) serial: TestSerial,
    receiving: JoinHandle<()>,
}

impl Destination {
    pub(crate) fn start(sockets: &Sockets, name: &str) -> Self {
        let url: Url = sockets.url(name).parse().unwrap();
        let listener = Arc::new(url.listen().unwrap());
        let monitor = Monitor::new(None, Events::nowhere());
        let serial = TestSerial::default();
        let reception = Reception {
            host: host(),
            listener,
            admission: admission(),
            serial: SerialConfig::default(),
            serial_backend: Arc::new(serial.clone()),
        };
        let receiving = thread::spawn({
            let monitor = Arc::clone(&monitor);
            move || monitor.receive_guest(&reception)
        });
        Self {
            monitor,
            serial,
            receiving,
        }
    }

    /// The monitor, once the guest has arrived.
    pub(crate) fn arrived(self) -> (Arc<Monitor>, TestSerial) {
        self.receiving.join().unwrap();
        (self.monitor, self.serial)
    }
}

/// Accepts one connection at the socket `name` and says nothing, until it is dropped.
pub(crate) struct Silent {
    accepted: Option<JoinHandle<UnixStream>>,
}

impl Silent {
    pub(crate) fn start(sockets: &Sockets, name: &str) -> Self {
        let listener = UnixListener::bind(sockets.path(name)).unwrap();
        let accepted = thread::spawn(move || listener.accept().unwrap().0);
        Self {
            accepted: Some(accepted),
        }
    }

    /// Ends the connection.
    pub(crate) fn cut(mut self) {
        let stream = self.accepted.take().unwrap().join().unwrap();
        // The other side may have ended it already.
        let _ended = stream.shutdown(Shutdown::Both);
    }
}

/// Takes a guest at the socket `name`, and loses the connection instead of confirming it. The guest is dropped there.
pub(crate) fn lose_confirmation(sockets: &Sockets, name: &str) -> JoinHandle<()> {
    let listener = UnixListener::bind(sockets.path(name)).unwrap();
    thread::spawn(move || {
        let stream = listener.accept().unwrap().0;
        let arrived = Arc::new(Mutex::new(None));
        let on_arrival = {
            let arrived = Arc::clone(&arrived);
            Box::new(move |machine: Live| *arrived.lock().unwrap() = Some(machine))
        };
        let wiring = Wiring {
            serial_output: Box::new(io::sink()),
            on_end: Arc::new(|_| {}),
            on_loss: Arc::new(|device, why| panic!("{device}: {why}")),
        };
        let mut destination = MachineDestination::new(host(), admission(), wiring, on_arrival);
        let options = ReceiveOptions::default();
        let attempt = Attempt::arriving("test");
        let received = receive(&mut destination, WithoutDone(stream), &options, &attempt);
        assert!(received.unwrap().unconfirmed.is_some());
        drop(arrived.lock().unwrap().take());
    })
}

/// A connection that ends where DONE would be written.
struct WithoutDone(UnixStream);

/// Tag of a DONE frame.
const DONE: u32 = 21;

impl Stream for WithoutDone {
    fn split(self) -> io::Result<Halves> {
        let (reader, writer) = (self.0.try_clone()?, self.0.try_clone()?);
        let writer = UntilDone(writer);
        Ok(Halves::new(reader, writer, move |half| {
            // The direction may have ended already.
            let _ended = self.0.shutdown(half);
        }))
    }
}

struct UntilDone(UnixStream);

impl Write for UntilDone {
    /// Frames that go to the source are written by one call each, and begin with their tag.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.starts_with(&DONE.to_le_bytes()) {
            self.0.shutdown(Shutdown::Both)?;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
