//! Prints the KVM capabilities of this host, and checks KVM by running a few guest instructions.
//!
//! Test runs print the report, so that a log shows which host it comes from. The exit status is 0 only if the guest
//! instructions ran.

// Registering guest memory is unsafe in kvm-ioctls.
#![allow(unsafe_code)]

use std::error::Error;
use std::fs;
use std::process::ExitCode;

use kvm_bindings::{self as bindings, KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Guest-physical address of the code.
const CODE_START: u64 = 0x1000;
const MEMORY_BYTES: usize = 0x4000;
/// `mov dx, 0x3f8; mov al, 6; mov bl, 7; mul bl; out dx, al; hlt`, in 16-bit real mode.
const CODE: [u8; 11] = [
    0xba, 0xf8, 0x03, 0xb0, 0x06, 0xb3, 0x07, 0xf6, 0xe3, 0xee, 0xf4,
];
const ANSWER: u8 = 42;

/// Capabilities on which Ferry's choices depend.
const CAPABILITIES: [(&str, u32); 19] = [
    ("USER_MEMORY", bindings::KVM_CAP_USER_MEMORY),
    ("READONLY_MEM", bindings::KVM_CAP_READONLY_MEM),
    ("IRQCHIP", bindings::KVM_CAP_IRQCHIP),
    ("SPLIT_IRQCHIP", bindings::KVM_CAP_SPLIT_IRQCHIP),
    ("IRQFD", bindings::KVM_CAP_IRQFD),
    ("IOEVENTFD", bindings::KVM_CAP_IOEVENTFD),
    ("IMMEDIATE_EXIT", bindings::KVM_CAP_IMMEDIATE_EXIT),
    ("MP_STATE", bindings::KVM_CAP_MP_STATE),
    ("XSAVE2", bindings::KVM_CAP_XSAVE2),
    ("ADJUST_CLOCK", bindings::KVM_CAP_ADJUST_CLOCK),
    ("SYNC_REGS", bindings::KVM_CAP_SYNC_REGS),
    ("NESTED_STATE", bindings::KVM_CAP_NESTED_STATE),
    (
        "MANUAL_DIRTY_LOG_PROTECT2",
        bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    ),
    ("DIRTY_LOG_RING", bindings::KVM_CAP_DIRTY_LOG_RING),
    (
        "DIRTY_LOG_RING_ACQ_REL",
        bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    ),
    (
        "DIRTY_LOG_RING_WITH_BITMAP",
        bindings::KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    ),
    ("MEMORY_ATTRIBUTES", bindings::KVM_CAP_MEMORY_ATTRIBUTES),
    ("GUEST_MEMFD", bindings::KVM_CAP_GUEST_MEMFD),
    ("PRE_FAULT_MEMORY", bindings::KVM_CAP_PRE_FAULT_MEMORY),
];

/// Parameters of the KVM modules that control second-stage translation.
const PARAMETERS: [&str; 4] = [
    "kvm/parameters/tdp_mmu",
    "kvm_amd/parameters/npt",
    "kvm_intel/parameters/ept",
    "kvm_intel/parameters/pml",
];

fn main() -> ExitCode {
    match probe() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvm-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn probe() -> Result<(), Box<dyn Error>> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("kernel: {}", release.trim());
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
        return Err(format!(
            "/dev/kvm speaks API {}, not {KVM_API_VERSION}",
            kvm.get_api_version()
        )
        .into());
    }
    print_modules();
    println!("vcpus: {}", kvm.get_max_vcpus());
    let vm = kvm
        .create_vm()
        .map_err(|error| format!("no VM can be made: {error}"))?;
    print_capabilities(&vm);
    let answer = run_guest(&vm)?;
    if answer != ANSWER {
        return Err(format!("the guest computed {answer}, not {ANSWER}").into());
    }
    println!("guest: 6 * 7 = {answer}");
    Ok(())
}

fn print_modules() {
    for name in ["kvm_amd", "kvm_intel", "kvm_pvm"] {
        if fs::exists(format!("/sys/module/{name}")).unwrap_or(false) {
            println!("module: {name}");
        }
    }
    for name in PARAMETERS {
        if let Ok(value) = fs::read_to_string(format!("/sys/module/{name}")) {
            println!("{name}: {}", value.trim());
        }
    }
}

fn print_capabilities(vm: &VmFd) {
    for (name, capability) in CAPABILITIES {
        println!("{name}: {}", vm.check_extension_raw(capability.into()));
    }
}

/// Runs the code and returns the byte that it sends to a port.
fn run_guest(vm: &VmFd) -> Result<u8, Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(CODE_START), MEMORY_BYTES)])?;
    memory.write_slice(&CODE, GuestAddress(CODE_START))?;
    let region = memory.iter().next().ok_or("no guest memory")?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE_START,
        memory_size: region.len(),
        userspace_addr: u64::try_from(region.as_ptr().addr())?,
    };
    // SAFETY: the range is a mapping of our own that lives until this function returns, and the
    // vCPU that could use it is dropped before; nothing else in the process refers to it.
    unsafe { vm.set_user_memory_region(slot)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut segments = vcpu.get_sregs()?;
    segments.cs.base = 0;
    segments.cs.selector = 0;
    vcpu.set_sregs(&segments)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = CODE_START;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;
    match vcpu.run()? {
        VcpuExit::IoOut(_, data) => data
            .first()
            .copied()
            .ok_or_else(|| "an empty port write".into()),
        other => Err(format!("the guest stopped with {other:?} instead of a port write").into()),
    }
}
