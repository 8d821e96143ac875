//! The serial port of a guest on the standard streams of this process.

mod input;
mod output;
mod terminal;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use devices::{Serial, SerialInput, SerialOutput};
use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use vmm::complain::complain;
use vmm::config::{SerialConfig, SerialMode};
use vmm::serial::{FileSerial, SerialBackend, SerialBackendError};

use input::{Input, Quit};
use output::QueuedOutput;
pub(crate) use output::flush;
use terminal::RawTerminal;

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Serial ports that lead to the standard streams, to a file or nowhere.
#[derive(Default)]
pub(crate) struct StdioSerial {
    quit: OnceLock<Quit>,
    terminal: Mutex<Option<RawTerminal>>,
    input: Mutex<Option<InputLoop>>,
}

/// The thread that carries standard input to the serial port that is connected.
struct InputLoop {
    endpoint: RemoteEndpoint<Subscriber>,
    connected: Option<SubscriberId>,
}

impl StdioSerial {
    /// Registers what Ctrl-A x does. Only the first call has an effect.
    pub(crate) fn on_quit(&self, quit: impl Fn() + Send + Sync + 'static) {
        self.quit.get_or_init(|| Arc::new(quit));
    }

    /// Restores the mode that the terminal had before a guest used it.
    pub(crate) fn restore_terminal(&self) {
        drop(lock(&self.terminal).take());
    }

    fn connect_stdin(&self, serial: &Serial) -> io::Result<()> {
        let mut terminal = lock(&self.terminal);
        if terminal.is_none() {
            *terminal = RawTerminal::enter()?;
        }
        let quit = self.quit.get_or_init(|| Arc::new(|| ()));
        let input = Input::new(Arc::clone(quit))?;
        let input = SerialInput::new(input, serial.clone());
        let mut running = lock(&self.input);
        let input_loop = match running.take() {
            Some(input_loop) => input_loop,
            None => InputLoop::start()?,
        };
        running.insert(input_loop).connect(Box::new(input))
    }
}

impl SerialBackend for StdioSerial {
    fn open_output(&self, config: &SerialConfig) -> Result<SerialOutput, SerialBackendError> {
        // The last output of one guest comes before the first of the next.
        flush();
        match config.mode {
            SerialMode::Tty => {
                let output = QueuedOutput::start().map_err(SerialBackendError::Stdio)?;
                Ok(Box::new(output))
            }
            SerialMode::Null | SerialMode::File => FileSerial.open_output(config),
        }
    }

    fn connect_input(
        &self,
        config: &SerialConfig,
        serial: &Serial,
    ) -> Result<(), SerialBackendError> {
        match config.mode {
            SerialMode::Tty => self
                .connect_stdin(serial)
                .map_err(SerialBackendError::Stdio),
            SerialMode::Null | SerialMode::File => FileSerial.connect_input(config, serial),
        }
    }
}

impl InputLoop {
    fn start() -> io::Result<Self> {
        let mut manager = EventManager::<Subscriber>::new().map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        thread::Builder::new()
            .name("_events".into())
            .spawn(move || {
                loop {
                    if let Err(error) = manager.run() {
                        // Epoll itself failed. The guest runs on without input.
                        complain(format_args!("serial input: {error}"));
                        return;
                    }
                }
            })?;
        Ok(Self {
            endpoint,
            connected: None,
        })
    }

    /// Replaces the connected serial port.
    fn connect(&mut self, new: Subscriber) -> io::Result<()> {
        let old = self.connected.take();
        let replaced =
            self.endpoint
                .call_blocking(move |events| -> Result<_, event_manager::Error> {
                    if let Some(old) = old {
                        drop(events.remove_subscriber(old)?);
                    }
                    Ok(events.add_subscriber(new))
                });
        self.connected = Some(replaced.map_err(io::Error::other)?);
        Ok(())
    }
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}
