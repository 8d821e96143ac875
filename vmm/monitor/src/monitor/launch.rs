//! Launching guests: how a machine is made from a configuration, the first time and after each time it was off.

use std::error::Error;
use std::sync::Arc;

use crate::boot::Payload;
use crate::config::{
    ConfigError, DevicesConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig,
};
use crate::kvm::dirty_log::DirtyLogMode;
use crate::kvm::host::Host;
use crate::machine::{EmptyMachine, OnLoss, Paused, Shape, Wiring};
use crate::memory::Backing;
use crate::serial::SerialBackend;
use crate::vcpu::GuestEnd;

/// Action of a monitor when its guest resets itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReset {
    /// The guest is booted again.
    Reboot,
    /// The guest is over.
    End,
}

/// Host resources and policy for the guests that a monitor launches.
pub struct Launcher {
    /// KVM of this host.
    pub host: Arc<Host>,
    /// Mode of KVM's dirty log. `None` selects the best that the host has.
    pub dirty_log: Option<DirtyLogMode>,
    /// Host's side of the guests' serial ports.
    pub serial: Arc<dyn SerialBackend>,
    /// Action when a guest resets itself.
    pub on_reset: OnReset,
}

/// Callbacks of a monitor that each of its machines gets.
#[derive(Clone)]
pub(super) struct Callbacks {
    pub(super) on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
    pub(super) on_loss: OnLoss,
}

/// A checked configuration, from which any number of machines can be made one after the other.
pub(super) struct LaunchPlan {
    shape: Shape,
    payload: Payload,
    serial: SerialConfig,
    devices: DevicesConfig,
}

impl LaunchPlan {
    /// Checks `config`. Opens and allocates nothing.
    pub(super) fn new(
        config: &VmConfig,
        dirty_log: Option<DirtyLogMode>,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            shape: shape(config, dirty_log)?,
            payload: payload(&config.payload)?,
            serial: config.serial.clone(),
            devices: config.devices(),
        })
    }

    /// Makes a machine with the guest at its beginning, and connects its serial port.
    pub(super) fn launch(
        &self,
        launcher: &Launcher,
        callbacks: &Callbacks,
    ) -> Result<Paused, Box<dyn Error + Send + Sync>> {
        let wiring = Wiring {
            serial_output: launcher.serial.open_output(&self.serial)?,
            on_end: Arc::clone(&callbacks.on_end),
            on_loss: Arc::clone(&callbacks.on_loss),
        };
        let mut empty = EmptyMachine::new(&launcher.host, &self.shape)?;
        empty.open_devices(&self.devices)?;
        let machine = empty.boot(&self.payload, wiring)?;
        launcher
            .serial
            .connect_input(&self.serial, machine.serial())?;
        Ok(machine)
    }
}

/// Checks `config` and returns the shape of the machine that it describes.
fn shape(config: &VmConfig, dirty_log: Option<DirtyLogMode>) -> Result<Shape, ConfigError> {
    config.check()?;
    Ok(Shape {
        cpus: config.cpus.boot_vcpus,
        memory_bytes: config.memory.size,
        backing: backing(config.memory),
        dirty_log,
    })
}

fn backing(memory: MemoryConfig) -> Backing {
    match (memory.hugepages, memory.shared) {
        (true, _) => Backing::Hugetlb,
        (false, true) => Backing::Memfd,
        (false, false) => Backing::Anonymous,
    }
}

/// Returns the files that a guest boots from.
fn payload(config: &PayloadConfig) -> Result<Payload, ConfigError> {
    Ok(Payload {
        kernel: config.kernel()?.to_owned(),
        initramfs: config.initramfs.clone(),
        command_line: config.cmdline.clone().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskConfig, SerialMode};

    #[test]
    fn contradictions_are_named() {
        let mut config = VmConfig::from_json(br#"{"payload":{"kernel":"/k"}}"#).unwrap();
        config.cpus.max_vcpus = 4;
        assert_eq!(shape(&config, None).unwrap_err().path, "cpus.max_vcpus");
        config.cpus.max_vcpus = 1;
        config.memory = MemoryConfig {
            size: 1 << 30,
            shared: false,
            hugepages: true,
        };
        assert_eq!(shape(&config, None).unwrap_err().path, "memory.shared");
        config.memory.hugepages = false;
        config.disks.push(DiskConfig {
            vhost_user: true,
            vhost_socket: Some("/s".into()),
            ..DiskConfig::default()
        });
        assert_eq!(shape(&config, None).unwrap_err().path, "memory.shared");
        config.memory.shared = true;
        config.serial.mode = SerialMode::File;
        assert_eq!(shape(&config, None).unwrap_err().path, "serial.file");
        config.serial.file = Some("/s".into());
        shape(&config, None).unwrap();
        config.payload.kernel = None;
        assert_eq!(payload(&config.payload).unwrap_err().path, "payload.kernel");
    }
}
