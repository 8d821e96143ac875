//! Names, versions and encoding of the sections of saved state.

use devices::virtio::VirtioSnapshot;
use devices::{RtcSnapshot, SavedState, SerialSnapshot, decode_state, encode_state};
use migration::{Section, SectionKind};

use super::port_devices::AcpiSnapshot;
use super::{MachineError, Result};
use crate::kvm::state::{MachineState, VcpuState};
use crate::kvm::time::MachineTime;

/// Interrupt controllers and timer.
pub(super) const MACHINE: &str = "machine";
/// Clocks.
pub(super) const TIME: &str = "time";
/// Serial port.
pub(super) const SERIAL: &str = "serial";
/// Real-time clock.
pub(super) const RTC: &str = "rtc";
/// ACPI registers.
pub(super) const ACPI: &str = "acpi";

/// Returns the name of the section of one vCPU.
pub(super) fn of_vcpu(index: usize) -> String {
    format!("vcpu{index}")
}

/// Returns the kinds of all sections of a machine with `cpus` vCPUs and virtio devices of these names.
pub(super) fn kinds<'a>(
    cpus: usize,
    virtio: impl IntoIterator<Item = &'a str>,
) -> Vec<SectionKind> {
    let vcpus = (0..cpus).map(|index| kind::<VcpuState>(&of_vcpu(index)));
    let shared = [
        kind::<MachineState>(MACHINE),
        kind::<MachineTime>(TIME),
        kind::<SerialSnapshot>(SERIAL),
        kind::<RtcSnapshot>(RTC),
        kind::<AcpiSnapshot>(ACPI),
    ];
    let virtio = virtio.into_iter().map(kind::<VirtioSnapshot>);
    vcpus.chain(shared).chain(virtio).collect()
}

fn kind<T: SavedState>(name: &str) -> SectionKind {
    SectionKind::required(name, T::VERSION)
}

/// Encodes state as the section `name`.
pub(super) fn encode<T: SavedState>(name: &str, state: &T) -> Section {
    Section::required(name, T::VERSION, encode_state(state))
}

/// Finds the section `name`, and decodes it.
///
/// # Errors
/// Returns [`MachineError::Section`] if the section is missing, occurs twice, was written by a newer version, or cannot
/// be decoded.
pub(super) fn decode<T: SavedState>(sections: &[Section], name: &str) -> Result<T> {
    let error = |why: String| MachineError::Section {
        section: name.into(),
        why,
    };
    let mut found = sections.iter().filter(|section| section.kind.name == name);
    let section = found.next().ok_or_else(|| error("missing".into()))?;
    if found.next().is_some() {
        return Err(error("it is there twice".into()));
    }
    decode_state(section.kind.version, &section.data).map_err(|source| error(source.to_string()))
}
