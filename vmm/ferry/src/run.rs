//! `ferry run`: launch a guest.

use std::fs;
use std::sync::Arc;

use vmm::config::{CpusConfig, MemoryConfig, PayloadConfig, VmConfig};
use vmm::kvm::host::Host;
use vmm::monitor::{Launcher, MonitorError, OnReset};

use super::Failure;
use super::arguments::RunArguments;
use super::service::{Outside, Service, end_with_parent};
use super::stdio::StdioSerial;

pub(super) fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    let outside = Outside::open(
        arguments.api_socket.as_ref(),
        arguments.event_monitor.as_ref(),
    )?;
    let config = configuration(arguments)?;
    let host = Arc::new(Host::open()?);
    if let Some(parent) = arguments.end_with_parent {
        end_with_parent(parent)?;
    }
    let serial = Arc::new(StdioSerial::default());
    let launcher = Launcher {
        host,
        dirty_log: arguments.dirty_log,
        serial: Arc::clone(&serial) as _,
        on_reset: match arguments.no_reboot {
            true => OnReset::End,
            false => OnReset::Reboot,
        },
    };
    let mut service = Service::start(outside, Some(launcher), serial)?;
    match config {
        None => service.answer()?,
        Some(config) => {
            // The guest of the command line is created before a client can create another.
            service.monitor.create(config, Vec::new())?;
            service.answer()?;
            service.monitor.boot().map_err(without_context)?;
        }
    }
    service.until_end()
}

/// Leaves out the context "the guest could not be started", which is plain from the command line.
fn without_context(error: MonitorError) -> Failure {
    match error {
        MonitorError::Launch(error) => error,
        other => other.into(),
    }
}

/// Returns the guest that the arguments describe, or `None` if they describe none.
fn configuration(arguments: &RunArguments) -> Result<Option<VmConfig>, Failure> {
    if let Some(path) = &arguments.config {
        let named = |error: &dyn std::fmt::Display| format!("--config {}: {error}", path.display());
        let json = fs::read(path).map_err(|error| named(&error))?;
        let config = VmConfig::from_json(&json).map_err(|error| named(&error))?;
        return Ok(Some(config));
    }
    if arguments.kernel.is_none() {
        return match (arguments.of_a_guest(), &arguments.api_socket) {
            (Some(given), _) => Err(format!(
                "{given} describes a guest, and there is no kernel for it: add --kernel FILE, or describe the whole guest \
                 in --config FILE or, with --api-socket alone, in vm.create"
            )
            .into()),
            (None, None) => Err(
                "there is no guest: give --kernel FILE, or --config FILE; or --api-socket PATH alone, to wait for vm.create"
                    .into(),
            ),
            (None, Some(_)) => Ok(None),
        };
    }
    let mut memory = MemoryConfig::default();
    if let Some(wanted) = arguments.memory {
        memory = MemoryConfig {
            size: wanted.size,
            shared: wanted.shared,
            hugepages: wanted.hugepages,
        };
    }
    let devices = arguments.devices.config();
    Ok(Some(VmConfig {
        cpus: CpusConfig::of(arguments.cpus.unwrap_or(1)),
        memory,
        payload: PayloadConfig {
            kernel: arguments.kernel.clone(),
            cmdline: arguments.cmdline.clone(),
            initramfs: arguments.initramfs.clone(),
        },
        serial: arguments.serial.clone().unwrap_or_default(),
        disks: devices.disks,
        net: devices.net,
        rng: devices.rng,
        vsock: devices.vsock,
        balloon: devices.balloon,
        console: devices.console,
    }))
}
