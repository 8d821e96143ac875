//! The loop of a vCPU thread: enter the guest, serve its exits, stop at the gate.
//!
//! It has `unsafe` in one place: kvm_run, which the kernel fills, is a union.

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

/// How a guest came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It wrote this status to the debug-exit port.
    DebugExit(u8),
    /// It asked for a reset: its machine is over, and whoever launched it may start it again.
    Reset,
    /// It asked to be switched off.
    PowerOff,
    /// The monitor was asked to end it.
    Stopped,
    /// Another process runs it now.
    HandedOver,
    /// A vCPU could not go on; the text says which, why and where.
    Failed(String),
}

impl GuestEnd {
    /// The exit status of a program that ran this guest: 0 only for an end that the guest or the user
    /// wanted.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::DebugExit(status) => *status,
            Self::Reset | Self::PowerOff | Self::Stopped | Self::HandedOver => 0,
            Self::Failed(_) => 1,
        }
    }
}

/// What a vCPU thread needs of the machine it belongs to.
#[derive(Clone)]
pub struct VcpuContext {
    /// The devices in I/O port space.
    pub ports: Arc<PortBus>,
    /// The devices in memory space.
    pub mmio: Arc<MmioBus>,
    /// Told once for each vCPU that brings the guest to its end.
    pub on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
}

/// The signal that kicks a vCPU out of the guest: the first real-time signal, which nothing else uses.
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

/// One vCPU and its thread.
pub struct Vcpu {
    index: u32,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of vCPU `index`. It waits at its gate, which one hold closes: [`Gate::release`] lets it run.
    ///
    /// # Errors
    /// Returns an error if the thread or the handler of the kick signal cannot be had.
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

    /// Its number, from 0.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its gate.
    #[must_use]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.gate.finish();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so on standard error; there is nobody else to tell.
            let _panicked = thread.join();
        }
    }
}

/// Runs the vCPU until the guest ends by itself (and how) or is finished by others.
fn run(index: u32, gate: &Gate, context: &VcpuContext) -> Option<GuestEnd> {
    while gate.ask_to_enter() == GateAnswer::Enter {
        if let Some(end) = run_until_kicked(index, &mut gate.fd(), context) {
            return Some(end);
        }
    }
    None
}

/// Runs until KVM_RUN is interrupted.
///
/// The loop ends nowhere else, and that is what makes the state of a parked vCPU whole: a port or MMIO
/// access is complete only after KVM_RUN was entered again (api.rst, KVM_RUN), and with `immediate_exit`
/// set that entry completes it and returns as interrupted.
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

enum FinalExit {
    End(GuestEnd),
    Failed(String),
    InternalError,
}

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

fn instruction_pointer(fd: &VcpuFd) -> String {
    match fd.get_regs() {
        Ok(regs) => format!(" at rip {:#x}", regs.rip),
        Err(_) => String::new(),
    }
}

/// What KVM says of KVM_EXIT_INTERNAL_ERROR: kvm_run.internal, in include/uapi/linux/kvm.h.
fn internal_error(fd: &mut VcpuFd) -> String {
    let run = fd.get_kvm_run();
    debug_assert_eq!(run.exit_reason, KVM_EXIT_INTERNAL_ERROR);
    let suberror = internal_suberror(run);
    match suberror {
        1 => "KVM cannot emulate this instruction (suberror 1)".into(),
        other => format!("KVM internal error, suberror {other}"),
    }
}

/// The kernel filled the `internal` variant of the union for this exit reason.
#[allow(unsafe_code)]
fn internal_suberror(run: &kvm_bindings::kvm_run) -> u32 {
    // SAFETY: every variant of the union is plain integers, valid for any bytes.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}
