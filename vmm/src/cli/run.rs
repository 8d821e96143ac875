//! `ferry run`: launch a guest.

use std::fs;
use std::sync::Arc;

use super::Failure;
use super::arguments::RunArguments;
use super::console;
use super::service::{InputLine, Service, end_with_parent};
use crate::boot::Payload;
use crate::config::{
    CpusConfig, DevicesConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig,
};
use crate::kvm::host::Host;
use crate::machine::{EmptyMachine, Machine, Shape, Wiring};
use crate::monitor::Relaunch;
use crate::vcpu::GuestEnd;

pub(super) fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    let config = configuration(arguments)?;
    let launch = Launch {
        payload: config.boot_payload()?,
        shape: config.shape(arguments.dirty_log)?,
        serial: config.serial.clone(),
        devices: config.devices(),
        host: Arc::new(Host::open()?),
    };
    if let Some(parent) = arguments.end_with_parent {
        end_with_parent(parent)?;
    }
    let service = Service::start(arguments.api_socket.as_deref())?;
    let machine = launch.machine(service.on_end())?;
    service.terminal().take(&config.serial)?;
    let input = InputLine::start(&config.serial, &service.monitor)?;
    input.connect(&machine)?;
    let relaunch = (!arguments.no_reboot).then(|| launch.again(input, service.on_end()));
    service
        .monitor
        .adopt(Arc::clone(&machine), config, relaunch);
    machine.resume()?;
    drop(machine);
    service.until_end()
}

/// All that it takes to launch the guest, the first time and after each reset.
struct Launch {
    host: Arc<Host>,
    shape: Shape,
    payload: Payload,
    serial: SerialConfig,
    devices: DevicesConfig,
}

impl Launch {
    /// A machine with the guest at its beginning.
    fn machine(
        &self,
        on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
    ) -> Result<Arc<Machine>, Failure> {
        let wiring = Wiring {
            serial_output: console::output(&self.serial)?,
            on_end,
        };
        let mut empty = EmptyMachine::new(&self.host, &self.shape)?;
        empty.open_devices(&self.devices)?;
        Ok(Arc::new(empty.boot(&self.payload, wiring)?))
    }

    /// What makes the machine anew, with the console of the one before.
    fn again(self, input: InputLine, on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>) -> Relaunch {
        Box::new(move || {
            // The last words of the guest come before its first ones.
            console::flush();
            let machine = self.machine(Arc::clone(&on_end))?;
            input.connect(&machine)?;
            Ok(machine)
        })
    }
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
    let devices = arguments.devices.config();
    Ok(VmConfig {
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
    })
}
