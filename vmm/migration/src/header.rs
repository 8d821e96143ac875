//! The header: the first bytes of every stream, in a form that every later version can read.
//!
//! ```text
//! "FERRYMIG" │ version u32 │ length u32 │ description, `length` bytes of JSON │ crc32 u32 of all before
//! ```

use std::io::{Read, Write};

use ept::{Gpa, GpaRange, PAGE_SIZE};
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::wire::{FrameReader, FrameWriter, WireError};

const MAGIC: &[u8; 8] = b"FERRYMIG";
/// The version of everything behind the header. A destination takes its own version only.
pub const STREAM_VERSION: u32 = 1;
const DESCRIPTION_LIMIT: usize = 1 << 20;
const MEMORY_RANGES_LIMIT: usize = 64;

/// A guest as its source describes it: all that a destination needs to know to take or refuse it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// Who wrote the stream, for people.
    pub writer: String,
    /// The processor architecture, as Rust names it.
    pub architecture: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// Guest RAM, in ascending order.
    pub memory: Vec<MemoryRange>,
    /// Bytes of it that hold anything now.
    pub populated_bytes: u64,
    /// How many vCPUs.
    pub cpus: u32,
    /// What vCPU 0 sees of its processor.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The sections of state to come, by name and version.
    pub sections: Vec<SectionKind>,
    /// What is on the host's side of devices that have one, in the order of the devices.
    #[serde(default)]
    pub host_sides: Vec<HostSide>,
    /// Whether the guest runs; one that was paused stays paused.
    pub running: bool,
}

/// A range of guest RAM, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRange {
    /// Its first guest-physical address.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
}

/// What is on the host's side of a device: the destination has to have the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSide {
    /// The section with the device's state.
    pub section: String,
    /// What it is, in words that are equal where the host's sides are alike.
    pub is: String,
}

/// The name and version of a section of state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionKind {
    /// What it is the state of, such as `vcpu0`.
    pub name: String,
    /// The version of its contents.
    pub version: u16,
}

impl Description {
    /// Guest RAM as ranges: ascending, apart, page-aligned, none empty.
    ///
    /// # Errors
    /// What is wrong with the first that is not, in words.
    pub fn ranges(&self) -> Result<Vec<GpaRange>, String> {
        if self.memory.is_empty() || self.memory.len() > MEMORY_RANGES_LIMIT {
            return Err(format!("{} ranges of memory", self.memory.len()));
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

    /// Bytes of guest RAM.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.bytes))
    }

    /// The reason to refuse the guest whatever this host has.
    ///
    /// # Errors
    /// Another architecture, another page size, impossible memory.
    pub fn check(&self) -> Result<(), String> {
        if self.architecture != std::env::consts::ARCH {
            let here = std::env::consts::ARCH;
            return Err(format!(
                "the guest is for {}, this host is {here}",
                self.architecture
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

/// Writes the header.
///
/// # Errors
/// The connection's.
pub fn write<W: Write>(
    writer: &mut FrameWriter<W>,
    description: &Description,
) -> Result<(), WireError> {
    writer.raw("the header", &encode(description, STREAM_VERSION)?)
}

fn encode(description: &Description, version: u32) -> Result<Vec<u8>, WireError> {
    let json = serde_json::to_vec(description).map_err(|e| WireError::Header(e.to_string()))?;
    let length = u32::try_from(json.len())
        .ok()
        .filter(|_| json.len() <= DESCRIPTION_LIMIT)
        .ok_or_else(|| WireError::Header(format!("a description of {} bytes", json.len())))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(json);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    Ok(bytes)
}

/// Reads the header and checks that this version understands what follows.
///
/// # Errors
/// The connection's, and a header that is broken or another version's: found and required are named.
pub fn read<R: Read>(reader: &mut FrameReader<R>) -> Result<Description, WireError> {
    let mut head = [0; 16];
    reader.raw("the header", &mut head)?;
    if &head[..8] != MAGIC {
        return Err(WireError::Header(format!(
            "it begins with {:02x?}; a Ferry stream begins with {MAGIC:02x?}",
            &head[..8]
        )));
    }
    let version = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    let length = u32::from_le_bytes([head[12], head[13], head[14], head[15]]) as usize;
    if length > DESCRIPTION_LIMIT {
        return Err(WireError::Header(format!(
            "its description has {length} bytes, at most {DESCRIPTION_LIMIT} are allowed"
        )));
    }
    let mut rest = vec![0; length + 4];
    reader.raw("the header", &mut rest)?;
    let (json, checksum) = rest.split_at(length);
    let mut actual = crc32fast::Hasher::new();
    actual.update(&head);
    actual.update(json);
    if actual.finalize().to_le_bytes() != checksum {
        return Err(WireError::Header(
            "its checksum does not fit its contents".into(),
        ));
    }
    if version != STREAM_VERSION {
        return Err(WireError::Header(format!(
            "stream version {version}, this Ferry reads version {STREAM_VERSION}{}",
            writer_of(json)
        )));
    }
    serde_json::from_slice(json)
        .map_err(|error| WireError::Header(format!("its description: {error}")))
}

/// Who wrote a stream of another version, as far as that can be read.
fn writer_of(json: &[u8]) -> String {
    serde_json::from_slice::<serde_json::Value>(json)
        .ok()
        .and_then(|value| Some(format!(" (written by {})", value.get("writer")?.as_str()?)))
        .unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn description() -> Description {
        Description {
            writer: "ferry test".into(),
            architecture: std::env::consts::ARCH.into(),
            page_size: PAGE_SIZE,
            memory: vec![
                MemoryRange {
                    start: 0,
                    bytes: 4 << 20,
                },
                MemoryRange {
                    start: 1 << 32,
                    bytes: 2 << 20,
                },
            ],
            populated_bytes: 4096,
            cpus: 2,
            cpuid: vec![kvm_cpuid_entry2 {
                function: 1,
                eax: 7,
                ..Default::default()
            }],
            sections: vec![SectionKind {
                name: "vcpu0".into(),
                version: 1,
            }],
            host_sides: vec![HostSide {
                section: "_disk0".into(),
                is: "a disk".into(),
            }],
            running: true,
        }
    }

    fn read_bytes(bytes: &[u8]) -> Result<Description, WireError> {
        read(&mut FrameReader::new(bytes))
    }

    #[test]
    fn a_description_arrives_as_it_was_written() {
        let bytes = encode(&description(), STREAM_VERSION).unwrap();
        let found = read_bytes(&bytes).unwrap();
        assert_eq!(
            serde_json::to_value(found).unwrap(),
            serde_json::to_value(description()).unwrap()
        );
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_refused() {
        let whole = encode(&description(), STREAM_VERSION).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            read_bytes(&bytes).unwrap_err();
            read_bytes(&whole[..at]).unwrap_err();
        }
    }

    #[test]
    fn another_version_is_named_with_its_writer() {
        let error = read_bytes(&encode(&description(), 9).unwrap())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("version 9, this Ferry reads version 1"),
            "{error}"
        );
        assert!(error.contains("ferry test"), "{error}");
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
}
