//! Streams: the connections that a migration runs over.
//!
//! The engine needs a reliable, ordered byte stream in each direction and a way to end a direction from another
//! thread. It sets its own deadlines, so a stream needs no timeouts. A stream of your own takes a few lines:
//!
//! ```
//! use std::io;
//! use std::os::unix::net::UnixStream;
//!
//! use migration::{Halves, Stream};
//!
//! /// A stand-in for a vsock or TLS connection.
//! struct Tunnel(UnixStream);
//!
//! impl Stream for Tunnel {
//!     fn split(self) -> io::Result<Halves> {
//!         let (reader, writer) = (self.0.try_clone()?, self.0.try_clone()?);
//!         // An error means that the direction has ended already.
//!         Ok(Halves::new(reader, writer, move |half| drop(self.0.shutdown(half))))
//!     }
//! }
//! ```

mod memory;
mod playback;
mod recording;
mod sockets;

use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;

pub use memory::{MemoryStream, memory_pair};
pub use playback::Playback;
pub use recording::Recording;

/// A connection to the other side of a migration.
///
/// Implemented for [`UnixStream`](std::os::unix::net::UnixStream), [`TcpStream`](std::net::TcpStream),
/// [`MemoryStream`], [`Recording`] and [`Playback`].
pub trait Stream: Sized {
    /// Splits the connection into its two directions and a handle that ends them.
    ///
    /// # Errors
    /// Returns an error if the connection cannot be split. The migration then fails before anything is sent.
    fn split(self) -> io::Result<Halves>;
}

/// A connection that has been split.
pub struct Halves {
    /// Bytes from the other side. Reading blocks until there are some; 0 bytes mean the end.
    pub reader: Box<dyn Read + Send>,
    /// Bytes to the other side. Writing blocks while the other side takes none.
    pub writer: Box<dyn Write + Send>,
    /// Ends one direction or both; see [`Halves::new`].
    pub end: EndStream,
}

/// Function that ends one direction of a stream or both.
pub type EndStream = Arc<dyn Fn(Shutdown) + Send + Sync>;

impl Halves {
    /// Joins two directions and the function that ends them.
    ///
    /// The engine calls `end` from other threads than those that read and write, more than once, and after the
    /// other side is gone. It must not block. After `end(Shutdown::Read)` a blocked or later `read` must return 0
    /// or an error, and `write` must go on working: the reason of a failure is still sent. After
    /// `end(Shutdown::Write)` a blocked or later `write` must fail, and the other side must see the end of the
    /// stream after the bytes that were written before.
    ///
    /// The writer should implement [`Write::write_vectored`], because most writes have several parts: without it
    /// each part becomes a write of its own.
    pub fn new(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        end: impl Fn(Shutdown) + Send + Sync + 'static,
    ) -> Self {
        Self {
            reader: Box::new(reader),
            writer: Box::new(writer),
            end: Arc::new(end),
        }
    }
}

impl fmt::Debug for Halves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Halves").finish_non_exhaustive()
    }
}

/// A connection that has been split already.
impl Stream for Halves {
    fn split(self) -> io::Result<Halves> {
        Ok(self)
    }
}
