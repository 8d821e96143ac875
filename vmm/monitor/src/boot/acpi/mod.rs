//! The ACPI tables: a hardware-reduced platform with processors, interrupt controllers, a serial port, a clock,
//! a power button, a generation ID and virtio-mmio devices.
//!
//! Hardware-reduced (ACPI 6.5, section 4.1) means that there are no fixed registers, no ACPI interrupt and, to
//! Linux, no PIC and no PIT: every interrupt goes through the I/O APIC as the DSDT describes it, and time comes
//! from the local APIC and kvm-clock. Guests that do not look for ACPI find a PC without it.
//!
//! ```text
//! 0xe_0000  RSDP, then DSDT, FADT, MADT and XSDT, one after the other; 1 KiB with two vCPUs
//! 0xf_f000  generation ID, whose page nothing shares but the reset vector
//! ```
//!
//! All of it lies where a PC's firmware is: a guest finds the RSDP by searching there, too, and the memory map
//! says that it is reserved.

mod dsdt;
mod tables;
#[cfg(test)]
mod tests;

use vm_memory::{Address, Bytes, GuestAddress};

use super::BootError;
use crate::memory::GuestMemory;

/// Where the RSDP is, and the tables behind it: where the firmware area begins.
pub(super) const RSDP: GuestAddress = GuestAddress(super::FIRMWARE_START);
/// Where the generation ID is: 16 bytes, in no page that a guest uses otherwise, as its specification demands.
pub(super) const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// Room for the RSDP and the tables: up to the generation ID.
const CAPACITY: usize = 0x1_f000;

/// Registers of virtio-mmio devices: from here on, in the hole below 4 GiB.
const VIRTIO_MMIO_START: u32 = 0xd000_0000;
/// The registers of one virtio-mmio device take so many bytes.
const VIRTIO_MMIO_BYTES: u32 = 0x1000;
/// The interrupt line of the first virtio-mmio device; each has its own, up to `VIRTIO_MMIO_GSI_LAST`.
const VIRTIO_MMIO_GSI_FIRST: u32 = 10;
/// The I/O APIC's last line.
const VIRTIO_MMIO_GSI_LAST: u32 = 23;

/// The registers and the interrupt of a virtio-mmio device, as the guest is told of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioResources {
    /// The guest-physical address of its registers.
    pub base: u32,
    /// How many bytes they take.
    pub bytes: u32,
    /// Its interrupt line: edge-triggered, active high.
    pub gsi: u32,
}

impl VirtioMmioResources {
    /// The place of the device with this number, from 0; none when there are no more interrupt lines.
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

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct AcpiHardware<'a> {
    /// vCPUs; the local APIC of each has its index as its ID.
    pub cpus: u8,
    /// Its virtio-mmio devices.
    pub virtio: &'a [VirtioMmioResources],
}

/// Writes the tables.
pub(super) fn write(memory: &GuestMemory, hardware: &AcpiHardware<'_>) -> Result<(), BootError> {
    let tables = build(hardware);
    if tables.len() > CAPACITY {
        return Err(BootError::Memory(format!(
            "the ACPI tables take {} bytes, {CAPACITY} are there",
            tables.len()
        )));
    }
    memory
        .write_slice(&tables, RSDP)
        .map_err(|error| BootError::Memory(error.to_string()))
}

/// The RSDP and all tables, as they are from [`RSDP`] on.
fn build(hardware: &AcpiHardware<'_>) -> Vec<u8> {
    let mut image = Image::default();
    // The place of the RSDP, which is known last.
    image.append(vec![0; acpi_tables::rsdp::Rsdp::len()]);
    let dsdt = image.append(dsdt::dsdt(hardware));
    let fadt = image.append(tables::fadt(dsdt));
    let madt = image.append(tables::madt(hardware.cpus));
    let xsdt = image.append(tables::xsdt(&[fadt, madt]));
    let rsdp = tables::rsdp(xsdt);
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    image.bytes
}

/// Tables one after the other.
#[derive(Default)]
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Returns the guest-physical address of `table`.
    fn append(&mut self, table: Vec<u8>) -> u64 {
        const ALIGNMENT: usize = 16;
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = RSDP.raw_value() + self.bytes.len() as u64;
        self.bytes.extend(table);
        address
    }
}
