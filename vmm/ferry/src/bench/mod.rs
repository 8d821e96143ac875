//! `ferry bench`: Ferry's own measurements, beside its peers where they are installed, in turns in one run.

mod bare;
mod contender;
mod devices;
mod figures;
mod net_host;
mod peers;
mod start;

use super::Failure;
use super::arguments::Bench;

pub(super) fn bench(bench: &Bench) -> Result<u8, Failure> {
    match bench {
        Bench::Start(arguments) => start::start(arguments),
        Bench::Devices(arguments) => devices::devices(arguments),
        Bench::BareStart(arguments) => bare::bare_start(arguments),
    }
}
