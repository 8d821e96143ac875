//! Unix and TCP sockets as streams.

use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use super::{Halves, Stream};

impl Stream for UnixStream {
    fn split(self) -> io::Result<Halves> {
        let (reader, writer) = (self.try_clone()?, self.try_clone()?);
        // `shutdown` fails if the direction has ended already.
        Ok(Halves::new(reader, writer, move |half| {
            drop(self.shutdown(half));
        }))
    }
}

/// Switches Nagle's algorithm off: the replies are small and the guest is paused while they travel.
impl Stream for TcpStream {
    fn split(self) -> io::Result<Halves> {
        self.set_nodelay(true)?;
        let (reader, writer) = (self.try_clone()?, self.try_clone()?);
        // `shutdown` fails if the direction has ended already.
        Ok(Halves::new(reader, writer, move |half| {
            drop(self.shutdown(half));
        }))
    }
}
