//! `ferry run`: runs a guest.

use std::fs;
use std::sync::Arc;

use vmm::config::{CpusConfig, PayloadConfig, VmConfig};
use vmm::kvm::host::Host;
use vmm::monitor::{Launcher, MonitorError, OnReset};

use super::Failure;
use super::arguments::{DeviceArguments, RunArguments};
use super::service::{ApiAndEvents, Service, end_with_parent};
use super::stdio::StdioSerial;

/// Runs the guest that the arguments describe, or waits for API clients to create one. Returns the exit status.
pub(super) fn run(arguments: RunArguments) -> Result<u8, Failure> {
    let api_and_events = ApiAndEvents::open(
        arguments.api_socket.as_ref(),
        arguments.event_monitor.as_ref(),
    )?;
    let serial = Arc::new(StdioSerial::default());
    let dirty_log = arguments.dirty_log;
    let on_reset = match arguments.no_reboot {
        true => OnReset::End,
        false => OnReset::Reboot,
    };
    let parent = arguments.end_with_parent;
    let config = configuration(arguments)?;
    let launcher = Launcher {
        host: Arc::new(Host::open()?),
        dirty_log,
        serial: Arc::clone(&serial) as _,
        on_reset,
    };
    if let Some(parent) = parent {
        end_with_parent(parent)?;
    }
    let mut service = Service::start(api_and_events, Some(launcher), serial)?;
    match config {
        None => service.serve_api()?,
        Some(config) => {
            // Created before the API is served, so that no client can create another guest first.
            service.monitor.create(config, Vec::new())?;
            service.serve_api()?;
            service.monitor.boot().map_err(without_context)?;
        }
    }
    service.run_until_end()
}

/// Returns the configuration of the guest that the arguments describe, or `None` if an API client will create the guest.
fn configuration(arguments: RunArguments) -> Result<Option<VmConfig>, Failure> {
    if let Some(path) = &arguments.config {
        let named = |error: &dyn std::fmt::Display| format!("--config {}: {error}", path.display());
        let json = fs::read(path).map_err(|error| named(&error))?;
        let config = VmConfig::from_json(&json).map_err(|error| named(&error))?;
        return Ok(Some(config));
    }
    let has_options = arguments.guest.is_some() || arguments.devices.is_some();
    let Some(kernel) = arguments.kernel else {
        return match (has_options, arguments.api_socket) {
            (true, _) => Err(
                "the options describe a guest without a kernel: add --kernel FILE, or describe the whole guest in \
                 --config FILE or, with --api-socket alone, in the call vm.create"
                    .into(),
            ),
            (false, None) => Err(
                "no guest is described: give --kernel FILE or --config FILE, or give --api-socket PATH alone to wait \
                 for the call vm.create"
                    .into(),
            ),
            (false, Some(_)) => Ok(None),
        };
    };
    let guest = arguments.guest.unwrap_or_default();
    let devices = arguments
        .devices
        .map(DeviceArguments::config)
        .unwrap_or_default();
    let config = VmConfig {
        cpus: guest.cpus.map(CpusConfig::of).unwrap_or_default(),
        memory: guest.memory.unwrap_or_default(),
        payload: PayloadConfig {
            kernel: Some(kernel),
            cmdline: guest.cmdline,
            initramfs: guest.initramfs,
        },
        serial: guest.serial.unwrap_or_default(),
        ..VmConfig::default()
    };
    Ok(Some(config.with_devices(devices)))
}

/// Removes the context "the guest could not be started", which is plain from the command line.
fn without_context(error: MonitorError) -> Failure {
    match error {
        MonitorError::Launch(error) => error,
        other => other.into(),
    }
}
