//! Proxy between the two sides of a migration that injects faults.
//!
//! The source connects to the proxy, and the proxy connects to the destination. It relays every byte unchanged until a
//! [`Fault`] fires: it cuts the connection, stalls it, flips a bit or replaces the header, at an offset, at a sequence
//! of bytes, at a frame, or when the test says so. Each fault fires once, so that a second migration through the same
//! proxy succeeds.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::endpoint::{Endpoint, Listener, Stream};
use crate::frames::{Frames, Tag};
use crate::header::{self, Change};

/// Direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the source, which connects.
    ToDestination,
    /// From the destination, which listens.
    ToSource,
}

/// Position at which a fault fires, in one direction of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Before the byte at this offset, counted from 0.
    Offset(u64),
    /// Before the first byte of this sequence.
    Sequence(Vec<u8>),
    /// Before the frame with this tag that has this number of frames with the same tag before it.
    Frame(Tag, usize),
}

/// Effect of a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Closes the connection in both directions.
    Cut,
    /// Stops relaying in both directions. The connections stay open.
    Stall,
    /// Inverts these bits of the byte and goes on relaying.
    Flip(u8),
    /// Changes the header of the source. Fires when the header is complete, whatever its trigger. If the header cannot
    /// be changed, the connection is closed.
    Rewrite(Change),
}

/// Fault to inject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Direction that the trigger refers to.
    pub direction: Direction,
    /// Position at which the fault fires.
    pub trigger: Trigger,
    /// Effect of the fault.
    pub action: Action,
}

/// Running proxy. Dropping it closes its connections and frees its endpoint.
#[derive(Debug)]
pub struct Proxy {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    to_destination: AtomicU64,
    to_source: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<Fault>,
    fired: usize,
    stalled: bool,
    closed: bool,
    /// Both ends of every connection, for closing them.
    open: Vec<Stream>,
}

impl Proxy {
    /// Starts a proxy that listens on `listen` and relays to `target`. TCP port 0 stands for any free port.
    ///
    /// # Errors
    /// Returns the error of the operating system if it cannot listen.
    pub fn start(listen: &Endpoint, target: Endpoint, faults: Vec<Fault>) -> io::Result<Self> {
        let listener = listen.listen()?;
        let endpoint = listener.endpoint()?;
        let state = Mutex::new(State {
            faults,
            ..State::default()
        });
        let shared = Arc::new(Shared {
            state,
            ..Shared::default()
        });
        let own = Arc::clone(&shared);
        thread::spawn(move || own.accept(&listener, &target));
        Ok(Self { endpoint, shared })
    }

    /// Returns the endpoint to which the source connects.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Returns the number of bytes relayed so far over all connections.
    pub fn passed(&self, direction: Direction) -> u64 {
        self.shared.counter(direction).load(Ordering::Acquire)
    }

    /// Returns the number of faults that have fired.
    pub fn fired(&self) -> usize {
        self.shared.lock().fired
    }

    /// Adds a fault. It fires only at bytes that arrive from now on; offsets still count from the start of the
    /// connection.
    pub fn add(&self, fault: Fault) {
        self.shared.lock().faults.push(fault);
    }

    /// Closes all connections.
    pub fn cut(&self) {
        self.shared.cut(&mut self.shared.lock());
    }

    /// Stops relaying in both directions without closing a connection.
    pub fn stall(&self) {
        self.shared.lock().stalled = true;
    }

    /// Resumes relaying after a stall, beginning with the bytes that were held back.
    pub fn resume(&self) {
        self.shared.lock().stalled = false;
        self.shared.changed.notify_all();
    }

    /// Waits until this number of bytes has been relayed. Returns false if it takes longer than the limit.
    pub fn wait_passed(&self, direction: Direction, bytes: u64, limit: Duration) -> bool {
        wait_until(limit, || self.passed(direction) >= bytes)
    }

    /// Waits until this number of faults has fired. Returns false if it takes longer than the limit.
    pub fn wait_fired(&self, count: usize, limit: Duration) -> bool {
        wait_until(limit, || self.fired() >= count)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        self.shared.cut(&mut state);
        drop(state);
        // The listening thread blocks in accept; a connection wakes it up, so that it can end.
        drop(self.endpoint.connect());
        if let Endpoint::Unix(path) = &self.endpoint {
            // The socket may have been removed already.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn wait_until(limit: Duration, done: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_micros(200));
    }
    true
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counter(&self, direction: Direction) -> &AtomicU64 {
        match direction {
            Direction::ToDestination => &self.to_destination,
            Direction::ToSource => &self.to_source,
        }
    }

    /// Closes all connections and ends a stall. New connections are still accepted.
    fn cut(&self, state: &mut State) {
        state
            .open
            .drain(..)
            .for_each(|stream| stream.shutdown(Shutdown::Both));
        state.stalled = false;
        self.changed.notify_all();
    }

    fn accept(self: &Arc<Self>, listener: &Listener, target: &Endpoint) {
        while let Ok(source) = listener.accept() {
            if self.lock().closed {
                return;
            }
            // If no destination listens, the source sees its connection close at once.
            match target
                .connect()
                .and_then(|destination| self.join(&source, &destination))
            {
                Ok(()) => {}
                Err(_) => source.shutdown(Shutdown::Both),
            }
        }
    }

    fn join(self: &Arc<Self>, source: &Stream, destination: &Stream) -> io::Result<()> {
        let to_destination = (source.try_clone()?, destination.try_clone()?);
        let to_source = (destination.try_clone()?, source.try_clone()?);
        self.lock()
            .open
            .extend([source.try_clone()?, destination.try_clone()?]);
        self.pump(Direction::ToDestination, to_destination);
        self.pump(Direction::ToSource, to_source);
        Ok(())
    }

    fn pump(self: &Arc<Self>, direction: Direction, (mut from, mut to): (Stream, Stream)) {
        let shared = Arc::clone(self);
        thread::spawn(move || {
            let mut lane = Lane::new(shared, direction);
            let mut chunk = vec![0; 64 << 10];
            while let Ok(count @ 1..) = from.read(&mut chunk) {
                if lane.pass(&chunk[..count], &mut to).is_err() {
                    return;
                }
            }
            // Only this direction has ended; the other can still carry bytes.
            if lane.release(&mut to).is_ok() {
                to.shutdown(Shutdown::Write);
            }
        });
    }
}

/// Relay for one direction of one connection.
struct Lane {
    shared: Arc<Shared>,
    direction: Direction,
    /// Offset of the next byte to relay.
    offset: u64,
    /// Bytes held back because they can begin a sequence of a trigger.
    held: Vec<u8>,
    frames: Frames,
}

impl Lane {
    fn new(shared: Arc<Shared>, direction: Direction) -> Self {
        let frames = Frames::new(direction == Direction::ToDestination);
        Self {
            shared,
            direction,
            offset: 0,
            held: Vec::new(),
            frames,
        }
    }

    /// Relays bytes up to the first fault that closes the connection.
    fn pass(&mut self, bytes: &[u8], to: &mut Stream) -> io::Result<()> {
        self.held.extend_from_slice(bytes);
        self.frames.feed(bytes);
        while let Some((fault, at)) = self.due() {
            self.forward(at, to)?;
            self.carry_out(fault.action, to)?;
        }
        let certain = self.held.len() - self.undecided();
        self.forward(certain, to)
    }

    /// Relays the bytes that were held back, because no more bytes will arrive.
    fn release(&mut self, to: &mut Stream) -> io::Result<()> {
        self.forward(self.held.len(), to)
    }

    /// Removes the fault that fires first in the held bytes. Returns it with the number of bytes before it.
    fn due(&mut self) -> Option<(Fault, usize)> {
        // Drops the frames that have been relayed.
        self.frames.starts_from(self.offset);
        let mut state = self.shared.lock();
        let places = state
            .faults
            .iter()
            .enumerate()
            .filter_map(|(index, fault)| {
                let at = (fault.direction == self.direction).then(|| self.place(fault))??;
                Some((at, index))
            });
        let (at, index) = places.min()?;
        state.fired += 1;
        Some((state.faults.remove(index), at))
    }

    fn place(&self, fault: &Fault) -> Option<usize> {
        if let Action::Rewrite(_) = fault.action {
            return self.header().map(|_| 0);
        }
        match &fault.trigger {
            Trigger::Offset(offset) => self.within(*offset),
            Trigger::Frame(tag, before) => {
                let wanted = (*tag as u32, *before);
                let mut starts = self.frames.starts().iter();
                self.within(
                    starts
                        .find(|start| (start.tag, start.before) == wanted)?
                        .offset,
                )
            }
            Trigger::Sequence(bytes) if bytes.is_empty() => None,
            Trigger::Sequence(bytes) => self
                .held
                .windows(bytes.len())
                .position(|window| window == bytes),
        }
    }

    /// Returns the length of the header if it is complete.
    fn header(&self) -> Option<usize> {
        let length = header::complete_length(&self.held)?;
        (self.offset == 0).then_some(length)
    }

    /// Returns the position of an offset within the held bytes.
    fn within(&self, offset: u64) -> Option<usize> {
        let at = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        (at < self.held.len()).then_some(at)
    }

    /// Returns the length of the longest suffix of the held bytes that is a prefix of a trigger's sequence.
    fn undecided(&self) -> usize {
        let state = self.shared.lock();
        let own = state
            .faults
            .iter()
            .filter(|fault| fault.direction == self.direction);
        own.map(|fault| match (&fault.action, &fault.trigger) {
            (Action::Rewrite(_), _) if self.offset == 0 => self.held.len(),
            (Action::Rewrite(_), _) | (_, Trigger::Offset(_)) => 0,
            (_, Trigger::Sequence(bytes)) => overlap(&self.held, bytes),
            (_, Trigger::Frame(..)) => self.frames.undecided().min(self.held.len()),
        })
        .max()
        .unwrap_or(0)
    }

    fn carry_out(&mut self, action: Action, to: &mut Stream) -> io::Result<()> {
        match action {
            Action::Flip(bits) => {
                if let Some(byte) = self.held.first_mut() {
                    *byte ^= bits;
                }
                Ok(())
            }
            Action::Stall => {
                self.shared.lock().stalled = true;
                Ok(())
            }
            Action::Cut => self.end(),
            Action::Rewrite(change) => self.rewrite(&change, to),
        }
    }

    fn end(&self) -> io::Result<()> {
        self.shared.cut(&mut self.shared.lock());
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Replaces the header. Offsets keep counting the bytes of the source.
    fn rewrite(&mut self, change: &Change, to: &mut Stream) -> io::Result<()> {
        let length = self.header().unwrap_or_default();
        let Ok(other) = header::changed(&self.held[..length], change) else {
            return self.end();
        };
        to.write_all(&other)?;
        self.passed_on(length);
        Ok(())
    }

    fn forward(&mut self, count: usize, to: &mut Stream) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        self.wait_while_stalled();
        to.write_all(&self.held[..count])?;
        self.passed_on(count);
        Ok(())
    }

    fn passed_on(&mut self, count: usize) {
        self.held.drain(..count);
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.offset += count;
        self.shared
            .counter(self.direction)
            .fetch_add(count, Ordering::AcqRel);
    }

    fn wait_while_stalled(&self) {
        let mut state = self.shared.lock();
        while state.stalled && !state.closed {
            let woken = self.shared.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn overlap(held: &[u8], sequence: &[u8]) -> usize {
    let most = held.len().min(sequence.len().saturating_sub(1));
    (1..=most)
        .rev()
        .find(|count| held.ends_with(&sequence[..*count]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    const SOON: Duration = Duration::from_millis(100);
    const LATE: Duration = Duration::from_secs(10);

    /// Starts a destination that echoes. It returns the bytes that it received.
    fn echo(endpoint: &Endpoint) -> (Endpoint, Receiver<Vec<u8>>) {
        let listener = endpoint.listen().unwrap();
        let place = listener.endpoint().unwrap();
        let (sender, receiver) = channel();
        thread::spawn(move || {
            while let Ok(mut stream) = listener.accept() {
                let (mut all, mut chunk) = (Vec::new(), [0; 100]);
                while let Ok(count @ 1..) = stream.read(&mut chunk) {
                    all.extend_from_slice(&chunk[..count]);
                    let _ = stream.write_all(&chunk[..count]);
                }
                if sender.send(all).is_err() {
                    return;
                }
            }
        });
        (place, receiver)
    }

    fn any_port() -> Endpoint {
        Endpoint::Tcp(([127, 0, 0, 1], 0).into())
    }

    fn with(faults: Vec<Fault>) -> (Proxy, Receiver<Vec<u8>>) {
        let (place, received) = echo(&any_port());
        (Proxy::start(&any_port(), place, faults).unwrap(), received)
    }

    fn fault(direction: Direction, trigger: Trigger, action: Action) -> Fault {
        Fault {
            direction,
            trigger,
            action,
        }
    }

    /// Sends bytes, closes the direction, and returns all bytes that come back.
    fn converse(proxy: &Proxy, bytes: &[u8]) -> Vec<u8> {
        let mut stream = proxy.endpoint().connect().unwrap();
        stream.set_read_timeout(Some(LATE)).unwrap();
        // Both can fail if the proxy closes the connection; the test checks only the bytes that came back.
        let _ = stream.write_all(bytes);
        stream.shutdown(Shutdown::Write);
        let mut back = Vec::new();
        let _ = stream.read_to_end(&mut back);
        back
    }

    #[test]
    fn without_faults_every_byte_passes_on_both_kinds_of_socket() {
        let folder = tempfile::tempdir().unwrap();
        let unix = |name| Endpoint::Unix(folder.path().join(name));
        let bytes: Vec<u8> = (0..=250).cycle().take(300_000).collect();
        for (listen, target) in [(any_port(), any_port()), (unix("proxy"), unix("target"))] {
            let (place, received) = echo(&target);
            let proxy = Proxy::start(&listen, place, Vec::new()).unwrap();
            let back = thread::scope(|scope| {
                let mut stream = proxy.endpoint().connect().unwrap();
                let mut writer = stream.try_clone().unwrap();
                let bytes = &bytes;
                scope.spawn(move || {
                    writer.write_all(bytes).unwrap();
                    writer.shutdown(Shutdown::Write);
                });
                let mut back = Vec::new();
                stream.read_to_end(&mut back).unwrap();
                back
            });
            assert!(back == bytes && received.recv_timeout(LATE).unwrap() == bytes);
            assert_eq!(
                (proxy.passed(Direction::ToDestination), proxy.fired()),
                (300_000, 0)
            );
        }
    }

    #[test]
    fn a_cut_after_n_bytes_passes_exactly_n() {
        for offset in [0, 1, 7, 99] {
            let trigger = Trigger::Offset(offset);
            let (proxy, received) =
                with(vec![fault(Direction::ToDestination, trigger, Action::Cut)]);
            converse(&proxy, &[7; 100]);
            let arrived = received.recv_timeout(LATE).unwrap();
            assert_eq!(u64::try_from(arrived.len()).unwrap(), offset);
            assert_eq!(converse(&proxy, b"second try"), b"second try");
        }
    }

    #[test]
    fn a_cut_of_the_answers_leaves_the_requests() {
        let trigger = Trigger::Offset(3);
        let (proxy, received) = with(vec![fault(Direction::ToSource, trigger, Action::Cut)]);
        assert!(b"abc".starts_with(&converse(&proxy, b"abcdef")));
        assert_eq!(received.recv_timeout(LATE).unwrap(), b"abcdef");
        assert_eq!(proxy.passed(Direction::ToSource), 3);
    }

    #[test]
    fn one_byte_is_flipped() {
        let (trigger, flip) = (Trigger::Offset(4), Action::Flip(0x20));
        let (proxy, received) = with(vec![fault(Direction::ToDestination, trigger, flip)]);
        assert_eq!(converse(&proxy, b"abcdefgh"), b"abcdEfgh");
        assert_eq!(received.recv_timeout(LATE).unwrap(), b"abcdEfgh");
        assert_eq!(
            (proxy.fired(), converse(&proxy, b"abcdefgh")),
            (1, b"abcdefgh".to_vec())
        );
    }

    #[test]
    fn a_sequence_is_seen_across_writes_and_not_passed_on() {
        let trigger = Trigger::Sequence(b"COMMIT".to_vec());
        let (proxy, received) = with(vec![fault(Direction::ToDestination, trigger, Action::Cut)]);
        let mut stream = proxy.endpoint().connect().unwrap();
        for piece in [&b"pages COM"[..], b"MA, COM", b"MIT"] {
            stream.write_all(piece).unwrap();
            thread::sleep(SOON / 4);
        }
        assert!(proxy.wait_fired(1, LATE));
        assert_eq!(received.recv_timeout(LATE).unwrap(), b"pages COMMA, ");
    }

    #[test]
    fn a_frame_is_cut_off_whole() {
        let reply = |tag: Tag| [tag as u32, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes);
        let replies: Vec<u8> = reply(Tag::Accept)
            .chain(reply(Tag::RoundAck))
            .chain(reply(Tag::Done))
            .collect();
        let done = Trigger::Frame(Tag::Done, 0);
        let (proxy, received) = with(vec![fault(Direction::ToSource, done, Action::Cut)]);
        converse(&proxy, &replies);
        assert!(proxy.wait_fired(1, LATE));
        assert_eq!(
            (
                proxy.passed(Direction::ToSource),
                proxy.passed(Direction::ToDestination)
            ),
            (32, 48)
        );
        assert_eq!(received.recv_timeout(LATE).unwrap(), replies);
    }

    #[test]
    fn another_header_is_passed_on_and_frames_are_found_behind_it() {
        let mut bytes = b"FERRYMIG\x01\0\0\0\x08\0\0\0{\"a\":10}crc!".to_vec();
        let header = bytes.len();
        let commit = [Tag::Commit as u32, 0, 0, 0];
        bytes.extend(commit.into_iter().flat_map(u32::to_le_bytes));
        let change = Change::Field("/a", serde_json::Value::from("much longer than it was"));
        let faults = [
            (Trigger::Offset(0), Action::Rewrite(change.clone())),
            (Trigger::Frame(Tag::Commit, 0), Action::Flip(0xff)),
        ];
        let (proxy, received) = with(
            faults
                .map(|(trigger, action)| fault(Direction::ToDestination, trigger, action))
                .to_vec(),
        );
        converse(&proxy, &bytes);
        let mut expected = header::changed(&bytes[..header], &change).unwrap();
        bytes[header] ^= 0xff;
        expected.extend(&bytes[header..]);
        assert_eq!(received.recv_timeout(LATE).unwrap(), expected);
        assert_eq!(proxy.fired(), 2);
    }

    #[test]
    fn a_stall_is_silent_until_it_ends() {
        let trigger = Trigger::Offset(2);
        let (proxy, received) = with(vec![fault(
            Direction::ToDestination,
            trigger,
            Action::Stall,
        )]);
        let mut stream = proxy.endpoint().connect().unwrap();
        stream.write_all(b"abcd").unwrap();
        assert!(proxy.wait_fired(1, LATE));
        stream.set_read_timeout(Some(SOON)).unwrap();
        // What was passed before the stall may come back.
        let (mut early, mut buffer) = (Vec::new(), [0; 4]);
        while let Ok(count) = stream.read(&mut buffer) {
            assert!(count > 0, "a silence, not an end");
            early.extend(&buffer[..count]);
        }
        assert!(b"ab".starts_with(&early), "{early:?}");
        assert!(received.recv_timeout(SOON).is_err(), "nothing was closed");
        proxy.resume();
        stream.set_read_timeout(Some(LATE)).unwrap();
        let mut rest = vec![0; 4 - early.len()];
        stream.read_exact(&mut rest).unwrap();
        assert_eq!([early, rest].concat(), b"abcd");
    }

    #[test]
    fn a_cut_at_a_chosen_moment_ends_even_a_stall() {
        let (proxy, received) = with(Vec::new());
        let mut stream = proxy.endpoint().connect().unwrap();
        stream.write_all(b"ab").unwrap();
        assert!(proxy.wait_passed(Direction::ToSource, 2, LATE));
        proxy.stall();
        stream.write_all(b"cd").unwrap();
        proxy.cut();
        assert_eq!(&received.recv_timeout(LATE).unwrap()[..2], b"ab");
        stream.set_read_timeout(Some(LATE)).unwrap();
        let mut back = Vec::new();
        let ended = stream.read_to_end(&mut back);
        assert!(ended.is_ok() || ended.unwrap_err().kind() == io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn nobody_behind_the_proxy_is_a_connection_that_ends() {
        let proxy = Proxy::start(&any_port(), Endpoint::free_tcp().unwrap(), Vec::new()).unwrap();
        assert_eq!(converse(&proxy, b"hello"), b"");
    }

    #[test]
    fn a_dropped_proxy_frees_its_endpoint() {
        let folder = tempfile::tempdir().unwrap();
        let place = Endpoint::Unix(folder.path().join("proxy"));
        let proxy = Proxy::start(&place, any_port(), Vec::new()).unwrap();
        let mut stream = place.connect().unwrap();
        drop(proxy);
        stream.set_read_timeout(Some(LATE)).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
        assert!(place.listen().is_ok());
    }
}
