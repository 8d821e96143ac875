//! `ferry receive`: wait for a guest, then be its monitor.

use std::sync::Arc;
use std::thread;

use vmm::kvm::host::Host;
use vmm::machine;
use vmm::migrate::Admission;
use vmm::monitor::Reception;
use vmm::serial::SerialBackend;

use super::Failure;
use super::arguments::ReceiveArguments;
use super::service::{Outside, Service, end_with_parent};
use super::stdio::StdioSerial;

pub(super) fn receive(arguments: &ReceiveArguments) -> Result<u8, Failure> {
    let outside = Outside::open(
        arguments.api_socket.as_ref(),
        arguments.event_monitor.as_ref(),
    )?;
    let host = Arc::new(Host::open()?);
    if let Some(parent) = arguments.end_with_parent {
        end_with_parent(parent)?;
    }
    let stdio = Arc::new(StdioSerial::default());
    let mut service = Service::start(outside, None, Arc::clone(&stdio))?;
    service.answer()?;
    let serial = arguments.serial.clone().unwrap_or_default();
    // Opened once before a guest arrives, so that an invalid path is reported now.
    drop(stdio.open_output(&serial)?);
    let devices = arguments.devices.config();
    // Limits that depend on the size of guest memory are checked when the size is known.
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
    let status = service.until_end();
    listener.close();
    status
}
