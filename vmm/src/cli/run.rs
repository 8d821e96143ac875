//! `ferry run`: launch a guest.

use std::fs;
use std::sync::Arc;

use super::Failure;
use super::arguments::RunArguments;
use super::console;
use super::service::{Service, connect_input, end_with_parent};
use crate::config::{CpusConfig, MemoryConfig, PayloadConfig, VmConfig};
use crate::kvm::host::Host;
use crate::machine::{EmptyMachine, Wiring};

pub(super) fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    let config = configuration(arguments)?;
    let payload = config.boot_payload()?;
    let shape = config.shape(arguments.dirty_log)?;
    let host = Arc::new(Host::open()?);
    if let Some(parent) = arguments.end_with_parent {
        end_with_parent(parent)?;
    }
    let service = Service::start(arguments.api_socket.as_deref())?;
    let serial_output = console::output(&config.serial)?;
    let wiring = Wiring {
        serial_output,
        on_end: service.on_end(),
    };
    let machine = Arc::new(EmptyMachine::new(&host, &shape)?.boot(&payload, wiring)?);
    service.terminal().take(&config.serial)?;
    connect_input(&machine, &config.serial, &service.monitor)?;
    service.monitor.adopt(Arc::clone(&machine), config);
    machine.resume();
    drop(machine);
    service.until_end()
}

fn configuration(arguments: &RunArguments) -> Result<VmConfig, Failure> {
    if let Some(path) = &arguments.config {
        let named = |error: &dyn std::fmt::Display| format!("--config {}: {error}", path.display());
        let json = fs::read(path).map_err(|error| named(&error))?;
        return Ok(VmConfig::from_json(&json).map_err(|error| named(&error))?);
    }
    let mut memory = MemoryConfig::default();
    if let Some(wanted) = arguments.memory {
        memory = MemoryConfig {
            size: wanted.size,
            shared: wanted.shared,
            hugepages: wanted.hugepages,
        };
    }
    Ok(VmConfig {
        cpus: CpusConfig::of(arguments.cpus.unwrap_or(1)),
        memory,
        payload: PayloadConfig {
            kernel: arguments.kernel.clone(),
            cmdline: arguments.cmdline.clone(),
            initramfs: arguments.initramfs.clone(),
        },
        serial: arguments.serial.clone().unwrap_or_default(),
    })
}
