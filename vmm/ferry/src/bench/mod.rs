//! `ferry bench`: measures Ferry beside QEMU, alternating between them in one run, because machines are noisy.

mod bare;
mod devices;
mod figures;
mod monitor_process;
mod net_host;
mod peers;
mod start;

use super::Failure;
use super::arguments::bench::Bench;

/// Runs one measurement and prints its figures and its limits. Returns the exit status.
pub(super) fn bench(bench: &Bench) -> Result<u8, Failure> {
    match bench {
        Bench::Start(arguments) => start::start(arguments),
        Bench::Devices(arguments) => devices::devices(arguments),
        Bench::BareStart(arguments) => bare::bare_start(arguments),
    }
}
