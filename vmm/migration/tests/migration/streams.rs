//! Every kind of stream carries a guest, also one that the engine has never heard of.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;

use migration::{Attempt, Halves, Phase, SendError, Stream, memory_pair, receive, send};

use crate::guest::EmptyGuest;
use crate::{Setup, assert_alive_and_whole, assert_stayed, running_guest};

fn carry<S: Stream + Send + 'static>((near, far): (S, S)) {
    let (world, mut source) = running_guest();
    let Setup {
        send: options,
        receive: receive_options,
        sending,
        receiving,
        ..
    } = Setup::default();
    let mut empty = EmptyGuest::new(&world);
    let receiver = thread::spawn({
        let receiving = receiving.clone();
        move || {
            let received = receive(&mut empty, far, &receive_options, &receiving);
            (received, empty.take())
        }
    });
    send(&mut source, near, &options, &sending).unwrap();
    let (received, arrived) = receiver.join().unwrap();
    assert_eq!(received.unwrap().unconfirmed, None);
    assert_alive_and_whole(&mut arrived.unwrap());
    assert_eq!(world.most(), 1);
    let (here, there) = (sending.report(), receiving.report());
    assert_eq!(
        (here.phase, there.phase),
        (Phase::Completed, Phase::Completed)
    );
    assert_eq!(here.digest, there.digest);
    assert!(here.digest.is_some());
}

#[test]
fn unix_sockets() {
    carry(UnixStream::pair().unwrap());
}

#[test]
fn tcp_connections() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    carry((near, listener.accept().unwrap().0));
}

#[test]
fn buffers_in_memory_of_any_size() {
    for capacity in [500, 4096, 1 << 20] {
        carry(memory_pair(capacity));
    }
}

/// A stream of another crate: no descriptor, no timeouts, no vectored writes.
struct Foreign(Halves);

impl Stream for Foreign {
    fn split(self) -> io::Result<Halves> {
        let Halves {
            reader,
            writer,
            end,
        } = self.0;
        let writer = OneSlice(writer);
        Ok(Halves::new(reader, writer, move |half| end(half)))
    }
}

struct OneSlice(Box<dyn io::Write + Send>);

impl io::Write for OneSlice {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[test]
fn a_foreign_stream() {
    let (near, far) = memory_pair(10_000);
    let foreign = |stream: migration::MemoryStream| Foreign(stream.split().unwrap());
    carry((foreign(near), foreign(far)));
}

/// A stream that cannot be split, or panics.
struct Broken(fn() -> io::Result<Halves>);

impl Stream for Broken {
    fn split(self) -> io::Result<Halves> {
        (self.0)()
    }
}

#[test]
fn a_stream_that_fails_or_panics_at_once_leaves_the_guest_alone() {
    let broken: [fn() -> io::Result<Halves>; 2] =
        [|| Err(io::Error::other("injected")), || panic!("injected")];
    for split in broken {
        let (world, mut source) = running_guest();
        let attempt = Attempt::new("test");
        let error = send(&mut source, Broken(split), &Setup::default().send, &attempt).unwrap_err();
        assert!(error.to_string().contains("injected"), "{error}");
        assert_eq!(attempt.report().phase, Phase::Failed);
        assert_stayed(&world, source);
    }
}

/// A writer that panics at its `n`th write.
struct PanickingWriter {
    writer: Box<dyn io::Write + Send>,
    writes_left: usize,
}

impl io::Write for PanickingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writes_left = self.writes_left.checked_sub(1).expect("injected");
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

#[test]
fn a_stream_that_panics_later_never_makes_two() {
    for writes in 0..200 {
        let (world, mut source) = running_guest();
        let (near, far) = memory_pair(1 << 20);
        let Halves {
            reader,
            writer,
            end,
        } = near.split().unwrap();
        let writer = PanickingWriter {
            writer,
            writes_left: writes,
        };
        let near = Halves::new(reader, writer, move |half| end(half));
        let mut empty = EmptyGuest::new(&world);
        let options = Setup::default().receive;
        let receiver = thread::spawn(move || {
            let received = receive(&mut empty, far, &options, &Attempt::arriving("test"));
            (received, empty.take())
        });
        let sent = send(
            &mut source,
            near,
            &Setup::default().send,
            &Attempt::new("test"),
        );
        let (_, arrived) = receiver.join().unwrap();
        assert_eq!(world.most(), 1, "{writes} writes");
        match sent {
            Ok(()) => {
                assert!(arrived.is_some() && !source.is_running());
                return;
            }
            Err(SendError::Unconfirmed(_)) => assert!(!source.is_running(), "{writes} writes"),
            Err(_) => {
                assert!(arrived.is_none(), "{writes} writes");
                assert!(source.is_running(), "{writes} writes");
            }
        }
    }
    panic!("no number of writes was enough");
}
