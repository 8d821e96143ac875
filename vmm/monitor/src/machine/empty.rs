//! A machine without contents, and the two ways to fill it: booting a kernel, or restoring a saved guest.

use std::sync::Arc;

use ept::Notifier;
use kvm_bindings::{kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{VcpuFd, VmFd};

use super::dirty_logs::DirtyLogs;
use super::end::EndLatch;
use super::facts::{self, NamedFacts};
use super::live::{Machine, Paused};
use super::port_devices::PortDevices;
use super::virtio::{self, Devices, OnLoss, OpenContext, OpenedDevice};
use super::{MAX_CPUS, MachineError, Result, Shape, Wiring, kvm_error, sections};
use crate::boot::{self, GuestCpuid, Payload};
use crate::config::DevicesConfig;
use crate::kvm::dirty_log::{self, DirtyLogMode};
use crate::kvm::host::Host;
use crate::kvm::slots::Slots;
use crate::kvm::state;
use crate::memory::{DeviceMemory, GuestRam};
use crate::vcpu::{Vcpu, VcpuContext};
use migration::{Description, Section};

/// Guest-physical address of the three pages that KVM needs for its own use on Intel hosts (KVM_SET_TSS_ADDR). They
/// lie in the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A machine with memory, vCPUs and interrupt controllers, and no guest in it.
pub struct EmptyMachine {
    pub(super) host: Arc<Host>,
    pub(super) vm: Arc<VmFd>,
    pub(super) vcpus: Vec<VcpuFd>,
    slots: Arc<Slots>,
    notifier: Notifier,
    devices: Vec<OpenedDevice>,
    dirty_log: DirtyLogMode,
}

impl EmptyMachine {
    /// Creates a machine of this shape.
    ///
    /// # Errors
    /// Returns [`MachineError::Cpus`] if the number of vCPUs is out of range, and otherwise the error of the part that
    /// the host cannot provide.
    pub fn new(host: &Arc<Host>, shape: &Shape) -> Result<Self> {
        let most = MAX_CPUS.min(u32::try_from(host.max_vcpus()).unwrap_or(MAX_CPUS));
        if !(1..=most).contains(&shape.cpus) {
            return Err(MachineError::Cpus(shape.cpus, most));
        }
        let dirty_log = host.dirty_log(shape.dirty_log)?;
        let ram = Arc::new(GuestRam::new(shape.memory_bytes, shape.backing)?);
        let vm = host.kvm().create_vm().map_err(kvm_error("KVM_CREATE_VM"))?;
        let vm = Arc::new(vm);
        dirty_log::configure(&vm, dirty_log).map_err(|source| MachineError::Kvm {
            call: "KVM_ENABLE_CAP dirty log",
            source,
        })?;
        // The slots come before the interrupt controllers: creating a controller starts a grace period of KVM's I/O
        // buses, and a later change of slots would wait for its end.
        let slots = Arc::new(Slots::new(Arc::clone(&vm), ram)?);
        create_controllers(&vm)?;
        let vcpus = (0..shape.cpus)
            .map(|index| {
                vm.create_vcpu(u64::from(index))
                    .map_err(kvm_error("KVM_CREATE_VCPU"))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            host: Arc::clone(host),
            vm,
            slots,
            vcpus,
            notifier: Notifier::new(),
            devices: Vec::new(),
            dirty_log,
        })
    }

    /// Returns the guest memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.slots.ram()
    }

    /// Opens the host resources of virtio devices: images, taps and sockets. Disk images are locked later, by
    /// [`Self::boot`] or [`Self::restore`].
    ///
    /// # Errors
    /// Returns the error of the first resource that cannot be opened. The error names the command-line option.
    pub fn open_devices(&mut self, config: &DevicesConfig) -> Result<()> {
        let with = OpenContext {
            vm: &self.vm,
            ram: self.slots.ram(),
            notifier: &self.notifier,
        };
        self.devices = virtio::open(config, &with)?;
        Ok(())
    }

    /// Returns the reasons why the guest that `description` announces cannot be restored into this machine. The list
    /// is empty if it can.
    #[must_use]
    pub fn misfits(&self, description: &Description) -> Vec<String> {
        let here: Vec<NamedFacts> = self.devices.iter().map(OpenedDevice::facts).collect();
        let misfits = facts::device_misfits(&description.facts, &here);
        if !misfits.is_empty() {
            return misfits;
        }
        let names = here.iter().map(|device| device.name.as_str());
        let known = sections::kinds(self.vcpus.len(), names);
        migration::misfits(&description.sections, &known)
    }

    /// Loads a kernel and sets the vCPUs to its entry point.
    ///
    /// # Errors
    /// Returns [`MachineError::Boot`] if the kernel cannot be loaded, and otherwise the error of the part that cannot
    /// be built.
    pub fn boot(self, payload: &Payload, wiring: Wiring) -> Result<Paused> {
        let memory = self.ram().memory();
        let virtio: Vec<_> = self.devices.iter().map(OpenedDevice::resources).collect();
        let hardware = boot::AcpiHardware {
            cpus: u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX),
            virtio: &virtio,
        };
        let loaded = boot::load(memory, payload, &hardware)?;
        let count = u32::from(hardware.cpus);
        let cpuid = GuestCpuid::new(self.host.kvm(), count)?;
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            vcpu.set_cpuid2(&cpuid.for_kvm(index)?)
                .map_err(kvm_error("KVM_SET_CPUID2"))?;
            boot::start_registers(memory, vcpu, index, &loaded)?;
        }
        let end = EndLatch::new(wiring.on_end);
        let ports = PortDevices::new(&self.vm, self.ram(), wiring.serial_output, &end.report)?;
        let cpuid = cpuid.of_vcpu(0);
        self.assemble(ports, cpuid, end, &wiring.on_loss, None)
    }

    /// Restores a guest from the sections that [`Paused::save`] wrote. `cpuid` is the CPUID that the source gave to
    /// vCPU 0: a host that does not intercept CPUID would report other values than that.
    ///
    /// Returns the machine, and the names of the model-specific registers that KVM refused to set.
    ///
    /// # Errors
    /// Returns [`MachineError::Section`] if a section is missing or invalid, and [`MachineError::State`] if KVM
    /// rejects a part of the state.
    pub fn restore(
        self,
        saved: &[Section],
        cpuid: Vec<kvm_cpuid_entry2>,
        wiring: Wiring,
    ) -> Result<(Paused, Vec<String>)> {
        let refused = self.restore_kvm(saved)?;
        let end = EndLatch::new(wiring.on_end);
        let ports = PortDevices::restore(saved, &self.vm, wiring.serial_output, &end.report)?;
        let machine = self.assemble(ports, cpuid, end, &wiring.on_loss, Some(saved))?;
        Ok((machine, refused))
    }

    fn assemble(
        self,
        port_devices: PortDevices,
        cpuid: Vec<kvm_cpuid_entry2>,
        end: EndLatch,
        on_loss: &OnLoss,
        saved: Option<&[Section]>,
    ) -> Result<Paused> {
        let ports = Arc::new(port_devices.bus(&end.report)?);
        let memory = DeviceMemory::new(self.slots.ram()).map_err(MachineError::DeviceMemory)?;
        let devices = Devices::attach(self.devices, &self.vm, &memory, saved, on_loss)?;
        let mmio = Arc::new(devices.bus()?);
        let context = VcpuContext {
            ports: Arc::clone(&ports),
            mmio: Arc::clone(&mmio),
            on_end: Arc::clone(&end.report),
        };
        let notifier = self.notifier;
        let mut vcpus = Vec::new();
        let mut subscriptions = Vec::new();
        for (index, fd) in (0..).zip(self.vcpus) {
            let vcpu = Vcpu::spawn(index, fd, context.clone())
                .map_err(|source| MachineError::Thread(index, source))?;
            subscriptions.push(notifier.subscribe(Arc::clone(vcpu.gate()) as _)?);
            vcpus.push(vcpu);
        }
        let dirty_logs = DirtyLogs::new(
            self.dirty_log,
            Arc::clone(&self.slots),
            notifier.clone(),
            devices.named_back_ends(),
        );
        Ok(Paused::new(Machine {
            _subscriptions: subscriptions,
            vcpus,
            notifier,
            end,
            dirty_logs: Arc::new(dirty_logs),
            devices,
            port_devices,
            cpuid,
            ports,
            mmio,
            slots: self.slots,
            vm: self.vm,
            host: self.host,
        }))
    }
}

/// Creates the interrupt controllers and the timer. KVM wants them before the vCPUs.
fn create_controllers(vm: &VmFd) -> Result<()> {
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(kvm_error("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(kvm_error("KVM_CREATE_IRQCHIP"))?;
    vm.create_pit2(kvm_pit_config::default())
        .map_err(kvm_error("KVM_CREATE_PIT2"))?;
    state::check_xsave(vm).map_err(|source| MachineError::State {
        section: "vcpu".into(),
        source,
    })
}
