//! Injected panics: reported, the fate of the guest told, and later calls answered.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::{Serial, SerialOutput};
use vmm::api::ApiServer;
use vmm::config::SerialConfig;
use vmm::monitor::{StateKind, VmState};
use vmm::serial::{SerialBackend, SerialBackendError};
use vmm::vcpu::GuestEnd;

use crate::guest::{Image, launching_monitor, wait_for_state};
use crate::peers::Sockets;

/// A serial back end that panics at the first opening.
#[derive(Default)]
struct PanicsOnce(AtomicBool);

impl SerialBackend for PanicsOnce {
    fn open_output(&self, _: &SerialConfig) -> Result<SerialOutput, SerialBackendError> {
        assert!(self.0.swap(true, Ordering::SeqCst), "injected");
        Ok(Box::new(io::sink()))
    }

    fn connect_input(&self, _: &SerialConfig, _: &Serial) -> Result<(), SerialBackendError> {
        Ok(())
    }
}

/// A serial back end whose sink panics at the first byte, on the thread of the vCPU that writes it.
struct PanickingSink;

impl SerialBackend for PanickingSink {
    fn open_output(&self, _: &SerialConfig) -> Result<SerialOutput, SerialBackendError> {
        Ok(Box::new(Self))
    }

    fn connect_input(&self, _: &SerialConfig, _: &Serial) -> Result<(), SerialBackendError> {
        Ok(())
    }
}

impl Write for PanickingSink {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        panic!("injected");
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The answer to one call over a socket.
fn call(socket: &Path, path: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    let request = format!("PUT /api/v1/{path} HTTP/1.1\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_panic_of_an_api_thread_is_answered_and_later_calls_are_too() {
    let (image, sockets) = (Image::new(), Sockets::new());
    let monitor = launching_monitor(PanicsOnce::default());
    let socket = sockets.path("api");
    let _server = ApiServer::start(&socket, Arc::clone(&monitor)).unwrap();
    monitor.create(image.config(), Vec::new()).unwrap();
    let answer = call(&socket, "vm.boot");
    assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
    assert!(answer.contains("panicked: injected"), "{answer}");
    assert!(answer.contains("the guest is now: Created"), "{answer}");
    let answer = call(&socket, "vm.boot");
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    assert_eq!(monitor.state_kind(), StateKind::Running);
}

#[test]
fn a_panic_on_a_vcpu_thread_ends_the_guest_with_the_reason() {
    let image = Image::new();
    let monitor = launching_monitor(PanickingSink);
    monitor.create(image.config(), Vec::new()).unwrap();
    monitor.boot().unwrap();
    match monitor.wait_for_end() {
        GuestEnd::Failed(why) => {
            assert!(
                why.contains("vcpu0: internal error: panicked: injected"),
                "{why}"
            );
        }
        other => panic!("{other:?}"),
    }
    wait_for_state(&monitor, StateKind::Ended);
    assert_eq!(monitor.info().unwrap().state, VmState::Shutdown);
    monitor.pause().unwrap_err();
    monitor.delete().unwrap();
    assert_eq!(monitor.state_kind(), StateKind::Vacated);
}
