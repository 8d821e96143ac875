//! The other end of a guest's serial port: its lines, as the dirtier's reports.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};

use devices::SerialOutput;
use guest_images::dirtier::GuestReport;

use super::LIMIT;

pub(crate) struct Console {
    lines: Receiver<String>,
}

impl Console {
    pub(crate) fn new() -> (Self, SerialOutput) {
        let (sender, lines) = channel();
        (
            Self { lines },
            Box::new(Lines {
                sender,
                line: Vec::new(),
            }),
        )
    }

    /// The next report that is `wanted`; a line that is no report is a failure of the guest.
    pub(crate) fn wait_for(&self, wanted: impl Fn(&GuestReport) -> bool) -> GuestReport {
        loop {
            let line = self.lines.recv_timeout(LIMIT).expect("the guest is silent");
            let report =
                GuestReport::parse(&line).unwrap_or_else(|| panic!("the guest says: {line}"));
            if wanted(&report) {
                return report;
            }
        }
    }
}

/// Cuts output into lines.
struct Lines {
    sender: Sender<String>,
    line: Vec<u8>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line).into_owned();
                self.line.clear();
                self.sender.send(line).map_err(io::Error::other)?;
            } else {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
