//! A machine with a guest in it. Whether its vCPUs run is its type: [`Running`] or [`Paused`].

use std::ops::Deref;
use std::sync::Arc;

use devices::acpi::GenericEvent;
use devices::virtio::BalloonControl;
use devices::{MmioBus, PortBus, Serial};
use ept::{Notifier, Subscription};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VmFd;

use super::dirty_logs::DirtyLogs;
use super::end::EndLatch;
use super::gauges::Gauges;
use super::port_devices::PortDevices;
use super::virtio::{Devices, DevicesError};
use super::{MachineError, Result, facts, sections};
use crate::boot;
use crate::kvm::host::Host;
use crate::kvm::slots::Slots;
use crate::memory::GuestRam;
use crate::vcpu::{Gate, GuestEnd, KickError, Vcpu};
use migration::{Section, SectionKind};

/// What can be done with a machine whether its vCPUs run or not. [`Running`] and [`Paused`] dereference to it.
pub struct Machine {
    // Fields are dropped from the top: first the notifier lets go of the vCPUs, then the vCPU threads end, then the
    // devices and the memory that they use are released.
    pub(super) _subscriptions: Vec<Subscription>,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) notifier: Notifier,
    pub(super) end: EndLatch,
    pub(super) dirty_logs: Arc<DirtyLogs>,
    pub(super) devices: Devices,
    pub(super) port_devices: PortDevices,
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) ports: Arc<PortBus>,
    pub(super) mmio: Arc<MmioBus>,
    pub(super) slots: Arc<Slots>,
    pub(super) vm: Arc<VmFd>,
    pub(super) host: Arc<Host>,
}

/// A machine whose vCPUs and devices run, unless the guest has ended by itself ([`Machine::end`]).
pub struct Running(Box<Machine>);

/// A machine whose vCPUs and devices are stopped: nothing writes to guest memory.
pub struct Paused(Box<Machine>);

/// A machine with a guest in it, running or paused.
pub enum Live {
    /// The vCPUs run.
    Running(Running),
    /// The vCPUs are stopped.
    Paused(Paused),
}

/// Whether the vCPUs of a guest run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// They run.
    Running,
    /// They are stopped.
    Paused,
}

/// A failed change of a machine's state: the machine as it was before, and the reason.
pub struct Failed<M> {
    /// Machine in the state that it had before the call.
    pub machine: M,
    /// Reason of the failure.
    pub error: MachineError,
}

impl Running {
    /// Stops every vCPU: first all are told, then all are waited for. Then stops the devices, each after the request
    /// that it processes.
    ///
    /// # Errors
    /// Returns the running machine and [`MachineError::Kick`] with the name of the vCPU if one does not stop in time.
    pub fn pause(self) -> std::result::Result<Paused, Failed<Self>> {
        if let Err(error) = self.stop_vcpus() {
            return Err(Failed {
                machine: self,
                error: error.into(),
            });
        }
        self.devices.pause();
        Ok(Paused(self.0))
    }

    fn stop_vcpus(&self) -> std::result::Result<(), KickError> {
        self.gates().for_each(|gate| gate.hold());
        let stopped = self.gates().try_for_each(|gate| gate.wait_parked());
        if stopped.is_err() {
            self.gates().for_each(|gate| gate.release());
        }
        stopped
    }
}

impl Paused {
    pub(super) fn new(machine: Machine) -> Self {
        Self(Box::new(machine))
    }

    /// Locks the disk images, starts the devices and lets the vCPUs run.
    ///
    /// # Errors
    /// Returns the paused machine and the reason if another process holds the lock of a disk image.
    pub fn resume(self) -> std::result::Result<Running, Failed<Self>> {
        self.start_with(|devices| {
            devices.resume();
            Ok(())
        })
    }

    /// Does the same as [`Self::resume`] for a guest that has just arrived by migration. If a part of it cannot
    /// start, nothing does, so that the guest can go on at its source.
    ///
    /// # Errors
    /// Returns the paused machine and the reason if another process holds the lock of a disk image, or if the
    /// vhost-user back end of a device is gone.
    pub fn resume_arrived(self) -> std::result::Result<Running, Failed<Self>> {
        self.start_with(Devices::resume_arrived)
    }

    fn start_with(
        self,
        start_devices: fn(&Devices) -> std::result::Result<(), DevicesError>,
    ) -> std::result::Result<Running, Failed<Self>> {
        if let Err(error) = self.start_devices_with(start_devices) {
            return Err(Failed {
                machine: self,
                error,
            });
        }
        self.gates().for_each(|gate| excuse_pause(gate));
        self.gates().for_each(|gate| gate.release());
        Ok(Running(self.0))
    }

    fn start_devices_with(
        &self,
        start_devices: fn(&Devices) -> std::result::Result<(), DevicesError>,
    ) -> Result<()> {
        self.devices.lock_images()?;
        if let Err(error) = start_devices(&self.devices) {
            self.devices.unlock_images()?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Locks the disk images again that [`Self::unlock_disks`] unlocked. Idempotent.
    ///
    /// # Errors
    /// Returns [`MachineError::Devices`] if another process holds the lock of an image.
    pub fn lock_disks(&self) -> Result<()> {
        Ok(self.devices.lock_images()?)
    }

    /// Unlocks the disk images, so that the process at the other end of a migration can lock them.
    ///
    /// # Errors
    /// Returns [`MachineError::Devices`] if the kernel refuses.
    pub fn unlock_disks(&self) -> Result<()> {
        Ok(self.devices.unlock_images()?)
    }

    /// Saves the state of everything but memory, one section for each vCPU, controller and device.
    ///
    /// # Errors
    /// Returns [`MachineError::Ended`] if the guest has ended, [`MachineError::State`] if KVM rejects a call, and
    /// [`MachineError::Devices`] if a vhost-user back end is gone.
    pub fn save(&self) -> Result<Vec<Section>> {
        self.check_not_ended()?;
        let mut saved = self.save_kvm()?;
        saved.extend(self.port_devices.save());
        saved.extend(self.devices.save()?);
        Ok(saved)
    }
}

impl Machine {
    /// Returns the guest memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.slots.ram()
    }

    /// Returns the serial port.
    #[must_use]
    pub fn serial(&self) -> &Serial {
        &self.port_devices.serial
    }

    /// Returns the vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// Returns the notifier through which the vCPUs are stopped for changes of guest memory.
    #[must_use]
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Returns the dirty logs.
    #[must_use]
    pub fn dirty_logs(&self) -> &Arc<DirtyLogs> {
        &self.dirty_logs
    }

    /// Returns the control of the balloon, if the machine has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&BalloonControl> {
        self.devices.balloon()
    }

    /// Returns a handle to the counters that other threads can read at any time.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        Gauges {
            ram: Arc::clone(self.ram()),
            gates: self.gates().cloned().collect(),
            serial: self.serial().clone(),
            ports: Arc::clone(&self.ports),
            mmio: Arc::clone(&self.mmio),
            devices: self.devices.gauges(),
            balloon: self.balloon().cloned(),
        }
    }

    /// Returns how the guest ended by itself, if it has.
    #[must_use]
    pub fn end(&self) -> Option<&GuestEnd> {
        self.end.get()
    }

    /// Returns the names and versions of the sections that [`Paused::save`] writes.
    #[must_use]
    pub fn section_kinds(&self) -> Vec<SectionKind> {
        sections::kinds(self.vcpus.len(), self.devices.names())
    }

    /// Returns what the destination of a migration must offer to the guest: processor features, and the host's side of
    /// each virtio device.
    #[must_use]
    pub fn facts(&self) -> Vec<Section> {
        facts::encode(&self.cpuid, self.devices.facts())
    }

    /// Returns the CPUID of vCPU 0.
    #[must_use]
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Gives the guest a new VM generation ID and notifies it. To be called after a clone or a rollback, before the
    /// guest runs.
    ///
    /// # Errors
    /// Returns [`MachineError::Ended`] if the guest has ended, and otherwise the reason why the ID or the interrupt
    /// failed.
    pub fn change_generation(&self) -> Result<()> {
        self.check_not_ended()?;
        boot::change_generation_id(self.ram().memory())?;
        Ok(self
            .port_devices
            .events
            .raise(GenericEvent::GenerationChanged)?)
    }

    /// Presses the ACPI power button. The guest decides what to do about it.
    ///
    /// # Errors
    /// Returns [`MachineError::Ended`] if the guest has ended, and [`MachineError::Events`] if the interrupt cannot be
    /// raised.
    pub fn power_button(&self) -> Result<()> {
        self.check_not_ended()?;
        Ok(self.port_devices.events.raise(GenericEvent::PowerButton)?)
    }

    pub(super) fn gates(&self) -> impl Iterator<Item = &Arc<Gate>> {
        self.vcpus.iter().map(Vcpu::gate)
    }

    fn check_not_ended(&self) -> Result<()> {
        match self.end() {
            None => Ok(()),
            Some(_) => Err(MachineError::Ended),
        }
    }
}

impl Live {
    /// Returns whether the vCPUs run.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        match self {
            Self::Running(_) => RunState::Running,
            Self::Paused(_) => RunState::Paused,
        }
    }
}

/// Tells the guest through kvm-clock that it was paused, so that its watchdogs do not take the time for a lockup.
fn excuse_pause(gate: &Gate) {
    // KVM returns EINVAL if the guest does not use kvm-clock (api.rst, KVM_KVMCLOCK_CTRL). It cannot be told then.
    let _without_clock = gate.fd().kvmclock_ctrl();
}

impl Deref for Running {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl Deref for Paused {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl Deref for Live {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        match self {
            Self::Running(machine) => machine,
            Self::Paused(machine) => machine,
        }
    }
}
