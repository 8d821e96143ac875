//! State as sections: how they are named, written and read.

use super::{MachineError, Result};
use migration::guest::Section;
use migration::header::SectionKind;

/// The version of every section of state that this monitor writes and reads.
const STATE_VERSION: u16 = 1;

/// The sections beside those of the vCPUs.
pub(super) const MACHINE: &str = "machine";
pub(super) const TIME: &str = "time";
pub(super) const SERIAL: &str = "serial";
pub(super) const RTC: &str = "rtc";
pub(super) const ACPI: &str = "acpi";

/// The section of one vCPU.
pub(super) fn of_vcpu(index: usize) -> String {
    format!("vcpu{index}")
}

/// All sections of a machine with `cpus` vCPUs but those of its virtio devices.
pub(super) fn kinds(cpus: usize) -> Vec<SectionKind> {
    let rest = [MACHINE, TIME, SERIAL, RTC, ACPI].map(str::to_owned);
    (0..cpus).map(of_vcpu).chain(rest).map(kind).collect()
}

pub(super) fn kind(name: String) -> SectionKind {
    SectionKind {
        name,
        version: STATE_VERSION,
    }
}

/// Which of the announced sections a machine that needs these cannot do without, or cannot read.
pub(super) fn unreadable(announced: &[SectionKind], needed: &[SectionKind]) -> Vec<String> {
    let missing = needed
        .iter()
        .filter(|kind| !announced.contains(kind))
        .map(|kind| {
            format!(
                "{} version {} is needed and not announced",
                kind.name, kind.version
            )
        });
    let unknown = announced
        .iter()
        .filter(|kind| !needed.contains(kind))
        .map(|kind| {
            format!(
                "{} version {} is announced and not known here",
                kind.name, kind.version
            )
        });
    missing.chain(unknown).collect()
}

pub(super) fn encode<T: serde::Serialize>(name: &str, state: &T) -> Result<Section> {
    let data = postcard::to_stdvec(state).map_err(|error| MachineError::Section {
        section: name.into(),
        why: error.to_string(),
    })?;
    Ok(Section {
        kind: kind(name.into()),
        data,
    })
}

pub(super) fn decode<T: serde::de::DeserializeOwned>(
    sections: &[Section],
    name: &str,
) -> Result<T> {
    let error = |why: String| MachineError::Section {
        section: name.into(),
        why,
    };
    let kind = kind(name.into());
    let mut found = sections.iter().filter(|section| section.kind == kind);
    let section = found
        .next()
        .ok_or_else(|| error(format!("version {STATE_VERSION} of it is missing")))?;
    if found.next().is_some() {
        return Err(error("it is there twice".into()));
    }
    let (state, rest) =
        postcard::take_from_bytes(&section.data).map_err(|source| error(source.to_string()))?;
    match rest.len() {
        0 => Ok(state),
        bytes => Err(error(format!("{bytes} bytes too many"))),
    }
}
