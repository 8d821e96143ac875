//! Monitors with a small guest, for each state.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::{Serial, SerialOutput};
use guest_images::dirtier::{Config, Size};
use tempfile::NamedTempFile;
use vmm::config::{BalloonConfig, SerialConfig, SerialMode, VmConfig};
use vmm::events::Events;
use vmm::kvm::host::Host;
use vmm::monitor::{Launcher, Monitor, OnReset, StateKind};
use vmm::serial::{SerialBackend, SerialBackendError};

/// Far more than any step takes on an idle machine: only a hang reaches it.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn host() -> Arc<Host> {
    Arc::new(Host::open().expect("these tests need a usable /dev/kvm"))
}

/// Serial ports whose output is kept, and whose input the test types.
#[derive(Clone, Default)]
pub(crate) struct TestSerial {
    output: Arc<Mutex<Vec<u8>>>,
    port: Arc<Mutex<Option<Serial>>>,
}

impl TestSerial {
    /// Types into the serial port that was connected last.
    pub(crate) fn type_in(&self, bytes: &[u8]) {
        let port = self.port.lock().unwrap();
        let port = port.as_ref().expect("a serial port is connected");
        assert_eq!(port.input(bytes), bytes.len());
    }

    /// Waits until the guest has printed `text` since the last call.
    pub(crate) fn wait_for(&self, text: &str) {
        wait_until(text, || {
            let mut output = self.output.lock().unwrap();
            let found = String::from_utf8_lossy(&output).contains(text);
            if found {
                output.clear();
            }
            found
        });
    }
}

impl SerialBackend for TestSerial {
    fn open_output(&self, _: &SerialConfig) -> Result<SerialOutput, SerialBackendError> {
        Ok(Box::new(Kept(Arc::clone(&self.output))))
    }

    fn connect_input(&self, _: &SerialConfig, port: &Serial) -> Result<(), SerialBackendError> {
        *self.port.lock().unwrap() = Some(port.clone());
        Ok(())
    }
}

struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The kernel and the configuration of the guest.
pub(crate) struct Image {
    kernel: NamedTempFile,
}

impl Image {
    pub(crate) fn new() -> Self {
        let mut kernel = NamedTempFile::new().unwrap();
        kernel.write_all(guest_images::DIRTIER).unwrap();
        Self { kernel }
    }

    pub(crate) fn config(&self) -> VmConfig {
        let dirtier = Config {
            memory: Some(Size::from_mib(2)),
            cold: Some(Size::from_mib(1)),
            ..Config::default()
        };
        let mut config = VmConfig::from_json(br#"{"payload":{}}"#).unwrap();
        config.payload.kernel = Some(self.kernel.path().to_owned());
        config.payload.cmdline = Some(dirtier.command_line().unwrap());
        config.memory.size = 32 << 20;
        config.balloon = Some(BalloonConfig::default());
        config.serial = SerialConfig {
            mode: SerialMode::Tty,
            file: None,
        };
        config
    }
}

/// A monitor that launches guests with this serial port.
pub(crate) fn launching_monitor(serial: impl SerialBackend + 'static) -> Arc<Monitor> {
    let launcher = Launcher {
        host: host(),
        dirty_log: None,
        serial: Arc::new(serial),
        on_reset: OnReset::End,
    };
    Monitor::new(Some(launcher), Events::nowhere())
}

/// Waits until the monitor is in this state.
pub(crate) fn wait_for_state(monitor: &Monitor, wanted: StateKind) {
    wait_until(&format!("{wanted:?}"), || monitor.state_kind() == wanted);
}

/// Waits until something holds.
pub(crate) fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LIMIT, "waited too long for {what:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
