//! `ferry receive`: waits for a guest that another process migrates here, and runs it.

use std::sync::Arc;
use std::thread;

use vmm::kvm::host::Host;
use vmm::machine;
use vmm::migrate::Admission;
use vmm::monitor::Reception;
use vmm::serial::SerialBackend;

use super::Failure;
use super::arguments::ReceiveArguments;
use super::service::{ApiAndEvents, Service, end_with_parent};
use super::stdio::StdioSerial;

/// Receives a guest and runs it until it ends. Returns the exit status.
pub(super) fn receive(arguments: ReceiveArguments) -> Result<u8, Failure> {
    let api_and_events = ApiAndEvents::open(
        arguments.api_socket.as_ref(),
        arguments.event_monitor.as_ref(),
    )?;
    let host = Arc::new(Host::open()?);
    if let Some(parent) = arguments.end_with_parent {
        end_with_parent(parent)?;
    }
    let stdio = Arc::new(StdioSerial::default());
    let mut service = Service::start(api_and_events, None, Arc::clone(&stdio))?;
    service.serve_api()?;
    let serial = arguments.serial.unwrap_or_default();
    // Opened once before a guest arrives, so that an invalid path is reported now.
    drop(stdio.open_output(&serial)?);
    let devices = arguments.devices.config();
    // The size of guest memory is not known yet. The checks that depend on it run when a guest arrives.
    devices.check(u64::MAX)?;
    machine::check_host_resources(&devices)?;
    let listener = Arc::new(arguments.url.listen()?);
    let reception = Reception {
        host,
        listener: Arc::clone(&listener),
        admission: Admission {
            memory_limit: arguments.memory_limit,
            backing: arguments.memory_backing.into(),
            devices,
        },
        serial,
        serial_backend: stdio,
    };
    let monitor = Arc::clone(&service.monitor);
    thread::Builder::new()
        .name("_migration".into())
        .spawn(move || monitor.receive_guest(&reception))?;
    let status = service.run_until_end();
    listener.close();
    status
}
