//! Streams that earlier versions recorded (`tests/recordings`), which every later version must read.
//!
//! `examples/record_guest.rs` writes such a file. A file is added when the format changes, and none is ever replaced.

use std::io::{Seek, Write};
use std::sync::Arc;

use devices::virtio::VirtioSnapshot;
use devices::{RtcSnapshot, SerialSnapshot};
use ept::Tracker;
use migration::{
    Attempt, Description, DestinationGuest, GuestError, Playback, ReceiveOptions, Section, misfits,
    receive,
};

use super::facts::{self, DeviceFacts, DiskAccess, NamedFacts};
use super::port_devices::AcpiSnapshot;
use super::sections;
use crate::kvm::state::{MachineState, VcpuState};
use crate::kvm::time::MachineTime;
use crate::memory::{Backing, GuestMemory, GuestRam};

/// A destination that keeps what arrives, and runs nothing.
#[derive(Default)]
struct Reader {
    description: Option<Description>,
    ram: Option<GuestRam>,
    sections: Vec<Section>,
}

impl DestinationGuest for Reader {
    type Memory = GuestMemory;

    fn prepare(&mut self, description: &Description) -> Result<(), GuestError> {
        self.ram = Some(GuestRam::new(description.memory_bytes(), Backing::Memfd)?);
        self.description = Some(description.clone());
        Ok(())
    }

    fn memory(&self) -> Option<&GuestMemory> {
        self.ram.as_ref().map(|ram| ram.memory())
    }

    fn tracker(&self) -> Option<&Arc<Tracker>> {
        self.ram.as_ref().map(|ram| ram.tracker())
    }

    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError> {
        self.sections = sections.to_vec();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Err("the guest was recorded while it was paused".into())
    }
}

/// Reads a recorded stream, which is part of the test program: the lab has no source tree.
fn read(recording: &[u8]) -> Reader {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(recording).unwrap();
    file.rewind().unwrap();
    let mut reader = Reader::default();
    let attempt = Attempt::arriving("a recording");
    let options = ReceiveOptions::default();
    receive(&mut reader, Playback::new(file), &options, &attempt).unwrap();
    reader
}

#[test]
fn a_guest_recorded_in_stream_version_2_is_read() {
    let reader = read(include_bytes!("../../tests/recordings/v2-hello.ferry"));
    let description = reader.description.unwrap();
    assert_eq!((description.cpus, description.memory_bytes()), (2, 4 << 20));
    let here = [
        (
            "_disk0",
            DeviceFacts::Disk {
                sectors: 2048,
                access: DiskAccess::ReadWrite,
            },
        ),
        ("_rng0", DeviceFacts::Rng),
        (
            "_balloon0",
            DeviceFacts::Balloon {
                deflate_on_oom: false,
                free_page_reporting: false,
            },
        ),
        ("_console0", DeviceFacts::Console),
    ]
    .map(|(name, facts)| NamedFacts {
        name: name.into(),
        facts,
    });
    assert_eq!(facts::device_misfits(&description.facts, &here), [""; 0]);
    let names = here.iter().map(|device| device.name.as_str());
    assert_eq!(
        misfits(&description.sections, &sections::kinds(2, names)),
        [""; 0]
    );

    let cpuid = facts::cpuid(&description.facts).unwrap();
    for vcpu in 0..2 {
        let state: VcpuState =
            sections::decode(&reader.sections, &sections::of_vcpu(vcpu)).unwrap();
        assert_eq!(state.cpuid.len(), cpuid.len());
        // Both vCPUs are entered in protected mode (bit 0 of CR0), at the entry points that the image names for each.
        let entry = [0x10_0000, 0x10_007e][vcpu];
        assert_eq!((state.sregs.cr0 & 1, state.regs.rip), (1, entry));
    }
    let time: MachineTime = sections::decode(&reader.sections, sections::TIME).unwrap();
    assert_eq!(time.tsc.len(), 2);
    sections::decode::<MachineState>(&reader.sections, sections::MACHINE).unwrap();
    sections::decode::<SerialSnapshot>(&reader.sections, sections::SERIAL).unwrap();
    sections::decode::<RtcSnapshot>(&reader.sections, sections::RTC).unwrap();
    sections::decode::<AcpiSnapshot>(&reader.sections, sections::ACPI).unwrap();
    for device in &here {
        let state: VirtioSnapshot = sections::decode(&reader.sections, &device.name).unwrap();
        assert!(!state.transport.needs_reset);
    }
}
