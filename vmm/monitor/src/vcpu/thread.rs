//! Loop of a vCPU thread: it enters the guest, handles exits, and stops at the gate.
//!
//! This file has `unsafe` code because kvm_run, which the kernel fills in, contains a union.

use std::io;
use std::os::raw::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};

use devices::{MmioBus, PortBus};
use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::gate::{Gate, GateAnswer};
use crate::panics::panic_message;

/// Way in which a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// The guest wrote this status to the debug-exit port.
    DebugExit(u8),
    /// The guest requested a reset. The launcher decides whether it is booted again, in a new machine.
    Reset,
    /// The guest powered itself off.
    PowerOff,
    /// A user or an API call ended the guest.
    Stopped,
    /// The guest was migrated and runs in another process.
    HandedOver,
    /// A vCPU could not continue. The text names the vCPU, the reason and the instruction pointer.
    Failed(String),
}

impl GuestEnd {
    /// Returns the exit status for a program that ran this guest. It is 0 if the guest or the user wanted the guest to
    /// end.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::DebugExit(status) => *status,
            Self::Reset | Self::PowerOff | Self::Stopped | Self::HandedOver => 0,
            Self::Failed(_) => 1,
        }
    }
}

/// Devices and callback of the machine that a vCPU belongs to.
#[derive(Clone)]
pub struct VcpuContext {
    /// Devices in I/O port space.
    pub ports: Arc<PortBus>,
    /// Devices in memory space.
    pub mmio: Arc<MmioBus>,
    /// Called once by each vCPU that ends the guest.
    pub on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
}

/// Returns the signal that kicks a vCPU out of the guest: the first real-time signal, which nothing else in this
/// process uses.
pub(super) fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Installs a handler for the kick signal, so that it interrupts KVM_RUN instead of ending the process. Only the first
/// call has an effect.
fn install_kick_signal() -> io::Result<()> {
    extern "C" fn ignore(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), ignore).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// vCPU with its thread.
pub struct Vcpu {
    index: u32,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of vCPU `index`. The thread waits at its gate, which starts with one hold: [`Gate::release`]
    /// lets the vCPU run.
    ///
    /// # Errors
    /// Returns an error if the thread cannot be started, or the handler of the kick signal cannot be installed.
    pub fn spawn(index: u32, fd: VcpuFd, context: VcpuContext) -> io::Result<Self> {
        install_kick_signal()?;
        let gate = Arc::new(Gate::new(index, fd));
        let thread = {
            let gate = Arc::clone(&gate);
            Builder::new().name(format!("vcpu{index}")).spawn(move || {
                // A panic, for example in a device's register handler, ends the guest and not only this thread.
                let run = AssertUnwindSafe(|| run(index, &gate, &context));
                let end = catch_unwind(run).unwrap_or_else(|panic| {
                    let why = panic_message(&*panic);
                    Some(GuestEnd::Failed(format!("vcpu{index}: {why}")))
                });
                if let Some(end) = end {
                    (context.on_end)(end);
                }
                gate.leave();
            })?
        };
        gate.attach(&thread);
        Ok(Self {
            index,
            gate,
            thread: Some(thread),
        })
    }

    /// Returns the index of the vCPU, from 0.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Returns the gate of the vCPU.
    #[must_use]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.gate.finish();
        if let Some(thread) = self.thread.take() {
            // The panic of a thread was already printed on standard error.
            let _panicked = thread.join();
        }
    }
}

/// Runs the vCPU until the guest ends. Returns `None` if the gate was finished from outside.
fn run(index: u32, gate: &Gate, context: &VcpuContext) -> Option<GuestEnd> {
    while gate.ask_to_enter() == GateAnswer::Enter {
        if let Some(end) = run_until_kicked(index, &mut gate.fd(), context) {
            return Some(end);
        }
    }
    None
}

/// Runs the vCPU until a kick interrupts KVM_RUN, or the guest ends.
///
/// Leaving the loop only after an interrupted KVM_RUN makes the saved state of a parked vCPU complete: KVM completes a
/// port or MMIO access at the next KVM_RUN (api.rst, KVM_RUN). With `immediate_exit` set, this call completes the
/// access and then returns EINTR.
fn run_until_kicked(index: u32, fd: &mut VcpuFd, context: &VcpuContext) -> Option<GuestEnd> {
    loop {
        let end = match fd.run() {
            Ok(exit) => serve(exit, context),
            Err(error) if error.errno() == libc::EINTR => return None,
            Err(error) if error.errno() == libc::EAGAIN => None,
            Err(error) => Some(FinalExit::Failed(format!("KVM_RUN: {error}"))),
        };
        match end {
            None => {}
            Some(FinalExit::End(end)) => return Some(end),
            Some(FinalExit::Failed(why)) => {
                return Some(GuestEnd::Failed(format!(
                    "vcpu{index}{}: {why}",
                    instruction_pointer(fd)
                )));
            }
            Some(FinalExit::InternalError) => {
                let why = internal_error(fd);
                return Some(GuestEnd::Failed(format!(
                    "vcpu{index}{}: {why}",
                    instruction_pointer(fd)
                )));
            }
        }
    }
}

/// Exit after which the vCPU cannot continue.
enum FinalExit {
    /// The guest ended by itself.
    End(GuestEnd),
    /// The vCPU failed, for this reason.
    Failed(String),
    /// KVM_EXIT_INTERNAL_ERROR. The reason is in the kvm_run page.
    InternalError,
}

/// Handles one exit. Returns `None` if the vCPU can continue.
fn serve(exit: VcpuExit<'_>, context: &VcpuContext) -> Option<FinalExit> {
    match exit {
        VcpuExit::IoOut(port, data) => context.ports.write(port, data),
        VcpuExit::IoIn(port, data) => context.ports.read(port, data),
        VcpuExit::MmioRead(address, data) => context.mmio.read(address, data),
        VcpuExit::MmioWrite(address, data) => context.mmio.write(address, data),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        VcpuExit::Shutdown => {
            return Some(FinalExit::Failed(
                "triple fault: the guest shut the processor down".into(),
            ));
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => {
            return Some(FinalExit::End(GuestEnd::Reset));
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
            return Some(FinalExit::End(GuestEnd::PowerOff));
        }
        VcpuExit::InternalError => return Some(FinalExit::InternalError),
        VcpuExit::FailEntry(reason, cpu) => {
            return Some(FinalExit::Failed(format!(
                "the processor refused to enter the guest: reason {reason:#x} on cpu {cpu}"
            )));
        }
        other => return Some(FinalExit::Failed(format!("unexpected exit: {other:?}"))),
    }
    None
}

/// Returns the instruction pointer of the vCPU, as a part of an error message.
fn instruction_pointer(fd: &VcpuFd) -> String {
    match fd.get_regs() {
        Ok(regs) => format!(" at rip {:#x}", regs.rip),
        Err(_) => String::new(),
    }
}

/// Describes a KVM_EXIT_INTERNAL_ERROR (kvm_run.internal in include/uapi/linux/kvm.h).
fn internal_error(fd: &mut VcpuFd) -> String {
    let run = fd.get_kvm_run();
    debug_assert_eq!(run.exit_reason, KVM_EXIT_INTERNAL_ERROR);
    let suberror = internal_suberror(run);
    match suberror {
        1 => "KVM cannot emulate this instruction (suberror 1)".into(),
        other => format!("KVM internal error, suberror {other}"),
    }
}

/// Returns the suberror of a KVM_EXIT_INTERNAL_ERROR, for which the kernel fills in the `internal` field of the union.
#[allow(unsafe_code)]
fn internal_suberror(run: &kvm_bindings::kvm_run) -> u32 {
    // SAFETY: every field of the union consists of integers, for which any bytes are valid.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}
