//! Registry of the open connections to the API socket.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Connections at a time.
pub(super) const CONNECTIONS_LIMIT: usize = 32;

/// The connections that there are.
#[derive(Default)]
pub(super) struct Connections {
    open: Mutex<Vec<OpenConnection>>,
}

struct OpenConnection {
    /// To end it. Its address tells it from the others.
    stream: Arc<UnixStream>,
    state: ConnectionState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectionState {
    /// For a request, since then.
    Waiting(Instant),
    Answering,
}

/// Registration of a connection, until it is dropped.
pub(super) struct ConnectionGuard {
    connections: Arc<Connections>,
    stream: Arc<UnixStream>,
}

impl Connections {
    /// Registers a new connection. If there are too many, the one that has been idle for longest is closed.
    ///
    /// # Errors
    /// Returns `ResourceBusy` if all connections are being answered, and the error of dup(2).
    pub(super) fn enter(self: &Arc<Self>, stream: &UnixStream) -> io::Result<ConnectionGuard> {
        let stream = Arc::new(stream.try_clone()?);
        let mut open = self.lock();
        if open.len() >= CONNECTIONS_LIMIT {
            let idlest = idlest(&open).ok_or(io::ErrorKind::ResourceBusy)?;
            let gone = open.swap_remove(idlest);
            // Its client may have gone already.
            let _gone = gone.stream.shutdown(Shutdown::Both);
        }
        open.push(OpenConnection {
            stream: Arc::clone(&stream),
            state: ConnectionState::Waiting(Instant::now()),
        });
        Ok(ConnectionGuard {
            connections: Arc::clone(self),
            stream,
        })
    }

    pub(super) fn are_answering(&self) -> bool {
        self.lock()
            .iter()
            .any(|one| one.state == ConnectionState::Answering)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OpenConnection>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn idlest(open: &[OpenConnection]) -> Option<usize> {
    let waiting = open
        .iter()
        .enumerate()
        .filter_map(|(index, one)| match one.state {
            ConnectionState::Waiting(since) => Some((since, index)),
            ConnectionState::Answering => None,
        });
    waiting.min().map(|(_, index)| index)
}

impl ConnectionGuard {
    /// Notes what the connection does.
    ///
    /// # Errors
    /// It had to make room for another one.
    pub(super) fn set_state(&self, state: ConnectionState) -> io::Result<()> {
        let mut open = self.connections.lock();
        let own = open
            .iter_mut()
            .find(|one| Arc::ptr_eq(&one.stream, &self.stream));
        own.ok_or(io::ErrorKind::ConnectionAborted)?.state = state;
        Ok(())
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let mut open = self.connections.lock();
        open.retain(|one| !Arc::ptr_eq(&one.stream, &self.stream));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn pair(connections: &Arc<Connections>) -> (UnixStream, io::Result<ConnectionGuard>) {
        let (near, far) = UnixStream::pair().unwrap();
        let guard = connections.enter(&near);
        (far, guard)
    }

    #[test]
    fn the_idlest_makes_room_and_what_is_answered_stays() {
        let connections = Arc::new(Connections::default());
        let mut all: Vec<_> = (0..CONNECTIONS_LIMIT)
            .map(|_| pair(&connections))
            .map(|(far, guard)| (far, guard.unwrap()))
            .collect();
        all[0].1.set_state(ConnectionState::Answering).unwrap();
        let newest = pair(&connections);
        assert!(newest.1.is_ok());
        assert!(all[0].1.set_state(ConnectionState::Answering).is_ok());
        // The oldest of those that waited is closed, and is not answered any more.
        assert!(all[1].1.set_state(ConnectionState::Answering).is_err());
        assert_eq!(all[1].0.read(&mut [0]).unwrap(), 0);
        assert!(all[2].1.set_state(ConnectionState::Answering).is_ok());
    }

    #[test]
    fn all_at_work_leave_no_room_until_one_is_done() {
        let connections = Arc::new(Connections::default());
        let mut all: Vec<_> = (0..CONNECTIONS_LIMIT)
            .map(|_| pair(&connections))
            .map(|(far, guard)| (far, guard.unwrap()))
            .collect();
        for (_, guard) in &all {
            guard.set_state(ConnectionState::Answering).unwrap();
        }
        assert!(pair(&connections).1.is_err());
        all.pop();
        assert!(pair(&connections).1.is_ok());
        drop(all);
        assert!(!connections.are_answering());
    }
}
