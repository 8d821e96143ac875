//! What `ferry run` and `ferry receive` share: a monitor with its API and the signals that end it, until its guest is
//! over.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use rustix::process::{
    Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use vmm::api::ApiServer;
use vmm::events::{EventSource, Events};
use vmm::monitor::{Launcher, Monitor};
use vmm::vcpu::GuestEnd;

use super::Failure;
use super::arguments::DescriptorOrPath;
use super::inherited;
use super::stdio::{self, StdioSerial};

/// A monitor in a process of its own.
pub(super) struct Service {
    pub(super) monitor: Arc<Monitor>,
    /// Socket of the API, until [`Self::answer`].
    listener: Option<ApiListener>,
    // Removes the file of its socket when it is dropped.
    api: Option<ApiServer>,
    serial: Arc<StdioSerial>,
}

/// The API socket and the sink of events, opened. Inherited descriptors are taken before this program opens others.
pub(super) struct Outside {
    events: Events,
    api: Option<ApiListener>,
}

/// Socket on which API clients connect.
enum ApiListener {
    Path(PathBuf),
    Listener(UnixListener),
}

impl Outside {
    /// Opens the API socket and the sink of events that the arguments name.
    ///
    /// # Errors
    /// Returns a message that names the option whose descriptor or path cannot be used.
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
                        "--event-monitor {place}: nobody reads this pipe; start its reader first"
                    )
                }
                _ => format!("--event-monitor {place}: {error}"),
            }
        })?;
        Ok(Self { events, api })
    }
}

/// Takes the inherited descriptor `number` as a listening Unix socket.
fn listener(number: i32) -> io::Result<UnixListener> {
    use rustix::net::{AddressFamily, sockopt};
    let socket = inherited::take(number)?;
    let listens = sockopt::socket_domain(&socket)? == AddressFamily::UNIX
        && sockopt::socket_acceptconn(&socket)?;
    match listens {
        true => Ok(socket.into()),
        false => Err(io::Error::other("it is no Unix socket that listens")),
    }
}

impl Service {
    /// Creates a monitor without a guest, which answers no calls yet.
    ///
    /// # Errors
    /// Returns the error of the signal handlers or of the limit of descriptors.
    pub(super) fn start(
        outside: Outside,
        launcher: Option<Launcher>,
        serial: Arc<StdioSerial>,
    ) -> Result<Self, Failure> {
        allow_all_descriptors().map_err(|error| format!("RLIMIT_NOFILE: {error}"))?;
        let events = outside.events;
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
            listener: outside.api,
            api: None,
            serial,
        })
    }

    /// Starts to answer API calls, if there is a socket for them.
    ///
    /// # Errors
    /// Returns the error of the socket or of the thread.
    pub(super) fn answer(&mut self) -> Result<(), Failure> {
        let monitor = Arc::clone(&self.monitor);
        self.api = match self.listener.take() {
            None => None,
            Some(ApiListener::Path(path)) => Some(ApiServer::start(&path, monitor)?),
            Some(ApiListener::Listener(listener)) => Some(ApiServer::start_on(listener, monitor)?),
        };
        Ok(())
    }

    /// Serves until the guest is over. Returns the exit status of the program.
    ///
    /// # Errors
    /// Returns the reason if the guest failed.
    pub(super) fn until_end(self) -> Result<u8, Failure> {
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

/// Asks the kernel to send SIGTERM to this process when `parent`, which started it, ends in any way.
///
/// # Errors
/// Returns an error if `parent` is gone already.
pub(super) fn end_with_parent(parent: u32) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // The parent may have ended before the call.
    if std::os::unix::process::parent_id() != parent {
        return Err(format!("process {parent}, which started this one, is gone").into());
    }
    Ok(())
}

/// Raises the soft limit of descriptors to the hard limit. The soft limit is usually 1024 because of select(2), which is
/// not used here. The connections of a socket device alone can be as many, and the API needs descriptors too.
fn allow_all_descriptors() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, all)?)
}

fn end_on_signals(monitor: Arc<Monitor>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    thread::Builder::new()
        .name("_signals".into())
        .spawn(move || {
            for _signal in signals.forever() {
                monitor.interrupt();
            }
        })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_descriptors_that_may_be_had_are_allowed() {
        let before = getrlimit(Resource::Nofile);
        // Not so few that other tests would want for any.
        let fewer = before.maximum.map_or(1 << 16, |most| most - 1);
        let lowered = Rlimit {
            current: Some(fewer),
            ..before
        };
        setrlimit(Resource::Nofile, lowered).unwrap();
        allow_all_descriptors().unwrap();
        let after = getrlimit(Resource::Nofile);
        assert_eq!(after.current, before.maximum);
        assert_eq!(after.maximum, before.maximum);
    }
}
