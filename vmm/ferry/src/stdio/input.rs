//! Serial input from standard input.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Ends the guest.
pub(super) type Quit = Arc<dyn Fn() + Send + Sync>;

/// Ctrl-A, the key before a command to the monitor, as in QEMU.
const ESCAPE: u8 = 1;
/// The command that ends the guest.
const QUIT: u8 = b'x';

/// Standard input for a guest. On a terminal, Ctrl-A x ends the guest, and Ctrl-A Ctrl-A sends one Ctrl-A.
pub(super) struct Input {
    stdin: File,
    quit: Option<Quit>,
    escaped: bool,
}

impl Input {
    /// Opens standard input. `quit` is called for Ctrl-A x.
    ///
    /// # Errors
    /// Returns the error of dup(2).
    pub(super) fn new(quit: Quit) -> io::Result<Self> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let quit = stdin.is_terminal().then_some(quit);
        Ok(Self {
            stdin,
            quit,
            escaped: false,
        })
    }

    /// Removes the commands to the monitor from `bytes`, and carries them out. Returns the number of bytes that are left.
    fn filter(&mut self, bytes: &mut [u8]) -> usize {
        let Some(quit) = &self.quit else {
            return bytes.len();
        };
        let mut kept = 0;
        for at in 0..bytes.len() {
            let byte = bytes[at];
            match (self.escaped, byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, QUIT) => {
                    self.escaped = false;
                    quit();
                }
                (_, byte) => {
                    self.escaped = false;
                    bytes[kept] = byte;
                    kept += 1;
                }
            }
        }
        kept
    }
}

impl Read for Input {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.stdin.read(bytes)?;
        match self.filter(&mut bytes[..count]) {
            // Everything was a command to the monitor. A count of 0 would mean the end of the input.
            0 if count > 0 => Err(io::ErrorKind::WouldBlock.into()),
            kept => Ok(kept),
        }
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stdin.as_fd()
    }
}
