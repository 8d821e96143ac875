//! Saves and restores the clocks of a guest: the time stamp counter (TSC) of each vCPU, and kvm-clock.
//!
//! All clocks must be saved and restored as of one moment, because guests compare them: the clocksource watchdog of
//! Linux rejects a TSC that deviates by some milliseconds. But each clock has an ioctl of its own, and the host may
//! preempt this thread between two of them. Therefore a reading of the TSCs is bracketed by two readings of kvm-clock,
//! and repeated if they are far apart. On restore, kvm-clock is set last, advanced by the time since the TSCs were set,
//! and read back to check it.

use std::ops::Deref;
use std::time::{Duration, Instant};

use devices::SavedState;
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{VcpuFd, VmFd};
use minicbor::{Decode, Encode};

use super::state::{MSR_TSC, MsrValue, Restored, Result, named, read_msrs, write_msrs};

/// Maximum duration of a reading or a restore that counts as one moment.
const MOMENT: Duration = Duration::from_micros(100);
/// Maximum number of attempts. The best attempt is used.
const TRIES: usize = 8;

/// Saved clocks of a guest, all read at one moment.
#[derive(Clone, Debug, Encode, Decode)]
#[cbor(map)]
pub struct MachineTime {
    /// Time stamp counter of each vCPU. `None` if the host does not allow it to be read.
    #[n(0)]
    pub tsc: Vec<Option<u64>>,
    /// Nanoseconds of kvm-clock.
    #[n(1)]
    pub clock_ns: u64,
}

impl SavedState for MachineTime {
    const VERSION: u16 = 1;
}

impl MachineTime {
    /// Reads the clocks of a VM whose vCPUs are stopped.
    ///
    /// # Errors
    /// Returns the error of the ioctl that failed.
    pub fn save<T: Deref<Target = VcpuFd>>(vm: &VmFd, vcpus: &[T]) -> Result<Self> {
        let (mut best, mut took) = read(vm, vcpus)?;
        for _ in 1..TRIES {
            if took <= MOMENT {
                break;
            }
            let (other, other_took) = read(vm, vcpus)?;
            if other_took < took {
                (best, took) = (other, other_took);
            }
        }
        Ok(best)
    }

    /// Sets the clocks of a new VM. They run from then on.
    ///
    /// # Errors
    /// Returns the error of the ioctl that failed.
    pub fn restore(&self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<Restored> {
        let mut refused_msrs = Vec::new();
        // Each TSC is written only once: KVM treats a second write of a similar value as an attempt to synchronize
        // TSCs, and keeps the first.
        let before = Instant::now();
        for (vcpu, value) in vcpus.iter().zip(&self.tsc) {
            let tsc = value.map(|value| MsrValue {
                index: MSR_TSC,
                value,
            });
            refused_msrs.extend(write_msrs(vcpu, tsc.as_slice())?);
        }
        let began = before + before.elapsed() / 2;
        for _ in 0..TRIES {
            set_clock(vm, self.clock_since(began))?;
            let off = clock_ns(vm)?.abs_diff(self.clock_since(began));
            if u128::from(off) <= MOMENT.as_nanos() {
                break;
            }
        }
        Ok(Restored { refused_msrs })
    }

    /// Returns the value that kvm-clock must have now if it had the saved value at `began`.
    fn clock_since(&self, began: Instant) -> u64 {
        let since = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.clock_ns.saturating_add(since)
    }
}

/// Reads all clocks once, as of the middle of the time that this took. Returns that time too.
fn read<T: Deref<Target = VcpuFd>>(vm: &VmFd, vcpus: &[T]) -> Result<(MachineTime, Duration)> {
    let before = clock_ns(vm)?;
    let tsc = vcpus
        .iter()
        .map(|vcpu| {
            let read = read_msrs(vcpu, &[MSR_TSC])?;
            Ok(read.first().map(|msr| msr.value))
        })
        .collect::<Result<_>>()?;
    let took = clock_ns(vm)?.saturating_sub(before);
    let clock_ns = before.saturating_add(took / 2);
    Ok((MachineTime { tsc, clock_ns }, Duration::from_nanos(took)))
}

fn clock_ns(vm: &VmFd) -> Result<u64> {
    Ok(vm.get_clock().map_err(named("KVM_GET_CLOCK"))?.clock)
}

fn set_clock(vm: &VmFd, clock: u64) -> Result<()> {
    let clock = kvm_clock_data {
        clock,
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(named("KVM_SET_CLOCK"))
}
