//! Code at the reset vector, which resets the machine. There is no other firmware code.
//!
//! Linux jumps there in real mode as its last way to reboot. On hardware-reduced platforms it gets that far: it prefers
//! EFI to the reset register, and without EFI it continues with the reset vector of the BIOS (`reboot_init` and
//! `machine_real_restart` in arch/x86/kernel/reboot.c).

use devices::acpi::{RESET_PORT, RESET_VALUE};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::memory::GuestMemory;

/// Guest-physical address of F000:FFF0, which is also FFFF:0000: the reset vector of the 8086, to which real-mode code
/// jumps to reset the machine.
const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);

/// `mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; 1: hlt; jmp 1b`, as 16-bit code.
const CODE: [u8; 9] = {
    let [low, high] = RESET_PORT.to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Writes the code to guest memory.
pub(super) fn write(memory: &GuestMemory) -> Result<(), BootError> {
    memory
        .write_slice(&CODE, RESET_VECTOR)
        .map_err(|error| BootError::Memory(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_code_is_what_a_disassembler_reads() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), CODE).unwrap();
        let output = Command::new("objdump")
            .args(["-D", "-b", "binary", "-m", "i8086", "-M", "intel"])
            .arg(file.path())
            .output()
            .expect("objdump is needed: install the package binutils");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let code: Vec<String> = text
            .lines()
            .filter_map(|line| line.split('\t').nth(2))
            .map(|code| code.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let expected = ["mov dx,0x602", "mov al,0x1", "out dx,al", "hlt", "jmp 0x6"];
        assert_eq!(code, expected, "{text}");
    }
}
