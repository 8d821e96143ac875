//! Facts that a guest relies on and that do not travel with it: processor features, and the host's side of its devices.
//! Both sides of a migration compare them by value, before the guest is touched.

use std::fmt;

use devices::{SavedState, decode_state, encode_state};
use kvm_bindings::kvm_cpuid_entry2;
use migration::Section;
use minicbor::{Decode, Encode};

/// Section of [`CpuFacts`].
const CPU: &str = "cpu";
/// Section of [`DeviceFactsList`].
const DEVICES: &str = "devices";

/// Processor features of a guest.
#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct CpuFacts {
    /// CPUID of vCPU 0.
    #[n(0)]
    cpuid: Vec<CpuidEntry>,
}

impl SavedState for CpuFacts {
    const VERSION: u16 = 1;
}

/// One CPUID leaf, with the flags of `kvm_cpuid_entry2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct CpuidEntry {
    #[n(0)]
    function: u32,
    #[n(1)]
    index: u32,
    #[n(2)]
    flags: u32,
    #[n(3)]
    eax: u32,
    #[n(4)]
    ebx: u32,
    #[n(5)]
    ecx: u32,
    #[n(6)]
    edx: u32,
}

/// Host's sides of all virtio devices of a guest, in the order in which the guest finds them.
#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct DeviceFactsList {
    #[n(0)]
    devices: Vec<NamedFacts>,
}

impl SavedState for DeviceFactsList {
    const VERSION: u16 = 1;
}

/// Host's side of one device, with the name of the device.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct NamedFacts {
    /// Name of the device, which is also that of its section of state.
    #[n(0)]
    pub(super) name: String,
    /// Host's side of the device.
    #[n(1)]
    pub(super) facts: DeviceFacts,
}

/// Host's side of a virtio device, as far as the guest can see it. A guest can be restored where it is equal.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) enum DeviceFacts {
    /// A disk over an image.
    #[n(0)]
    Disk {
        /// Size in sectors of 512 bytes.
        #[n(0)]
        sectors: u64,
        /// Whether the guest may write.
        #[n(1)]
        access: DiskAccess,
    },
    /// A disk that a vhost-user back end serves.
    #[n(1)]
    VhostUserDisk {
        /// Serial number that the user gave to the disk.
        #[n(0)]
        id: Option<String>,
        /// Size in sectors of 512 bytes.
        #[n(1)]
        sectors: u64,
        /// Virtio features that the back end offers.
        #[n(2)]
        features: u64,
    },
    /// A network interface.
    #[n(2)]
    Net {
        /// MTU that the device tells the guest. `None` leaves it to the guest.
        #[n(0)]
        mtu: Option<u16>,
    },
    /// An entropy device.
    #[n(3)]
    Rng,
    /// A socket device.
    #[n(4)]
    Vsock,
    /// A balloon.
    #[n(5)]
    Balloon {
        /// Whether the balloon deflates when the guest runs out of memory.
        #[n(0)]
        deflate_on_oom: bool,
        /// Whether the guest reports free pages.
        #[n(1)]
        free_page_reporting: bool,
    },
    /// A console.
    #[n(6)]
    Console,
}

/// Whether a guest may write to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) enum DiskAccess {
    #[n(0)]
    ReadWrite,
    #[n(1)]
    ReadOnly,
}

impl fmt::Display for DeviceFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |wanted: bool| if wanted { "on" } else { "off" };
        match self {
            Self::Disk { sectors, access } => {
                let kind = match access {
                    DiskAccess::ReadWrite => "disk",
                    DiskAccess::ReadOnly => "read-only disk",
                };
                write!(f, "a {kind} of {sectors} sectors of 512 bytes")
            }
            Self::VhostUserDisk {
                id,
                sectors,
                features,
            } => {
                let id = id.as_ref().map(|id| format!(" {id}")).unwrap_or_default();
                write!(
                    f,
                    "a vhost-user disk{id} of {sectors} sectors of 512 bytes with the features {features:#x}"
                )
            }
            Self::Net { mtu: Some(mtu) } => write!(f, "an interface with an MTU of {mtu}"),
            Self::Net { mtu: None } => f.write_str("an interface without an MTU"),
            Self::Rng => f.write_str("an entropy device"),
            Self::Vsock => f.write_str("a socket device"),
            Self::Balloon {
                deflate_on_oom,
                free_page_reporting,
            } => write!(
                f,
                "a balloon with deflate_on_oom={} and free_page_reporting={}",
                on(*deflate_on_oom),
                on(*free_page_reporting)
            ),
            Self::Console => f.write_str("a console"),
        }
    }
}

/// Encodes the facts about a guest.
pub(super) fn encode(cpuid: &[kvm_cpuid_entry2], devices: Vec<NamedFacts>) -> Vec<Section> {
    let cpu = CpuFacts {
        cpuid: cpuid.iter().map(CpuidEntry::from).collect(),
    };
    let devices = DeviceFactsList { devices };
    vec![
        Section::required(CPU, CpuFacts::VERSION, encode_state(&cpu)),
        Section::required(DEVICES, DeviceFactsList::VERSION, encode_state(&devices)),
    ]
}

/// Decodes the CPUID of vCPU 0.
///
/// # Errors
/// Returns a message if the fact is missing, or was written by a newer version.
pub(crate) fn cpuid(facts: &[Section]) -> Result<Vec<kvm_cpuid_entry2>, String> {
    let cpu: CpuFacts = decode(facts, CPU)?;
    Ok(cpu.cpuid.into_iter().map(kvm_cpuid_entry2::from).collect())
}

/// Compares the devices of a guest with those that this monitor was given. Returns one sentence for each difference.
pub(super) fn device_misfits(facts: &[Section], here: &[NamedFacts]) -> Vec<String> {
    match decode::<DeviceFactsList>(facts, DEVICES) {
        Ok(theirs) => misfits(&theirs.devices, here),
        Err(why) => vec![why],
    }
}

fn decode<T: SavedState>(facts: &[Section], name: &str) -> Result<T, String> {
    let fact = facts.iter().find(|fact| fact.kind.name == name);
    let fact = fact.ok_or_else(|| format!("the fact {name:?} is missing"))?;
    decode_state(fact.kind.version, &fact.data).map_err(|error| format!("fact {name:?}: {error}"))
}

fn misfits(theirs: &[NamedFacts], here: &[NamedFacts]) -> Vec<String> {
    let named = |name: &str, list: &[NamedFacts]| -> Option<DeviceFacts> {
        let found = list.iter().find(|device| device.name == name);
        found.map(|device| device.facts.clone())
    };
    let mut found = Vec::new();
    for NamedFacts { name, facts } in theirs {
        match named(name, here) {
            None => found.push(format!(
                "the guest has {name} ({facts}), the destination has no such device ({})",
                option(name)
            )),
            Some(own) if own != *facts => found.push(format!(
                "{name}: the guest's is {facts}, the destination's is {own}"
            )),
            Some(_) => {}
        }
    }
    for NamedFacts { name, facts } in here {
        if named(name, theirs).is_none() {
            found.push(format!(
                "the destination has {name} ({facts}), the guest has no such device ({})",
                option(name)
            ));
        }
    }
    found
}

/// Returns the command-line option that adds a device of this name.
fn option(name: &str) -> String {
    let kind = name.trim_start_matches('_');
    format!("--{}", kind.trim_end_matches(|c: char| c.is_ascii_digit()))
}

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        Self {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        }
    }
}

impl From<CpuidEntry> for kvm_cpuid_entry2 {
    fn from(entry: CpuidEntry) -> Self {
        Self {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(sectors: u64) -> NamedFacts {
        NamedFacts {
            name: "_disk0".into(),
            facts: DeviceFacts::Disk {
                sectors,
                access: DiskAccess::ReadWrite,
            },
        }
    }

    fn rng() -> NamedFacts {
        NamedFacts {
            name: "_rng0".into(),
            facts: DeviceFacts::Rng,
        }
    }

    #[test]
    fn devices_that_do_not_fit_are_named() {
        let facts = encode(&[], vec![disk(8), rng()]);
        assert_eq!(device_misfits(&facts, &[disk(8), rng()]), [""; 0]);
        assert_eq!(
            device_misfits(&facts, &[disk(9)]),
            [
                "_disk0: the guest's is a disk of 8 sectors of 512 bytes, the destination's is a disk of 9 sectors of 512 bytes",
                "the guest has _rng0 (an entropy device), the destination has no such device (--rng)",
            ]
        );
        assert_eq!(
            device_misfits(&encode(&[], Vec::new()), &[rng()]),
            ["the destination has _rng0 (an entropy device), the guest has no such device (--rng)"]
        );
    }

    #[test]
    fn a_fact_that_is_missing_or_newer_is_named() {
        let mut facts = encode(&[], Vec::new());
        facts[1].kind.version = 2;
        let misfits = device_misfits(&facts, &[]);
        assert!(misfits[0].contains("version 2 is too new"), "{misfits:?}");
        facts.clear();
        assert_eq!(
            device_misfits(&facts, &[]),
            ["the fact \"devices\" is missing"]
        );
        assert!(cpuid(&facts).unwrap_err().contains("missing"));
    }

    #[test]
    fn the_cpuid_comes_back() {
        let entry = kvm_cpuid_entry2 {
            function: 7,
            index: 1,
            flags: 1,
            ebx: 0xffff_ffff,
            ..Default::default()
        };
        assert_eq!(cpuid(&encode(&[entry], Vec::new())).unwrap(), [entry]);
    }
}
