//! Duties of vCPU 0 besides its share of the work: commands, reports and the verdict.

use core::hint::spin_loop;

use crate::console;
use crate::cpu;
use crate::dirtier::GuestReport;
use crate::interface::{EXIT_MEMORY_FAULT, EXIT_SUCCESS, PAGE_SIZE};
use crate::pacer::Poll;
use crate::state::{self, Progress, Setup};

/// Ticks of the time-stamp counter, one or two seconds, after which missing vCPUs are reported.
const PATIENCE: u64 = 1 << 32;

/// The duties of vCPU 0 and their state.
pub(crate) struct Control {
    setup: &'static Setup,
    poll: Poll,
    /// Whether `ready` was reported.
    announced: bool,
}

impl Control {
    pub(crate) fn new(setup: &'static Setup) -> Self {
        Self {
            setup,
            poll: Poll::new(),
            announced: false,
        }
    }

    /// Reports `ready` when it is time, and executes a command if one arrived. Called between chunks.
    pub(crate) fn tick(&mut self) {
        if !self.announced {
            self.announce();
        }
        if self.setup.config.serial && self.poll.is_due() {
            self.poll
                .look(cpu::serial_receive)
                .into_iter()
                .for_each(|byte| self.obey(byte));
        }
    }

    /// Reports `ready` if every vCPU has completed the first pass.
    fn announce(&mut self) {
        let cpus = self.setup.config.cpus;
        if state::progress(cpus).iter().any(|one| one.pass() < 2) {
            return;
        }
        self.announced = true;
        self.print(GuestReport::Ready {
            cpus,
            area_mib: (self.setup.layout.pages() * PAGE_SIZE) >> 20,
            pattern: self.setup.config.pattern,
        });
    }

    /// Prints a report unless the configuration says `quiet`.
    fn print(&self, line: GuestReport) {
        if !self.setup.config.quiet {
            console::print(line);
        }
    }

    /// Executes a command. Other bytes are ignored, so that line ends may be typed.
    fn obey(&self, command: u8) {
        match command {
            // Printed even with `quiet`, because it was requested.
            b's' => console::print(GuestReport::Status(state::totals(self.setup.config.cpus))),
            b'q' => state::stop(),
            _ => {}
        }
    }

    /// Waits until every vCPU has started. Prints a message if some do not start in time.
    pub(crate) fn wait_for_start(&mut self) {
        let (began, mut said) = (cpu::time_stamp(), false);
        while !self.all(Progress::started) && !state::stopping() {
            self.tick();
            spin_loop();
            if !said && cpu::time_stamp().wrapping_sub(began) > PATIENCE {
                console::print(Missing(self.setup.config.cpus));
                said = true;
            }
        }
    }

    /// Waits for the audit of every vCPU, prints the verdict and ends the guest.
    pub(crate) fn conclude(&mut self) -> ! {
        while !self.all(Progress::audited) {
            self.tick();
            spin_loop();
        }
        if !self.announced {
            self.announce();
        }
        let totals = state::totals(self.setup.config.cpus);
        if totals.lost + totals.torn == 0 {
            console::print_and_exit(GuestReport::AuditPassed(totals), EXIT_SUCCESS)
        } else {
            console::print_and_exit(GuestReport::AuditFailed(totals), EXIT_MEMORY_FAULT)
        }
    }

    /// Returns true if `test` holds for every vCPU. After `q`, vCPUs that have not started are left out.
    fn all(&self, test: fn(&Progress) -> bool) -> bool {
        let stopped_early = |one: &Progress| state::stopping() && !one.started();
        state::progress(self.setup.config.cpus)
            .iter()
            .all(|one| test(one) || stopped_early(one))
    }
}

/// Message about vCPUs that have not started. The number is that of the expected vCPUs.
struct Missing(u32);

impl core::fmt::Display for Missing {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let started = state::progress(self.0)
            .iter()
            .filter(|one| one.started())
            .count();
        write!(
            out,
            "dirtier: waiting, {started} of cpus={} started; ",
            self.0
        )?;
        out.write_str("others need a monitor that knows the direct-start note")
    }
}
