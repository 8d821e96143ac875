//! A monitor over plain kvm-ioctls that boots a PVH guest and migrates it to a second VM in the same process.
//!
//! The guest, `dirtier`, rewrites its memory without end and ends with status 0 only if no write got lost. It needs one
//! vCPU, a serial port and a port for its exit status. For x86-64 hosts with /dev/kvm:
//!
//!     cargo run -p ferry-migration --example kvm

// KVM runs the guest on memory of this process, and a signal takes a vCPU out of KVM_RUN.
#![allow(unsafe_code)]

use std::io::Cursor;
use std::os::unix::net::UnixStream;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ept::{Gpa, GpaRange, Region, RegionKind, Source, Tracker};
use guest_images::interface::{DEBUG_EXIT_PORT, SERIAL_PORT};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::{Elf, KernelLoader, elf::PvhBootCapability::PvhEntryPresent};
use migration::{
    Attempt, Description, DestinationGuest, GuestError, ReceiveOptions, Section, SectionKind,
    SendOptions, SourceGuest, receive, send,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const RAM: u64 = 64 << 20;
const START_INFO: GuestAddress = GuestAddress(0x6000);
const MEMORY_MAP: GuestAddress = GuestAddress(0x6100);
const COMMAND_LINE: GuestAddress = GuestAddress(0x7000);
/// Line status register of a 16550. Bits 5 and 6: the transmitter is empty; bit 0: a byte can be read.
const LINE_STATUS: u16 = SERIAL_PORT + 5;

pub(crate) fn main() -> Result<(), GuestError> {
    let mut source = Vm::new()?;
    source.boot()?;
    source.run();
    thread::sleep(Duration::from_millis(500));
    let (near, far) = UnixStream::pair()?;
    let destination = thread::spawn(move || {
        let (mut vm, attempt) = (Vm::new()?, Attempt::arriving("source"));
        receive(&mut vm, far, &ReceiveOptions::default(), &attempt)?;
        Ok::<_, GuestError>(vm)
    });
    let attempt = Attempt::new("destination");
    let sent = send(&mut source, near, &SendOptions::default(), &attempt);
    let arrived = destination.join().map_err(|_| "the destination panicked")?;
    sent?;
    let (mut arrived, report) = (arrived?, attempt.report());
    let (rounds, downtime) = (report.rounds.len(), report.downtime_ms);
    println!("{rounds} rounds, guest paused for {downtime:.1} ms");
    // Lets the guest write on. Then it checks all its memory, prints a line and exits.
    thread::sleep(Duration::from_millis(500));
    arrived.quit.store(true, SeqCst);
    let vcpu = arrived.thread.take().ok_or("the guest does not run")?;
    match vcpu.join().map_err(|_| "the vCPU panicked")?.as_deref() {
        Some("status 0") => Ok(()),
        other => Err(format!("the guest ended with {other:?}").into()),
    }
}

/// Writes to this memory do not mark the tracker. KVM logs those of the vCPU, and there is no device that writes.
type Memory = GuestMemoryMmap;

/// A VM with one vCPU. The thread that runs the vCPU holds its lock.
struct Vm {
    memory: Memory,
    tracker: Arc<Tracker>,
    fd: VmFd,
    vcpu: Arc<Mutex<VcpuFd>>,
    thread: Option<JoinHandle<Option<String>>>,
    stop: Arc<AtomicBool>,
    /// Whether the guest reads a `q` from its serial port.
    quit: Arc<AtomicBool>,
}

impl Vm {
    fn new() -> Result<Self, GuestError> {
        let (range, kind) = (GpaRange::with_len(Gpa(0), RAM)?, RegionKind::Ram);
        let tracker = Arc::new(Tracker::new(&[Region { range, kind }])?);
        let memory = Memory::from_ranges(&[(GuestAddress(0), usize::try_from(RAM)?)])?;
        let kvm = Kvm::new()?;
        let fd = kvm.create_vm()?;
        let vcpu = fd.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        let vm = Self {
            memory,
            tracker,
            fd,
            vcpu: Arc::new(Mutex::new(vcpu)),
            thread: None,
            stop: Arc::default(),
            quit: Arc::default(),
        };
        vm.set_slot(0)?;
        Ok(vm)
    }

    fn set_slot(&self, flags: u32) -> Result<(), GuestError> {
        let slot = kvm_userspace_memory_region {
            memory_size: RAM,
            userspace_addr: self.memory.get_host_address(GuestAddress(0))?.addr() as u64,
            flags,
            ..Default::default()
        };
        // SAFETY: the memory is mapped until `self` is dropped, which ends the vCPU's thread first.
        Ok(unsafe { self.fd.set_user_memory_region(slot) }?)
    }

    /// Loads the guest and sets the registers of the PVH start (Xen, docs/misc/pvh.pandoc).
    fn boot(&self) -> Result<(), GuestError> {
        let mut image = Cursor::new(guest_images::DIRTIER);
        let kernel = Elf::load(&self.memory, None, &mut image, None)?;
        let PvhEntryPresent(entry) = kernel.pvh_boot_cap else {
            return Err("the guest has no PVH entry".into());
        };
        // hvm_start_info (Xen, start_info.h) in 64-bit words: magic and version 1, flags and number of modules, their
        // list, the command line, the RSDP, the memory map, the number of its entries.
        let info = [0x1_336e_c578, 0, 0, COMMAND_LINE.0, 0, MEMORY_MAP.0, 1];
        self.memory.write_obj(info, START_INFO)?;
        // hvm_memmap_table_entry: address, size, type 1 (RAM).
        self.memory.write_obj([0, RAM, 1], MEMORY_MAP)?;
        self.memory.write_slice(b"memory=16M\0", COMMAND_LINE)?;
        // 32-bit protected mode with flat segments, otherwise as after a reset.
        let vcpu = self.vcpu();
        let mut sregs = vcpu.get_sregs()?;
        sregs.cr0 = 0x11;
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.selector) = (0, 0x10);
            (segment.limit, segment.db, segment.g) = (u32::MAX, 1, 1);
        }
        vcpu.set_sregs(&sregs)?;
        let mut regs = kvm_regs::default();
        (regs.rip, regs.rbx, regs.rflags) = (entry.0, START_INFO.0, 2);
        Ok(vcpu.set_regs(&regs)?)
    }

    fn vcpu(&self) -> MutexGuard<'_, VcpuFd> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the vCPU on a thread, unless it runs already.
    fn run(&mut self) {
        self.stop.store(false, SeqCst);
        let (vcpu, stop) = (Arc::clone(&self.vcpu), Arc::clone(&self.stop));
        let quit = Arc::clone(&self.quit);
        self.thread.get_or_insert_with(|| {
            thread::spawn(move || {
                let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
                run(&mut vcpu, &stop, &quit)
            })
        });
    }

    /// Takes the vCPU out of KVM_RUN and ends its thread.
    fn halt(&mut self) -> Result<(), GuestError> {
        extern "C" fn nothing(_: libc::c_int) {}
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.stop.store(true, SeqCst);
        let handler = nothing as extern "C" fn(libc::c_int);
        // SAFETY: the handler does nothing, so that it may run at any time.
        unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        while !thread.is_finished() {
            // SAFETY: the thread has not been joined. Another signal follows one that came before KVM_RUN.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
            thread::sleep(Duration::from_millis(1));
        }
        match thread.join() {
            Ok(None) => Ok(()),
            ended => Err(format!("the guest has ended: {ended:?}").into()),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // A guest that has ended does not run either.
        let _ended = self.halt();
    }
}

/// Runs the vCPU until it is to stop, or until the guest has ended: then returns how. Stops only where a signal interrupts
/// KVM_RUN, because KVM completes an I/O instruction at the next KVM_RUN.
fn run(vcpu: &mut VcpuFd, stop: &AtomicBool, quit: &AtomicBool) -> Option<String> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(SERIAL_PORT, [byte])) => print!("{}", char::from(*byte)),
            Ok(VcpuExit::IoOut(DEBUG_EXIT_PORT, [status])) => {
                return Some(format!("status {status}"));
            }
            Ok(VcpuExit::IoOut(..)) => {}
            Ok(VcpuExit::IoIn(SERIAL_PORT, bytes)) => bytes.fill(b'q'),
            Ok(VcpuExit::IoIn(LINE_STATUS, bytes)) => {
                bytes.fill(0x60 | u8::from(quit.load(SeqCst)));
            }
            Err(error) if error.errno() == libc::EINTR && stop.load(SeqCst) => return None,
            Err(error) if error.errno() == libc::EINTR => {}
            other => return Some(format!("unexpected exit {other:?}")),
        }
    }
}

/// State of the vCPU. A monitor for more than one guest saves model-specific registers and the local APIC too.
type VcpuState = (kvm_sregs, kvm_regs, kvm_xsave, kvm_vcpu_events);

impl SourceGuest for Vm {
    type Memory = Memory;

    fn describe(&self) -> Result<Description, GuestError> {
        let memory = [GpaRange::with_len(Gpa(0), RAM)?];
        let mut description = Description::new("kvm example", &memory, 1);
        description.sections = vec![SectionKind::required("vcpu0", 1)];
        Ok(description)
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    fn start_log(&mut self) -> Result<(), GuestError> {
        self.set_slot(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// KVM_GET_DIRTY_LOG also clears the log: there is no `clear_log`.
    fn sync_log(&mut self) -> Result<(), GuestError> {
        let words = self.fd.get_dirty_log(0, usize::try_from(RAM)?)?;
        self.tracker.mark_words(Gpa(0), &words, Source::Vcpu);
        Ok(())
    }

    fn stop_log(&mut self) -> Result<(), GuestError> {
        self.set_slot(0)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.halt()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.run();
        Ok(())
    }

    fn save(&self) -> Result<Vec<Section>, GuestError> {
        let vcpu = self.vcpu();
        let registers = (vcpu.get_sregs()?, vcpu.get_regs()?);
        let state: VcpuState = (
            registers.0,
            registers.1,
            vcpu.get_xsave()?,
            vcpu.get_vcpu_events()?,
        );
        Ok(vec![Section::required(
            "vcpu0",
            1,
            serde_json::to_vec(&state)?,
        )])
    }
}

impl DestinationGuest for Vm {
    type Memory = Memory;

    fn prepare(&mut self, description: &Description) -> Result<(), GuestError> {
        match (description.memory_bytes(), description.cpus) {
            (RAM, 1) => Ok(()),
            other => Err(format!("{other:?} bytes and vCPUs, this VM has {RAM} and 1").into()),
        }
    }

    fn memory(&self) -> Option<&Memory> {
        Some(&self.memory)
    }

    fn tracker(&self) -> Option<&Arc<Tracker>> {
        Some(&self.tracker)
    }

    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError> {
        let section = Section::find(sections, "vcpu0").ok_or("the vCPU's state is missing")?;
        let (sregs, regs, xsave, events): VcpuState = serde_json::from_slice(&section.data)?;
        let vcpu = self.vcpu();
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&regs)?;
        // SAFETY: this process has enabled no feature that makes the area larger than 4 KiB.
        unsafe { vcpu.set_xsave(&xsave) }?;
        Ok(vcpu.set_vcpu_events(&events)?)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.run();
        Ok(())
    }
}
