//! The start info of the monitor, `hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h), which is
//! copied and checked before use.
//!
//! Unsafe: reads physical memory at the addresses that the monitor gives. The first 4 GiB are mapped,
//! so that an invalid address yields wrong bytes, which the checks refuse, and no exception.

use crate::interface::CMDLINE_MOST;
use crate::memory::Runs;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u64 = 4;
const CMDLINE: u64 = 24;
const MEMORY_MAP: u64 = 40;
const MEMORY_MAP_ENTRIES: u64 = 48;
const ENTRY_SIZE: u64 = 24;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const RAM: u32 = 1;
/// Maximum number of memory map entries that are read.
const ENTRIES_MOST: u32 = 128;
/// End of the memory that the boot page tables map.
const MAPPED: u64 = 4 << 30;

/// Errors of the start info.
#[derive(Clone, Copy)]
pub(crate) enum Trouble {
    NoMagic,
    NoMemoryMap,
    LongCommandLine,
    CommandLineNotText,
}

impl core::fmt::Display for Trouble {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        out.write_str(match self {
            Self::NoMagic => "no PVH start info at the address in EBX",
            Self::NoMemoryMap => "no memory map in the PVH start info (version 1 has one)",
            Self::LongCommandLine => "command line of more than 2047 bytes, or above 4 GiB",
            Self::CommandLineNotText => "command line is not UTF-8",
        })
    }
}

/// Start info whose address and magic value have been checked.
pub(crate) struct StartInfo(u64);

impl StartInfo {
    pub(crate) fn at(address: u32) -> Result<Self, Trouble> {
        let info = Self(u64::from(address));
        if read::<u32>(info.0) == Some(MAGIC) {
            Ok(info)
        } else {
            Err(Trouble::NoMagic)
        }
    }

    /// Returns the usable RAM at or above `floor`.
    pub(crate) fn memory(&self, floor: u64) -> Result<Runs, Trouble> {
        let map = self.memory_map().ok_or(Trouble::NoMemoryMap)?;
        let entries = read::<u32>(self.0 + MEMORY_MAP_ENTRIES)
            .unwrap_or(0)
            .min(ENTRIES_MOST);
        let mut runs = Runs::new();
        for index in 0..u64::from(entries) {
            if let Some((address, bytes)) = ram_entry(map + index * ENTRY_SIZE) {
                runs.add(address, bytes, floor);
            }
        }
        if runs.pages() == 0 {
            Err(Trouble::NoMemoryMap)
        } else {
            Ok(runs)
        }
    }

    fn memory_map(&self) -> Option<u64> {
        let version = read::<u32>(self.0 + VERSION)?;
        let map = read::<u64>(self.0 + MEMORY_MAP)?;
        (version >= 1 && map != 0 && map < MAPPED).then_some(map)
    }

    /// Copies the command line to `buffer` and returns it. It is empty if the monitor gives none.
    pub(crate) fn command_line<'a>(
        &self,
        buffer: &'a mut [u8; CMDLINE_MOST],
    ) -> Result<&'a str, Trouble> {
        let address = read::<u64>(self.0 + CMDLINE).unwrap_or(0);
        if address == 0 {
            return Ok("");
        }
        let length = copy_string(address, buffer).ok_or(Trouble::LongCommandLine)?;
        core::str::from_utf8(&buffer[..length]).map_err(|_| Trouble::CommandLineNotText)
    }
}

fn ram_entry(at: u64) -> Option<(u64, u64)> {
    let (address, bytes) = (read::<u64>(at)?, read::<u64>(at + 8)?);
    (read::<u32>(at + 16)? == RAM).then_some((address, bytes))
}

/// Copies a C string. Returns its length, or `None` if it does not fit into `buffer`.
fn copy_string(address: u64, buffer: &mut [u8]) -> Option<usize> {
    let length = buffer.len() as u64;
    for index in 0..=length {
        let byte = read::<u8>(address.checked_add(index)?)?;
        if byte == 0 {
            return Some(index as usize);
        }
        *buffer.get_mut(index as usize)? = byte;
    }
    None
}

/// Integer types, for which every bit pattern is a valid value.
trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u32 {}
impl Plain for u64 {}

fn read<T: Plain>(address: u64) -> Option<T> {
    let end = address.checked_add(size_of::<T>() as u64)?;
    if address == 0 || end > MAPPED {
        return None;
    }
    // SAFETY: the memory is mapped, any bytes are a valid `T`, and nothing writes to it while the guest starts.
    Some(unsafe { core::ptr::with_exposed_provenance::<T>(address as usize).read_unaligned() })
}
