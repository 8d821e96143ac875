//! ACPI tables for a hardware-reduced platform with processors, interrupt controllers, a serial port, a real-time
//! clock, a power button, a generation ID and virtio-mmio devices.
//!
//! Hardware-reduced (ACPI 6.5, section 4.1) means that there are no fixed registers and no SCI. Linux then uses neither
//! the PIC nor the PIT: every interrupt goes through the I/O APIC as described in the DSDT, and time comes from the
//! local APIC and kvm-clock. A guest that does not use ACPI finds a PC with a PIC and a PIT.
//!
//! ```text
//! 0xe_0000  RSDP, then DSDT, FADT, MADT and XSDT, one after the other; 1 KiB with two vCPUs
//! 0xf_f000  generation ID, whose page nothing shares but the reset vector
//! ```
//!
//! The tables are in the area of a PC's firmware, which the memory map reserves. A guest can also find the RSDP by
//! searching this area.

mod dsdt;
mod tables;
#[cfg(test)]
mod tests;

use vm_memory::{Address, Bytes, GuestAddress};

use super::BootError;
use crate::memory::GuestMemory;

/// Guest-physical address of the RSDP, which the tables follow. It is the start of the firmware area.
pub(super) const RSDP: GuestAddress = GuestAddress(super::FIRMWARE_START);
/// Guest-physical address of the generation ID, 16 bytes. Its specification requires that the guest does not use the
/// page for anything else.
pub(super) const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// Maximum bytes of the RSDP and the tables, which end before the generation ID.
const CAPACITY: usize = 0x1_f000;

/// Guest-physical address of the registers of the first virtio-mmio device, in the hole below 4 GiB.
const VIRTIO_MMIO_START: u32 = 0xd000_0000;
/// Bytes of the register window of one virtio-mmio device.
const VIRTIO_MMIO_BYTES: u32 = 0x1000;
/// Interrupt line of the first virtio-mmio device. Each device has its own line, up to `VIRTIO_MMIO_GSI_LAST`.
const VIRTIO_MMIO_GSI_FIRST: u32 = 10;
/// Last line of the I/O APIC.
const VIRTIO_MMIO_GSI_LAST: u32 = 23;

/// Register window and interrupt line of one virtio-mmio device, as described in the DSDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioResources {
    /// Guest-physical address of the registers.
    pub base: u32,
    /// Bytes of the registers.
    pub bytes: u32,
    /// Interrupt line (GSI), edge-triggered and active high.
    pub gsi: u32,
}

impl VirtioMmioResources {
    /// Returns the resources of device number `index`, counted from 0. Returns `None` if there is no interrupt line
    /// left.
    #[must_use]
    pub fn nth(index: u32) -> Option<Self> {
        let gsi = VIRTIO_MMIO_GSI_FIRST.checked_add(index)?;
        (gsi <= VIRTIO_MMIO_GSI_LAST).then_some(Self {
            base: VIRTIO_MMIO_START + index * VIRTIO_MMIO_BYTES,
            bytes: VIRTIO_MMIO_BYTES,
            gsi,
        })
    }
}

/// Hardware that the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct AcpiHardware<'a> {
    /// Number of vCPUs. The ID of a local APIC is the index of its vCPU.
    pub cpus: u8,
    /// Virtio-mmio devices.
    pub virtio: &'a [VirtioMmioResources],
}

/// Writes the RSDP and the tables to guest memory.
pub(super) fn write(memory: &GuestMemory, hardware: &AcpiHardware<'_>) -> Result<(), BootError> {
    let tables = build(hardware);
    if tables.len() > CAPACITY {
        return Err(BootError::Memory(format!(
            "the ACPI tables take {} bytes, but only {CAPACITY} are available",
            tables.len()
        )));
    }
    memory
        .write_slice(&tables, RSDP)
        .map_err(|error| BootError::Memory(error.to_string()))
}

/// Returns the RSDP and all tables as one image, to be loaded at [`RSDP`].
fn build(hardware: &AcpiHardware<'_>) -> Vec<u8> {
    let mut image = TableImage::default();
    // Space for the RSDP, which is filled in last because it contains the address of the XSDT.
    image.append(vec![0; acpi_tables::rsdp::Rsdp::len()]);
    let dsdt = image.append(dsdt::dsdt(hardware));
    let fadt = image.append(tables::fadt(dsdt));
    let madt = image.append(tables::madt(hardware.cpus));
    let xsdt = image.append(tables::xsdt(&[fadt, madt]));
    let rsdp = tables::rsdp(xsdt);
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    image.bytes
}

/// Tables in one image, in the order in which they are appended.
#[derive(Default)]
struct TableImage {
    bytes: Vec<u8>,
}

impl TableImage {
    /// Appends `table` and returns its guest-physical address.
    fn append(&mut self, table: Vec<u8>) -> u64 {
        const ALIGNMENT: usize = 16;
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = RSDP.raw_value() + self.bytes.len() as u64;
        self.bytes.extend(table);
        address
    }
}
