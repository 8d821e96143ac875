//! The tables without AML code: RSDP, XSDT, FADT and MADT.
//!
//! Specification: ACPI 6.5, sections 5.2.5 (RSDP), 5.2.8 (XSDT), 5.2.9 (FADT) and 5.2.12 (MADT).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use devices::RTC_CENTURY;
use devices::acpi::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};

/// OEMID field of every table: the vendor.
pub(super) const OEM_ID: [u8; 6] = *b"FERRY ";
/// OEM Table ID field of every table: the machine.
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"FERRYVM ";
/// OEM Revision field of every table.
pub(super) const OEM_REVISION: u32 = 1;

/// Guest-physical address of the registers of every local APIC (Intel SDM volume 3, 11.4.1).
const LOCAL_APIC: u32 = 0xfee0_0000;
/// Guest-physical address of the I/O APIC of KVM. Its lines are the interrupts 0 to 23.
const IO_APIC: u32 = 0xfec0_0000;

/// Flag of IAPC_BOOT_ARCH: no VGA. The flag for an 8042 keyboard controller is left clear, so that guests do not probe
/// for one.
const VGA_NOT_PRESENT: u16 = 1 << 2;

/// Returns the RSDP, which points to the XSDT.
pub(super) fn rsdp(xsdt: u64) -> Vec<u8> {
    bytes(&Rsdp::new(OEM_ID, xsdt))
}

/// Returns the XSDT, which lists the addresses of the other tables.
pub(super) fn xsdt(tables: &[u64]) -> Vec<u8> {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    tables.iter().for_each(|table| xsdt.add_entry(*table));
    bytes(&xsdt)
}

/// Returns the FADT, with the reset and sleep registers and the address of the DSDT.
pub(super) fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // These flags mean that the fixed registers do not exist. The power button is a device of the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc);
    fadt.century = RTC_CENTURY;
    fadt.iapc_boot_arch = VGA_NOT_PRESENT.into();
    fadt.reset_reg = byte_port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = byte_port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"FERRY\0\0\0").into();
    bytes(&fadt.finalize())
}

/// Returns the address of a register of one byte in I/O space.
fn byte_port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

/// Returns the MADT, with the local APICs and the I/O APIC. Its flags say that there are no 8259s. There are no
/// interrupt source overrides, so that every GSI equals the pin of the I/O APIC.
pub(super) fn madt(cpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC),
    );
    for index in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(
            index,
            index,
            EnabledStatus::Enabled,
        ));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    bytes(&madt)
}

/// Encodes a table.
fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
