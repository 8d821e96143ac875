//! Tests of the ACPI tables: a parser checks the fixed fields, and `iasl` of Intel checks all tables.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;

const DEVICES: [VirtioMmioResources; 2] = [
    VirtioMmioResources {
        base: 0xd000_0000,
        bytes: 0x1000,
        gsi: 10,
    },
    VirtioMmioResources {
        base: 0xd000_1000,
        bytes: 0x1000,
        gsi: 11,
    },
];

const HARDWARE: AcpiHardware<'_> = AcpiHardware {
    cpus: 3,
    virtio: &DEVICES,
};

fn word<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().unwrap()
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Tables in the image that is loaded into guest memory.
struct ParsedTables {
    image: Vec<u8>,
}

impl ParsedTables {
    fn of(hardware: &AcpiHardware<'_>) -> Self {
        Self {
            image: build(hardware),
        }
    }

    /// Returns the table at `address`, after the checks of ACPI 6.5, section 5.2.6.
    fn table(&self, address: u64) -> &[u8] {
        let start = usize::try_from(address - RSDP.raw_value()).unwrap();
        let length = u32::from_le_bytes(word(&self.image, start + 4)) as usize;
        let table = &self.image[start..start + length];
        assert_eq!(sum(table), 0, "checksum of the table at {address:#x}");
        assert_eq!(&table[10..16], b"FERRY ");
        table
    }

    /// Returns the table with this signature, by following the pointers from the RSDP.
    fn named(&self, signature: &[u8; 4]) -> Vec<u8> {
        let rsdp = &self.image[..36];
        assert_eq!((&rsdp[..8], rsdp[15]), (&b"RSD PTR "[..], 2));
        assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
        let xsdt = self.table(u64::from_le_bytes(word(rsdp, 24)));
        assert_eq!(&xsdt[..4], b"XSDT");
        let mut tables: Vec<&[u8]> = xsdt[36..]
            .as_chunks::<8>()
            .0
            .iter()
            .map(|entry| self.table(u64::from_le_bytes(*entry)))
            .collect();
        let fadt = tables.iter().find(|table| table.starts_with(b"FACP"));
        tables.push(self.table(u64::from_le_bytes(word(fadt.unwrap(), 140))));
        let found = tables.iter().find(|table| table.starts_with(signature));
        found.unwrap().to_vec()
    }
}

#[test]
fn the_fadt_is_hardware_reduced_with_its_registers() {
    let fadt = ParsedTables::of(&HARDWARE).named(b"FACP");
    assert_eq!((fadt.len(), fadt[8]), (276, 6));
    let flags = u32::from_le_bytes(word(&fadt, 112));
    // HW_REDUCED_ACPI, RESET_REG_SUP, FIX_RTC, SLP_BUTTON, PWR_BUTTON, WBINVD.
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 6 | 1 << 5 | 1 << 4 | 1);
    // Address space, bit width, bit offset, access size, address: each register is a byte in I/O space.
    let port = |at| {
        (
            word::<4>(&fadt, at),
            u64::from_le_bytes(word(&fadt, at + 4)),
        )
    };
    assert_eq!(port(116), ([1, 8, 0, 1], 0x602));
    assert_eq!(fadt[128], 1, "RESET_VALUE");
    assert_eq!(port(244), ([1, 8, 0, 1], 0x600));
    assert_eq!(port(256), ([1, 8, 0, 1], 0x601));
    assert_eq!(fadt[108], 0x32, "CENTURY");
    assert_eq!(u16::from_le_bytes(word(&fadt, 109)), 4, "IAPC_BOOT_ARCH");
    // The 32-bit address of the DSDT and the address of the FACS are zero.
    assert_eq!(
        (word::<8>(&fadt, 36), word::<8>(&fadt, 132)),
        ([0; 8], [0; 8])
    );
}

#[test]
fn the_madt_has_a_local_apic_for_each_vcpu_and_the_io_apic() {
    for cpus in [1, 4, 64] {
        let hardware = AcpiHardware { cpus, ..HARDWARE };
        let madt = ParsedTables::of(&hardware).named(b"APIC");
        assert_eq!(u32::from_le_bytes(word(&madt, 36)), 0xfee0_0000);
        assert_eq!(u32::from_le_bytes(word(&madt, 40)), 0, "no 8259s");
        let (mut at, mut local, mut io) = (44, Vec::new(), Vec::new());
        while at < madt.len() {
            let entry = &madt[at..at + usize::from(madt[at + 1])];
            match entry[0] {
                0 => local.push((entry[2], entry[3], u32::from_le_bytes(word(entry, 4)))),
                1 => io.push((
                    u32::from_le_bytes(word(entry, 4)),
                    u32::from_le_bytes(word(entry, 8)),
                )),
                kind => panic!("structure {kind}"),
            }
            at += entry.len();
        }
        let expected: Vec<_> = (0..cpus).map(|index| (index, index, 1)).collect();
        assert_eq!((local, io), (expected, vec![(0xfec0_0000, 0)]));
    }
}

#[test]
fn the_tables_lie_in_the_firmware_area_and_touch_one_page() {
    use crate::memory::{Backing, GuestRam};
    let ram = GuestRam::new(2 << 20, Backing::Memfd).unwrap();
    write(ram.memory(), &HARDWARE).unwrap();
    let populated = ram.populated().unwrap();
    let pages: Vec<_> = populated.iter().map(|r| (r.start().0, r.pages())).collect();
    assert_eq!(pages, [(0xe_0000, 1)]);
    let mut signature = [0; 8];
    ram.memory().read_slice(&mut signature, RSDP).unwrap();
    assert_eq!(&signature, b"RSD PTR ");
}

#[test]
fn every_interrupt_line_is_one_devices() {
    let all: Vec<VirtioMmioResources> = (0..).map_while(VirtioMmioResources::nth).collect();
    let lines: Vec<u32> = all.iter().map(|resources| resources.gsi).collect();
    assert_eq!(lines, (10..=23).collect::<Vec<_>>());
    assert!(
        all.windows(2)
            .all(|two| two[0].base + 0x1000 == two[1].base)
    );
    assert!(u64::from(all[0].base) >= crate::memory::LOW_RAM_END);
    assert_eq!(VirtioMmioResources::nth(u32::MAX), None);
}

/// Runs `iasl` in a temporary directory.
struct Iasl(tempfile::TempDir);

impl Iasl {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new("iasl")
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .expect("iasl is needed: install the package acpica-tools");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(output.status.success(), "iasl {arguments:?}: {text}");
        text
    }

    /// Returns the disassembly of `table`.
    fn disassemble(&self, name: &str, table: &[u8]) -> String {
        let path = |kind| Path::new(name).with_extension(kind);
        fs::write(self.0.path().join(path("aml")), table).unwrap();
        let output = self.run(&["-d", &path("aml").display().to_string()]);
        assert!(!output.contains("rror"), "{output}");
        fs::read_to_string(self.0.path().join(path("dsl"))).unwrap()
    }

    /// Removes white space and comments, because iasl adds explanations.
    fn dense(text: &str) -> String {
        let lines = text.lines().filter_map(|line| line.split("//").next());
        let text: String = lines.flat_map(str::split_whitespace).collect();
        let mut parts = text.split("/*");
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |whole, part| {
            whole + part.split_once("*/").map_or("", |(_, rest)| rest)
        })
    }
}

#[test]
fn iasl_reads_the_dsdt_as_it_was_meant() {
    let iasl = Iasl::new();
    let text = iasl.disassemble("dsdt", &ParsedTables::of(&HARDWARE).named(b"DSDT"));
    let again = iasl.run(&["-tc", "-ve", "dsdt.dsl"]);
    assert!(again.contains("0 Errors"), "{again}");
    let dense = Iasl::dense(&text);
    for expected in [
        r#"Name(\_S5,Package(0x04){0x05,Zero,Zero,Zero})"#,
        r#"Device(COM1){Name(_HID,EisaId("PNP0501")"#,
        "IO(Decode16,0x03F8,0x03F8,0x01,0x08,)Interrupt(ResourceConsumer,Edge,ActiveHigh,Exclusive,,,){0x00000004,}",
        r#"Device(RTC){Name(_HID,EisaId("PNP0B00")"#,
        "IO(Decode16,0x0070,0x0070,0x01,0x02,)",
        r#"Device(PWRB){Name(_HID,EisaId("PNP0C0C")"#,
        r#"Name(_CID,"VM_Gen_Counter")"#,
        "Name(ADDR,Package(0x02){0x000FF000,Zero})",
        r#"Device(GED){Name(_HID,"ACPI0013")"#,
        "Exclusive,,,){0x00000009,}",
        "OperationRegion(EVTR,SystemIO,0x0604,0x04)Field(EVTR,DWordAcc,NoLock,Preserve){PEND,32}",
        r"Method(_EVT,1,Serialized){Local0=PENDIf((Local0&One)){Notify(\_SB.PWRB,0x80)}If((Local0&0x02)){Notify(\_SB.VGEN,0x80)}}",
        r#"Device(C000){Name(_HID,"ACPI0007""#,
        "Device(C002){",
        r#"Device(V001){Name(_HID,"LNRO0005")Name(_UID,One)Name(_CCA,One)"#,
        "Memory32Fixed(ReadWrite,0xD0001000,0x00001000,)",
        "Exclusive,,,){0x0000000B,}",
    ] {
        assert!(
            dense.contains(expected),
            "no {expected} in:\n{text}\n{dense}"
        );
    }
    for absent in ["Device(C003)", "Device(V002)"] {
        assert!(!dense.contains(absent), "{absent} in:\n{text}");
    }
}

#[test]
fn iasl_reads_the_other_tables_as_they_were_meant() {
    let found = ParsedTables::of(&HARDWARE);
    let iasl = Iasl::new();
    let fadt = Iasl::dense(&iasl.disassemble("facp", &found.named(b"FACP")));
    for expected in [
        "HardwareReduced(V5):1",
        "ResetRegisterSupported(V2):1",
        "ControlMethodPowerButton(V1):1",
        "CMOSRTCNotPresent(V5):0",
        "8042Presentonports60/64(V2):0",
        "RTCCenturyIndex:32",
    ] {
        assert!(fadt.contains(expected), "no {expected} in {fadt}");
    }
    let madt = Iasl::dense(&iasl.disassemble("apic", &found.named(b"APIC")));
    assert_eq!(madt.matches("[ProcessorLocalAPIC]").count(), 3, "{madt}");
    assert_eq!(madt.matches("ProcessorEnabled:1").count(), 3, "{madt}");
    assert_eq!(madt.matches("[I/OAPIC]").count(), 1, "{madt}");
}
