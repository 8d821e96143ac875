//! Work of one vCPU: passes over its share until it must stop, then the audit.

use crate::console;
use crate::control::Control;
use crate::dirtier::{Fault, Finding, Leg, Plan, Position, Region, GuestReport};
use crate::interface::{EXIT_MEMORY_FAULT, MAX_CPUS};
use crate::memory::Runs;
use crate::pacer::Pacer;
use crate::page::{self, Chunk};
use crate::selftest::{self, Victims};
use crate::state::{self, Progress, Setup};

/// Number of positions that are visited before the vCPU checks for commands and other events. They take
/// some microseconds at full speed, and some milliseconds if every page faults.
const CHUNK: u64 = 256;

/// Number of the pass that populates the share.
const FIRST_PASS: u64 = 1;

/// Maximum number of faults that each vCPU reports in the audit. All faults are counted.
const DESCRIBED: u64 = 4;

/// A vCPU that works.
pub(crate) struct Worker {
    cpu: u32,
    setup: &'static Setup,
    progress: &'static Progress,
    plan: Plan,
    work: Runs,
    cold: Runs,
    at: Position,
    pages: u64,
    pacer: Option<Pacer>,
    chunk: u64,
    /// Duties of vCPU 0. `None` on the other vCPUs.
    control: Option<Control>,
}

impl Worker {
    pub(crate) fn new(cpu: u32, setup: &'static Setup) -> Self {
        let config = &setup.config;
        let share = setup.layout.share(cpu, config.cpus);
        let pacer = Pacer::new(config);
        Self {
            cpu,
            setup,
            progress: &state::progress(MAX_CPUS)[cpu as usize],
            plan: Plan::new(config, cpu, share),
            work: setup.area.window(share.work_first, share.work),
            cold: setup.area.window(share.cold_first, share.cold),
            at: Position {
                pass: FIRST_PASS,
                leg: 0,
                position: 0,
            },
            pages: 0,
            chunk: pacer
                .as_ref()
                .map_or(CHUNK, |pacer| pacer.chunk(config.cpus).clamp(1, CHUNK)),
            pacer,
            control: (cpu == 0).then(|| Control::new(setup)),
        }
    }

    /// Runs passes until the vCPU must stop, then audits the share.
    pub(crate) fn run(mut self) -> ! {
        self.progress.start(self.at);
        while self.may_go_on() {
            self.step();
        }
        self.audit();
        match &mut self.control {
            Some(control) => control.conclude(),
            None => idle(),
        }
    }

    /// Waits until the next chunk is due. Meanwhile vCPU 0 does its duties. Returns false if the vCPU must stop.
    fn may_go_on(&mut self) -> bool {
        loop {
            if let Some(control) = &mut self.control {
                control.tick();
            }
            if state::stopping()
                || self
                    .setup
                    .config
                    .passes
                    .is_some_and(|most| self.at.pass > most)
            {
                return false;
            }
            // The first pass only populates the share and is not paced.
            if self.at.pass == FIRST_PASS || self.pacer.as_mut().is_none_or(Pacer::is_due) {
                return true;
            }
            core::hint::spin_loop();
        }
    }

    /// Visits the next chunk, or advances to the next leg or pass.
    fn step(&mut self) {
        if !self.progress.is(self.at, self.pages) {
            self.own_state_lost();
        }
        match self.plan.leg(self.at.pass, self.at.leg) {
            Some(leg) if self.at.position < leg.order.positions() => self.visit(leg),
            Some(_) => {
                self.at = Position {
                    leg: self.at.leg + 1,
                    position: 0,
                    ..self.at
                }
            }
            None => self.end_pass(),
        }
        self.progress.record(self.at, self.pages);
        self.spoil_if_asked();
    }

    /// Populates or rewrites the next chunk of a leg.
    fn visit(&mut self, leg: Leg) {
        let from = self.at.position;
        let to = leg.order.positions().min(from + self.chunk);
        let chunk = Chunk {
            memory: self.memory(leg.region),
            leg,
            from,
            to,
            cpu: self.cpu,
        };
        let visited = if self.at.pass == FIRST_PASS {
            chunk.populate(FIRST_PASS)
        } else {
            chunk
                .rewrite(self.at.pass)
                .unwrap_or_else(|gpa| self.write_lost(gpa, leg.expected))
        };
        self.at.position = to;
        self.pages += visited;
        if let (Some(pacer), true) = (&mut self.pacer, self.at.pass > FIRST_PASS) {
            pacer.spend(visited);
        }
    }

    fn memory(&self, region: Region) -> &Runs {
        match region {
            Region::Work => &self.work,
            Region::Cold => &self.cold,
        }
    }

    /// Advances to the next pass.
    fn end_pass(&mut self) {
        self.at = Position {
            pass: self.at.pass + 1,
            leg: 0,
            position: 0,
        };
        if let (Some(control), true) = (&mut self.control, self.at.pass == FIRST_PASS + 1) {
            control.wait_for_start();
        }
    }

    /// Runs the self-test at the end of a pass, on vCPU 0.
    fn spoil_if_asked(&self) {
        let Some(kind) = self.setup.config.selftest else {
            return;
        };
        if self.cpu == 0
            && self.at
                == (Position {
                    leg: 0,
                    position: 0,
                    ..self.at
                })
        {
            let victims = Victims {
                hot: self.work.gpa(0),
                cold: self.cold.gpa(0),
            };
            selftest::end_of_pass(kind, self.at.pass - 1, victims, self.progress);
        }
    }

    /// Reports the page at `gpa` and ends the guest.
    fn write_lost(&self, gpa: u64, expected: u64) -> ! {
        let (report, _) = self.describe(gpa, expected);
        console::print_and_exit(report, EXIT_MEMORY_FAULT)
    }

    /// Reports that the recorded progress was lost, as a fault of the page that contains it, and ends the guest.
    fn own_state_lost(&self) -> ! {
        let gpa = core::ptr::from_ref(self.progress).addr() as u64;
        let fault = Fault {
            cpu: self.cpu,
            gpa,
            expected: self.at.pass,
        };
        console::print_and_exit(
            GuestReport::LostWrite(fault, self.progress.pass()),
            EXIT_MEMORY_FAULT,
        )
    }

    /// Returns the report about a page that does not hold `expected`, and whether the page is torn.
    fn describe(&self, gpa: u64, expected: u64) -> (GuestReport, bool) {
        let fault = Fault {
            cpu: self.cpu,
            gpa,
            expected,
        };
        match page::examine(gpa, self.cpu) {
            Finding::Whole(found) => (GuestReport::LostWrite(fault, found), false),
            Finding::Torn(places) => (GuestReport::TornWrite(fault, places), true),
        }
    }

    /// Checks that every page of the share holds its expected iteration.
    fn audit(&self) {
        let (mut lost, mut torn) = (0, 0);
        self.plan.audit(self.at, |span| {
            if span.leg.expected < FIRST_PASS {
                // The vCPU stopped before these pages were populated. Their contents are undefined.
                return;
            }
            let (leg, memory) = (span.leg, self.memory(span.leg.region));
            let chunk = Chunk {
                memory,
                leg,
                from: span.from,
                to: span.to,
                cpu: self.cpu,
            };
            chunk.check(|gpa| {
                let (report, is_torn) = self.describe(gpa, leg.expected);
                if lost + torn < DESCRIBED {
                    console::print(report);
                }
                *(if is_torn { &mut torn } else { &mut lost }) += 1;
            });
        });
        self.progress.finish(lost, torn);
    }
}

/// Loops forever, on a vCPU that has no work.
pub(crate) fn idle() -> ! {
    loop {
        core::hint::spin_loop();
    }
}
