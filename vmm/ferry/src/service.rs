//! The parts that `ferry run` and `ferry receive` share: the monitor, its API socket, its event log and its signal
//! handlers.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use rustix::process::{
    Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use vmm::api::ApiServer;
use vmm::complain::complain;
use vmm::events::{EventSource, Events};
use vmm::monitor::{Launcher, Monitor};
use vmm::vcpu::GuestEnd;

use super::Failure;
use super::arguments::DescriptorOrPath;
use super::inherited;
use super::stdio::{self, StdioSerial};

/// The monitor of this process, with its API server and its serial port.
pub(super) struct Service {
    pub(super) monitor: Arc<Monitor>,
    /// API socket, until [`Self::serve_api`] takes it.
    listener: Option<ApiListener>,
    /// Running API server. Dropping it removes the socket file.
    api: Option<ApiServer>,
    serial: Arc<StdioSerial>,
}

/// The API socket and the event log that the command line names.
///
/// They must be opened before any other file, so that the number of an inherited descriptor cannot refer to a file that
/// this program opened itself.
pub(super) struct ApiAndEvents {
    events: Events,
    api: Option<ApiListener>,
}

/// Socket to which API clients connect.
enum ApiListener {
    Path(PathBuf),
    Listener(UnixListener),
}

impl ApiAndEvents {
    /// Takes the API socket and opens the event log.
    ///
    /// # Errors
    /// Returns an error that names the option if its descriptor or path cannot be used.
    pub(super) fn open(
        api_socket: Option<&DescriptorOrPath>,
        event_monitor: Option<&DescriptorOrPath>,
    ) -> Result<Self, Failure> {
        let api = match api_socket {
            None => None,
            Some(DescriptorOrPath::Path(path)) => Some(ApiListener::Path(path.clone())),
            Some(DescriptorOrPath::Fd(number)) => Some(ApiListener::Listener(
                listener(*number).map_err(|error| format!("--api-socket fd={number}: {error}"))?,
            )),
        };
        let events = match event_monitor {
            None => Ok(Events::nowhere()),
            Some(DescriptorOrPath::Path(path)) => Events::append_to(path),
            Some(DescriptorOrPath::Fd(number)) => {
                inherited::take(*number).and_then(|descriptor| Events::to(File::from(descriptor)))
            }
        };
        let events = events.map_err(|error| {
            let place = event_monitor.map(ToString::to_string).unwrap_or_default();
            match error.raw_os_error() {
                Some(libc::ENXIO) => {
                    format!(
                        "--event-monitor {place}: the named pipe has no reader; start the reader first"
                    )
                }
                _ => format!("--event-monitor {place}: {error}"),
            }
        })?;
        Ok(Self { events, api })
    }
}

/// Takes the inherited descriptor `number`, which must be a listening Unix socket.
fn listener(number: i32) -> io::Result<UnixListener> {
    use rustix::net::{AddressFamily, sockopt};
    let socket = inherited::take(number)?;
    let listens = sockopt::socket_domain(&socket)? == AddressFamily::UNIX
        && sockopt::socket_acceptconn(&socket)?;
    match listens {
        true => Ok(socket.into()),
        false => Err(io::Error::other(
            "the descriptor is not a listening Unix socket",
        )),
    }
}

impl Service {
    /// Creates a monitor without a guest, and installs the signal handlers. The API is not served yet.
    ///
    /// # Errors
    /// Returns an error if the limit of descriptors cannot be raised or a signal handler cannot be installed.
    pub(super) fn start(
        api_and_events: ApiAndEvents,
        launcher: Option<Launcher>,
        serial: Arc<StdioSerial>,
    ) -> Result<Self, Failure> {
        raise_descriptor_limit()
            .map_err(|error| format!("cannot raise RLIMIT_NOFILE to the hard limit: {error}"))?;
        let events = api_and_events.events;
        events.tell(EventSource::Vmm, "starting", serde_json::Value::Null);
        let monitor = Monitor::new(launcher, events);
        end_on_signals(Arc::clone(&monitor))?;
        let quit = Arc::downgrade(&monitor);
        serial.on_quit(move || {
            if let Some(monitor) = quit.upgrade() {
                monitor.interrupt();
            }
        });
        Ok(Self {
            monitor,
            listener: api_and_events.api,
            api: None,
            serial,
        })
    }

    /// Starts to serve the API if the command line names a socket.
    ///
    /// # Errors
    /// Returns an error if the socket cannot be bound or the server thread cannot be started.
    pub(super) fn serve_api(&mut self) -> Result<(), Failure> {
        let monitor = Arc::clone(&self.monitor);
        self.api = match self.listener.take() {
            None => None,
            Some(ApiListener::Path(path)) => Some(ApiServer::start(&path, monitor)?),
            Some(ApiListener::Listener(listener)) => Some(ApiServer::start_on(listener, monitor)?),
        };
        Ok(())
    }

    /// Waits until the guest ends, restores the terminal and flushes all output. Returns the exit status.
    ///
    /// # Errors
    /// Returns an error if the guest failed.
    pub(super) fn run_until_end(self) -> Result<u8, Failure> {
        let end = self.monitor.wait_for_end();
        self.serial.restore_terminal();
        self.monitor.finish(&end);
        stdio::flush();
        match &end {
            GuestEnd::Failed(why) => Err(format!("the guest failed: {why}").into()),
            end => Ok(end.status()),
        }
    }
}

/// Asks the kernel to send SIGTERM to this process when its parent process exits. `parent` is the process ID of the parent.
///
/// # Errors
/// Returns an error if the parent has exited already.
pub(super) fn end_with_parent(parent: u32) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // The parent may have ended before the call.
    if std::os::unix::process::parent_id() != parent {
        return Err(format!("the parent process {parent} has exited already").into());
    }
    Ok(())
}

/// Raises the soft limit of open descriptors to the hard limit.
///
/// The soft limit is usually 1024 for the sake of select(2), which this program does not use. The connections of a vsock
/// device alone can exceed it.
fn raise_descriptor_limit() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, all)?)
}

/// Starts a thread that ends the guest on SIGTERM, SIGINT or SIGHUP.
fn end_on_signals(monitor: Arc<Monitor>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    thread::Builder::new()
        .name("_signals".into())
        .spawn(move || {
            for _signal in signals.forever() {
                // A panic must not end this thread: the next signal counts again.
                let interrupt = AssertUnwindSafe(|| monitor.interrupt());
                if catch_unwind(interrupt).is_err() {
                    complain("the signal could not be handled: internal error");
                }
            }
        })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_descriptor_limit_is_raised_to_the_hard_limit() {
        let before = getrlimit(Resource::Nofile);
        // High enough that other tests in this process do not run out of descriptors.
        let fewer = before.maximum.map_or(1 << 16, |most| most - 1);
        let lowered = Rlimit {
            current: Some(fewer),
            ..before
        };
        setrlimit(Resource::Nofile, lowered).unwrap();
        raise_descriptor_limit().unwrap();
        let after = getrlimit(Resource::Nofile);
        assert_eq!(after.current, before.maximum);
        assert_eq!(after.maximum, before.maximum);
    }
}
