//! Registry of the open connections to the API socket.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Maximum number of open connections.
pub(super) const CONNECTIONS_LIMIT: usize = 32;

/// Open connections of the API socket.
#[derive(Default)]
pub(super) struct Connections {
    open: Mutex<Vec<OpenConnection>>,
}

/// One open connection.
struct OpenConnection {
    /// Duplicate of the stream, to shut the connection down. The address of the `Arc` identifies the connection.
    stream: Arc<UnixStream>,
    state: ConnectionState,
}

/// Activity of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectionState {
    /// The connection has waited for a request since this time.
    Waiting(Instant),
    /// A request is being answered.
    Answering,
}

/// Registration of a connection. Dropping it removes the connection.
pub(super) struct ConnectionGuard {
    connections: Arc<Connections>,
    stream: Arc<UnixStream>,
}

impl Connections {
    /// Registers a new connection. If there are [`CONNECTIONS_LIMIT`] already, the one that has been idle for longest
    /// is closed.
    ///
    /// # Errors
    /// Returns `ResourceBusy` if all connections are answering requests, and the error of dup(2).
    pub(super) fn enter(self: &Arc<Self>, stream: &UnixStream) -> io::Result<ConnectionGuard> {
        let stream = Arc::new(stream.try_clone()?);
        let mut open = self.lock();
        if open.len() >= CONNECTIONS_LIMIT {
            let idlest = idlest(&open).ok_or(io::ErrorKind::ResourceBusy)?;
            let closed = open.swap_remove(idlest);
            // This fails if the client has disconnected already.
            let _disconnected = closed.stream.shutdown(Shutdown::Both);
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

    /// Returns true if any connection is answering a request.
    pub(super) fn are_answering(&self) -> bool {
        self.lock()
            .iter()
            .any(|one| one.state == ConnectionState::Answering)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OpenConnection>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the index of the connection that has waited for a request for longest.
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
    /// Sets the state of the connection.
    ///
    /// # Errors
    /// Returns `ConnectionAborted` if the connection was closed to make room for another one.
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
        // The connection that has waited for longest was closed, and is not answered any more.
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
