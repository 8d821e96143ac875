//! What `ferry run` and `ferry receive` share: a monitor with its API, its devices' events and the signals
//! that end it, until its guest is over.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use devices::SerialInput;
use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use rustix::process::{
    Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Failure;
use super::arguments::Place;
use super::console::{self, Input, RawTerminal};
use super::inherited;
use vmm::api::ApiServer;
use vmm::complain::complain;
use vmm::config::{SerialConfig, SerialMode};
use vmm::events::{EventSource, Events};
use vmm::machine::{Machine, OnLoss};
use vmm::monitor::{AfterReset, Monitor};
use vmm::vcpu::{GuestEnd, install_kick_signal};

/// A monitor that serves.
pub(super) struct Service {
    pub(super) monitor: Arc<Monitor>,
    ends: Receiver<GuestEnd>,
    ender: Sender<GuestEnd>,
    /// Where calls will come from.
    listener: Option<ApiListener>,
    // Removes its socket's file when it is dropped.
    api: Option<ApiServer>,
    terminal: Terminal,
}

/// The outside of a monitor, opened: descriptors that were inherited are taken before this program opens others.
pub(super) struct Outside {
    events: Events,
    api: Option<ApiListener>,
}

/// Where API calls come from.
enum ApiListener {
    Path(PathBuf),
    Listener(UnixListener),
}

impl Outside {
    /// Opens what the arguments name.
    ///
    /// # Errors
    /// What cannot be opened, by its option.
    pub(super) fn open(
        api_socket: Option<&Place>,
        event_monitor: Option<&Place>,
    ) -> Result<Self, Failure> {
        let api = match api_socket {
            None => None,
            Some(Place::Path(path)) => Some(ApiListener::Path(path.clone())),
            Some(Place::Fd(number)) => Some(ApiListener::Listener(
                listener(*number).map_err(|error| format!("--api-socket fd={number}: {error}"))?,
            )),
        };
        let events = match event_monitor {
            None => Ok(Events::nowhere()),
            Some(Place::Path(path)) => Events::append_to(path),
            Some(Place::Fd(number)) => {
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

/// The socket that descriptor `number` is, if it is one that API calls can come from.
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
    /// A monitor without a guest yet, that does not answer yet.
    pub(super) fn start(outside: Outside) -> Result<Self, Failure> {
        install_kick_signal()?;
        allow_all_descriptors().map_err(|error| format!("RLIMIT_NOFILE: {error}"))?;
        let (ender, ends) = channel();
        let events = outside.events;
        events.tell(EventSource::Vmm, "starting", serde_json::Value::Null);
        let monitor = Monitor::new(ender.clone(), events);
        end_on_signals(Arc::clone(&monitor))?;
        Ok(Self {
            monitor,
            ends,
            ender,
            listener: outside.api,
            api: None,
            terminal: Terminal::default(),
        })
    }

    /// From now on the monitor answers calls, if they can come from anywhere.
    pub(super) fn answer(&mut self) -> Result<(), Failure> {
        let monitor = Arc::clone(&self.monitor);
        self.api = match self.listener.take() {
            None => None,
            Some(ApiListener::Path(path)) => Some(ApiServer::start(&path, monitor)?),
            Some(ApiListener::Listener(listener)) => Some(ApiServer::start_on(listener, monitor)?),
        };
        Ok(())
    }

    /// What a machine's vCPUs tell when they come to the guest's end.
    pub(super) fn on_end(&self) -> Arc<dyn Fn(GuestEnd) + Send + Sync> {
        let ender = self.ender.clone();
        Arc::new(move |end| {
            // Nobody listens only when the monitor is ending already.
            let _ending = ender.send(end);
        })
    }

    /// What a machine tells of processes that served its devices and were lost: an event, and a message. The guest
    /// goes on.
    pub(super) fn on_loss(&self) -> OnLoss {
        let events = self.monitor.events().clone();
        Arc::new(move |device, why| {
            complain(format_args!(
                "{device}: {why}; the guest goes on without it until it resets it, or is rebooted"
            ));
            let properties = serde_json::json!({ "id": device, "reason": why });
            events.tell(EventSource::Vm, "device-failed", properties);
        })
    }

    /// For whoever ends the guest in another way.
    pub(super) fn ender(&self) -> Sender<GuestEnd> {
        self.ender.clone()
    }

    /// The terminal that the guest may take.
    pub(super) fn terminal(&self) -> Terminal {
        self.terminal.clone()
    }

    /// Serves until the guest is over; a reset is not the end of one that can be started again. Returns the
    /// program's exit status.
    pub(super) fn until_end(self) -> Result<u8, Failure> {
        let end = self.last_end()?;
        self.terminal.give_back();
        self.monitor.tell_end(&end);
        self.monitor.release();
        console::flush();
        self.monitor.events().flush();
        match &end {
            GuestEnd::Failed(why) => Err(format!("the guest failed: {why}").into()),
            end => Ok(end.status()),
        }
    }

    fn last_end(&self) -> Result<GuestEnd, Failure> {
        loop {
            let end = self.ends.recv()?;
            if end != GuestEnd::Reset {
                match self.monitor.is_over(&end) {
                    true => return Ok(end),
                    false => continue,
                }
            }
            match self.monitor.after_reset() {
                Ok(AfterReset::GoesOn) => {}
                Ok(AfterReset::Over) => return Ok(end),
                Err(error) => return Ok(GuestEnd::Failed(error.to_string())),
            }
        }
    }
}

/// The terminal of this process: the user's until a guest takes it, and again when the guest is over.
#[derive(Clone, Default)]
pub(super) struct Terminal(Arc<Mutex<Option<RawTerminal>>>);

impl Terminal {
    /// Puts the terminal, if there is one, at the disposal of a guest whose serial port leads there.
    pub(super) fn take(&self, serial: &SerialConfig) -> io::Result<()> {
        let mut taken = self.lock();
        if serial.mode == SerialMode::Tty && taken.is_none() {
            *taken = RawTerminal::enter()?;
        }
        Ok(())
    }

    fn give_back(&self) {
        drop(self.lock().take());
    }

    fn lock(&self) -> MutexGuard<'_, Option<RawTerminal>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// The way from standard input to the serial port of the machine that there is, if it leads there.
pub(super) struct InputLine {
    events: Option<EventLoop>,
    monitor: Arc<Monitor>,
    /// The machine's that is connected.
    connected: Mutex<Option<SubscriberId>>,
}

impl InputLine {
    /// A line that leads to no machine yet.
    pub(super) fn start(serial: &SerialConfig, monitor: &Arc<Monitor>) -> io::Result<Self> {
        let events = match serial.mode {
            SerialMode::Tty => Some(EventLoop::start()?),
            SerialMode::Null | SerialMode::File => None,
        };
        Ok(Self {
            events,
            monitor: Arc::clone(monitor),
            connected: Mutex::new(None),
        })
    }

    /// Lets the line lead to `machine`, and no longer to the one before.
    pub(super) fn connect(&self, machine: &Machine) -> Result<(), Failure> {
        let Some(events) = &self.events else {
            return Ok(());
        };
        let input = Input::new(Arc::clone(&self.monitor))?;
        let input = SerialInput::new(input, machine.serial().clone());
        let mut connected = self
            .connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *connected = Some(events.replace(connected.take(), Box::new(input))?);
        Ok(())
    }
}

/// A thread in which subscribers get their events, for as long as the process lives.
struct EventLoop(RemoteEndpoint<Subscriber>);

impl EventLoop {
    fn start() -> io::Result<Self> {
        let mut manager = EventManager::<Subscriber>::new().map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        thread::Builder::new()
            .name("_events".into())
            .spawn(move || {
                loop {
                    if let Err(error) = manager.run() {
                        // Epoll itself failed: there will be no more events, and the guest runs on without.
                        complain(format_args!("device events: {error}"));
                        return;
                    }
                }
            })?;
        Ok(Self(endpoint))
    }

    /// Puts `new` in the place of `old`.
    fn replace(&self, old: Option<SubscriberId>, new: Subscriber) -> Result<SubscriberId, Failure> {
        let id = self
            .0
            .call_blocking(move |events| -> Result<_, event_manager::Error> {
                if let Some(old) = old {
                    drop(events.remove_subscriber(old)?);
                }
                Ok(events.add_subscriber(new))
            });
        Ok(id.map_err(io::Error::other)?)
    }
}

/// Ends this process as by SIGTERM when `parent`, which started it, ends, however that happens.
pub(super) fn end_with_parent(parent: u32) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // It may have ended before that was asked for.
    if std::os::unix::process::parent_id() != parent {
        return Err(format!("process {parent}, which started this one, is gone").into());
    }
    Ok(())
}

/// As many descriptors as the process may have. The soft limit is 1024 in most places, for the sake of select(2), which
/// is not used here; the connections of a socket device alone are as many, and the API must not want for one then.
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
