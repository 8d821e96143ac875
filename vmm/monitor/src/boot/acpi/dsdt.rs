//! The DSDT: the devices of the machine, and the handler of its generic events.
//!
//! Specifications: ACPI 6.5, sections 5.6.9 (Generic Event Device), 6.1 and 6.4 (identification and resources), 7.4.2
//! (`\_S5`) and 8.4 (processors); Microsoft, "Virtual Machine Generation ID"; virtio 1.2, section 4.2, and Linux
//! drivers/virtio/virtio_mmio.c for the ID of virtio-mmio devices.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package,
    Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use devices::acpi::{
    EVENTS_PORT, EVENTS_PORTS, GENERIC_EVENTS_INTERRUPT, GenericEvent, SLEEP_TYPE_OFF,
};
use devices::{COM1_INTERRUPT, COM1_PORT, COM1_PORTS, RTC_PORT, RTC_PORTS};
use vm_memory::Address;

use super::tables::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use super::{AcpiHardware, GENERATION_ID, VirtioMmioResources};

/// Revision of the DSDT. From revision 2 on, integers in AML are 64 bits wide.
const REVISION: u8 = 2;
/// Bytes of the header of a table.
const HEADER: u32 = 36;

/// Notification value 0x80, "status changed". For a button it means that it was pressed, for the generation ID that the
/// ID changed.
const NOTIFICATION: u8 = 0x80;

/// Path of the power button device.
const POWER_BUTTON: &str = "\\_SB_.PWRB";
/// Path of the generation ID device.
const GENERATION: &str = "\\_SB_.VGEN";

/// Returns the DSDT for `hardware`.
pub(super) fn dsdt(hardware: &AcpiHardware<'_>) -> Vec<u8> {
    let mut devices = vec![
        serial_port(),
        clock(),
        power_button(),
        generation_id(),
        event_device(),
    ];
    devices.extend((0..hardware.cpus).map(processor));
    devices.extend((0..).zip(hardware.virtio).map(virtio_mmio));
    let scope = AmlCode::of(&Scope::new("\\_SB_".into(), AmlCode::list(&devices)));
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&[soft_off().0, scope.0].concat());
    dsdt.as_slice().to_vec()
}

/// `\_S5`: the sleep type that powers the machine off. The second sleep register and the reserved elements are zero.
fn soft_off() -> AmlCode {
    name(
        "\\_S5_",
        &Package::new(vec![&SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]),
    )
}

/// Serial port COM1, a 16550.
fn serial_port() -> AmlCode {
    let ports = port_range(COM1_PORT, COM1_PORTS);
    device(
        "COM1",
        &[
            name("_HID", &EISAName::new("PNP0501")),
            name("_UID", &1_u8),
            name("_DDN", &"COM1"),
            resources(&[&ports, &edge(COM1_INTERRUPT)]),
        ],
    )
}

/// Real-time clock. It has no interrupt, because the device has no alarm.
fn clock() -> AmlCode {
    device(
        "RTC_",
        &[
            name("_HID", &EISAName::new("PNP0B00")),
            resources(&[&port_range(RTC_PORT, RTC_PORTS)]),
        ],
    )
}

/// Power button, as a control method device.
fn power_button() -> AmlCode {
    device("PWRB", &[name("_HID", &EISAName::new("PNP0C0C"))])
}

/// Device of the generation ID. Guests find it by its compatible ID.
fn generation_id() -> AmlCode {
    let address = GENERATION_ID.raw_value();
    let (low, high) = (address & 0xffff_ffff, address >> 32);
    device(
        "VGEN",
        &[
            name("_HID", &"FERY0001"),
            name("_CID", &"VM_Gen_Counter"),
            name("_DDN", &"VM_Gen_Counter"),
            name("ADDR", &Package::new(vec![&low, &high])),
        ],
    )
}

/// Generic Event Device. Its `_EVT` method reads and clears the pending events, and notifies the device of each event.
fn event_device() -> AmlCode {
    let (first, bytes) = (EVENTS_PORT, EVENTS_PORTS);
    let region = OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &first, &bytes);
    let field = Field::new(
        "EVTR".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"PEND", usize::from(EVENTS_PORTS) * 8)],
    );
    let (taken, pending) = (Local(0), Path::new("PEND"));
    let take = AmlCode::of(&Store::new(&taken, &pending));
    let handler = [
        take,
        notify_at(GenericEvent::PowerButton, POWER_BUTTON),
        notify_at(GenericEvent::GenerationChanged, GENERATION),
    ];
    let method = Method::new("_EVT".into(), 1, true, AmlCode::list(&handler));
    device(
        "GED_",
        &[
            name("_HID", &"ACPI0013"),
            name("_UID", &ZERO),
            resources(&[&edge(GENERIC_EVENTS_INTERRUPT)]),
            AmlCode::of(&region),
            AmlCode::of(&field),
            AmlCode::of(&method),
        ],
    )
}

/// Returns code that notifies the device `path` if `event` is among the events that were read.
fn notify_at(event: GenericEvent, path: &str) -> AmlCode {
    let bit = event as u32;
    let (taken, path) = (Local(0), Path::new(path));
    let is_set = And::new(&ZERO, &taken, &bit);
    let notify = Notify::new(&path, &NOTIFICATION);
    AmlCode::of(&If::new(&is_set, vec![&notify]))
}

/// Processor device. Its `_UID` must equal the processor UID in the MADT.
fn processor(index: u8) -> AmlCode {
    device(
        &format!("C{index:03X}"),
        &[name("_HID", &"ACPI0007"), name("_UID", &index)],
    )
}

/// Virtio-mmio device. `LNRO0005` is the ID that the driver of Linux matches.
fn virtio_mmio((index, device_resources): (u32, &VirtioMmioResources)) -> AmlCode {
    let registers = Memory32Fixed::new(true, device_resources.base, device_resources.bytes);
    device(
        &format!("V{index:03X}"),
        &[
            name("_HID", &"LNRO0005"),
            name("_UID", &index),
            name("_CCA", &1_u8),
            resources(&[&registers, &edge(device_resources.gsi)]),
        ],
    )
}

/// AML byte code.
struct AmlCode(Vec<u8>);

impl AmlCode {
    /// Encodes an AML object.
    fn of(object: &dyn Aml) -> Self {
        let mut bytes = Vec::new();
        object.to_aml_bytes(&mut bytes);
        Self(bytes)
    }

    /// Returns the elements as the objects that the builders of `acpi_tables` take.
    fn list(codes: &[Self]) -> Vec<&dyn Aml> {
        codes.iter().map(|code| code as &dyn Aml).collect()
    }
}

impl Aml for AmlCode {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// Returns a device that contains `parts`.
fn device(path: &str, parts: &[AmlCode]) -> AmlCode {
    AmlCode::of(&Device::new(path.into(), AmlCode::list(parts)))
}

/// Returns a named object.
fn name(path: &str, value: &dyn Aml) -> AmlCode {
    AmlCode::of(&Name::new(path.into(), value))
}

/// Returns the current resource settings (`_CRS`) of a device.
fn resources(list: &[&dyn Aml]) -> AmlCode {
    name("_CRS", &ResourceTemplate::new(list.to_vec()))
}

/// Returns a fixed range of I/O ports.
fn port_range(first: u16, count: u16) -> IO {
    IO::new(first, first, 1, u8::try_from(count).unwrap_or(u8::MAX))
}

/// Interrupt of a device: edge-triggered, active high and exclusive.
fn edge(gsi: u32) -> Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge_triggered, active_low, shared, gsi)
}
