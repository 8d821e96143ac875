//! The host's side of a guest's serial port.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::{Serial, SerialOutput};

use crate::config::{SerialConfig, SerialMode};

/// Reasons why the host's side of a serial port cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SerialBackendError {
    /// The mode needs a file, and the configuration names none.
    #[error("--serial: a file is needed for mode File")]
    NoFile,
    /// The file or pipe cannot be opened.
    #[error("--serial {}: {source}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The standard streams of the process cannot be used.
    #[error("--serial stdio: {0}")]
    Stdio(#[source] io::Error),
    /// This process offers no terminal to its guests.
    #[error("--serial stdio: this monitor has no standard streams for its guest")]
    NoStdio,
}

/// Connects serial ports to the host. A monitor asks it each time that a machine is made.
pub trait SerialBackend: Send + Sync {
    /// Opens the sink of a serial port's output. A write to it must not block for long, because it holds up a vCPU.
    ///
    /// # Errors
    /// Returns the reason if the sink cannot be opened.
    fn open_output(&self, config: &SerialConfig) -> Result<SerialOutput, SerialBackendError>;

    /// Connects the input to `serial`, and no longer to the serial port that was connected before.
    ///
    /// # Errors
    /// Returns the reason if the input cannot be connected.
    fn connect_input(
        &self,
        config: &SerialConfig,
        serial: &Serial,
    ) -> Result<(), SerialBackendError>;
}

/// Serial ports whose output goes to a file or nowhere, and that have no input.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileSerial;

impl SerialBackend for FileSerial {
    fn open_output(&self, config: &SerialConfig) -> Result<SerialOutput, SerialBackendError> {
        match config.mode {
            SerialMode::Null => Ok(Box::new(io::sink())),
            SerialMode::File => open_file(config.file.as_deref()),
            SerialMode::Tty => Err(SerialBackendError::NoStdio),
        }
    }

    fn connect_input(&self, _: &SerialConfig, _: &Serial) -> Result<(), SerialBackendError> {
        Ok(())
    }
}

/// Opens a file or a pipe without blocking: output that a stalled reader of a pipe does not take is lost, so that it
/// stops no vCPU.
fn open_file(path: Option<&Path>) -> Result<SerialOutput, SerialBackendError> {
    let path = path.ok_or(SerialBackendError::NoFile)?;
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    Ok(Box::new(file.map_err(|source| {
        SerialBackendError::File {
            path: path.to_owned(),
            source,
        }
    })?))
}
