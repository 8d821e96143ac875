//! The description of a guest, by which a destination takes or refuses it.

use ept::{Gpa, GpaRange, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use crate::section::{Section, SectionKind};

const MEMORY_RANGES_LIMIT: usize = 64;

/// A guest as its source describes it: everything that a destination needs to know to take or refuse it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Program that wrote the stream, for people to read.
    pub writer: String,
    /// Processor architecture, as Rust names it.
    pub architecture: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// Guest RAM, in ascending order.
    pub memory: Vec<MemoryRange>,
    /// Bytes of guest RAM that are populated, which the destination must have free.
    pub populated_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Facts that the destination's monitor compares with its own host in
    /// [`prepare`](crate::DestinationGuest::prepare): processor features, the host side of devices. The engine
    /// does not look into them.
    #[serde(default)]
    pub facts: Vec<Section>,
    /// Sections of state that [`save`](crate::SourceGuest::save) will return.
    pub sections: Vec<SectionKind>,
    /// Whether the guest runs at the destination after the hand-over.
    #[serde(rename = "running")]
    pub arrival: Arrival,
}

/// What happens to the guest after the hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "bool", into = "bool")]
pub enum Arrival {
    /// The guest runs at the destination.
    Runs,
    /// The guest was paused when the migration began, and stays paused at the destination.
    StaysPaused,
}

impl From<bool> for Arrival {
    fn from(running: bool) -> Self {
        match running {
            true => Self::Runs,
            false => Self::StaysPaused,
        }
    }
}

impl From<Arrival> for bool {
    fn from(arrival: Arrival) -> Self {
        arrival == Arrival::Runs
    }
}

/// A range of guest RAM, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRange {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl From<GpaRange> for MemoryRange {
    fn from(range: GpaRange) -> Self {
        Self {
            start: range.start().0,
            bytes: range.pages().saturating_mul(PAGE_SIZE),
        }
    }
}

impl Description {
    /// Describes a running guest on this host's architecture with the RAM `memory`, in ascending order, all of
    /// it populated, and without facts or sections.
    pub fn new(writer: impl Into<String>, memory: &[GpaRange], cpus: u32) -> Self {
        let memory: Vec<MemoryRange> = memory.iter().copied().map(MemoryRange::from).collect();
        Self {
            writer: writer.into(),
            architecture: std::env::consts::ARCH.into(),
            page_size: PAGE_SIZE,
            populated_bytes: sum(&memory),
            memory,
            cpus,
            facts: Vec::new(),
            sections: Vec::new(),
            arrival: Arrival::Runs,
        }
    }

    /// Returns guest RAM as ranges: ascending, disjoint, page-aligned, none empty.
    ///
    /// # Errors
    /// Returns a sentence about the first range that is not, or about the number of ranges.
    pub fn ranges(&self) -> Result<Vec<GpaRange>, String> {
        if self.memory.is_empty() || self.memory.len() > MEMORY_RANGES_LIMIT {
            return Err(format!(
                "{} ranges of memory, from 1 to {MEMORY_RANGES_LIMIT} are allowed",
                self.memory.len()
            ));
        }
        let mut ranges: Vec<GpaRange> = Vec::new();
        for MemoryRange { start, bytes } in &self.memory {
            let range = GpaRange::with_len(Gpa(*start), *bytes)
                .map_err(|error| format!("memory at {start:#x}, {bytes} bytes: {error}"))?;
            if ranges.last().is_some_and(|last| last.last().0 >= *start) {
                return Err(format!(
                    "memory at {start:#x} overlaps or precedes the range before it"
                ));
            }
            ranges.push(range);
        }
        Ok(ranges)
    }

    /// Returns the bytes of guest RAM.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        sum(&self.memory)
    }

    /// Returns the fact with this name.
    #[must_use]
    pub fn fact(&self, name: &str) -> Option<&Section> {
        self.facts.iter().find(|fact| fact.kind.name == name)
    }

    /// Checks what no destination on this host can take: another architecture, another page size, impossible
    /// memory. [`receive`](crate::receive) calls this before it calls the destination.
    ///
    /// # Errors
    /// Returns the reason to refuse the guest, as a sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.architecture != std::env::consts::ARCH {
            return Err(format!(
                "the guest is for {}, this host is {}",
                self.architecture,
                std::env::consts::ARCH
            ));
        }
        if self.page_size != PAGE_SIZE {
            return Err(format!(
                "pages of {} bytes, {PAGE_SIZE} are needed",
                self.page_size
            ));
        }
        self.ranges().map(drop)
    }
}

fn sum(memory: &[MemoryRange]) -> u64 {
    memory
        .iter()
        .fold(0, |sum, range| sum.saturating_add(range.bytes))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn description() -> Description {
        let ranges = [(0, 4 << 20), (1 << 32, 2 << 20)]
            .map(|(start, bytes)| GpaRange::with_len(Gpa(start), bytes).unwrap());
        Description {
            populated_bytes: 4096,
            facts: vec![Section::required("processor", 1, [7, 0xab])],
            sections: vec![SectionKind::required("vcpu0", 1)],
            ..Description::new("ferry test", &ranges, 2)
        }
    }

    #[test]
    fn impossible_guests_are_refused_with_the_reason() {
        type Change = fn(&mut Description);
        let cases: [(&str, Change); 5] = [
            ("riscv64", |d| d.architecture = "riscv64".into()),
            ("16384", |d| d.page_size = 16384),
            ("0 ranges", |d| d.memory.clear()),
            ("overlaps", |d| d.memory[1].start = 0x1000),
            ("0x1001", |d| d.memory[0].start = 0x1001),
        ];
        description().check().unwrap();
        for (reason, change) in cases {
            let mut changed = description();
            change(&mut changed);
            let error = changed.check().unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn unknown_fields_are_ignored_and_new_ones_have_defaults() {
        let mut json = serde_json::to_value(description()).unwrap();
        json["colour"] = "green".into();
        assert_eq!(json["running"], true);
        let read: Description = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(read, description());
        json.as_object_mut().unwrap().remove("facts");
        let section = json["sections"][0].as_object_mut().unwrap();
        section.remove("need");
        let read: Description = serde_json::from_value(json).unwrap();
        assert_eq!(read.facts, []);
        assert_eq!(read.sections, description().sections);
    }
}
