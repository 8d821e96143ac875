//! Compares the answer of the machine with the model.

use std::collections::BTreeSet;

use ept::format::HardwareFormat;

use crate::oracle::model::{Refusal, Verdict, pages};
use crate::oracle::proof::seen::Event;
use crate::oracle::proof::{PAGE_SHIFT, Proof};
use crate::oracle::{Access, Answer, Outcome, Probe, Scenario};

/// Answer that the model expects.
struct Expected {
    outcomes: Vec<Outcome>,
    writers: Vec<u64>,
    log: Vec<u64>,
    /// First pages of leaves whose accessed flag the machine may or may not have set.
    unsure: BTreeSet<u64>,
    /// Writes that are refused because writes are tracked.
    withheld: Vec<Probe>,
}

impl<F: HardwareFormat> Proof<'_, F> {
    /// Runs the probes on the machine and compares its answer with the model. Returns the writes that were refused
    /// because writes are tracked.
    pub(super) fn ask(&mut self, probes: Vec<Probe>) -> Vec<Probe> {
        for probe in &probes {
            self.check_lookup(probe.gpa >> PAGE_SHIFT);
        }
        let scenario = Scenario {
            control: (self.subject.control)(&self.subject.format, self.table.root()),
            probes,
            tables: self.table.bytes(),
        };
        let answer = self.subject.machine.ask(&scenario);
        let answer = answer.unwrap_or_else(|error| panic!("{}: {error}", self.context));
        let expected = self.expect(&scenario.probes);
        self.check_answer(&scenario.probes, &answer, &expected);
        self.table.load(&answer.tables);
        self.learn(&expected.unsure);
        let everything = 0..self.subject.shape.end();
        self.compare(&everything, "as the machine left it");
        expected.withheld
    }

    /// Compares the lookup of a page by the crate with the model, before the machine walks to the page.
    fn check_lookup(&self, page: u64) {
        let expected = match self.model.at(page) {
            Some((_, leaf)) => Ok(leaf),
            None => Err(self.model.hole_level(page)),
        };
        let (found, context) = (self.table.lookup(page), &self.context);
        assert_eq!(found, expected, "{context}: lookup of page {page:#x}");
    }

    /// Runs the probes on the model.
    fn expect(&mut self, probes: &[Probe]) -> Expected {
        let mut expected = Expected {
            outcomes: Vec::new(),
            writers: vec![0; self.ground.frame_count()],
            log: Vec::new(),
            unsure: BTreeSet::new(),
            withheld: Vec::new(),
        };
        for (number, probe) in (1..).zip(probes) {
            let page = probe.gpa >> PAGE_SHIFT;
            let verdict = self.model.access(page, probe.access);
            self.note_verdict(page, probe.access, verdict);
            let outcome = match verdict {
                Verdict::Allowed {
                    hpa, first_write, ..
                } => {
                    if first_write {
                        expected.log.push(probe.gpa);
                    }
                    self.expect_done(number, probe.access, hpa, &mut expected.writers)
                }
                Verdict::Refused(refusal) => {
                    if refusal.withheld {
                        expected.withheld.push(*probe);
                    }
                    if self.may_mark(refusal) {
                        expected.unsure.insert(page - page % pages(refusal.level));
                    }
                    Outcome::Violation {
                        gpa: probe.gpa,
                        syndrome: (self.subject.syndrome)(probe.access, refusal),
                    }
                }
            };
            expected.outcomes.push(outcome);
        }
        expected
    }

    fn expect_done(&self, number: u64, access: Access, hpa: u64, writers: &mut [u64]) -> Outcome {
        let frame = self.ground.frame(hpa);
        let frame = frame.unwrap_or_else(|| panic!("probe {number} leads out of the frames"));
        match access {
            Access::Read => return Outcome::Done { value: hpa },
            Access::Write => writers[frame] = number,
            Access::Execute => {}
        }
        Outcome::Done { value: 0 }
    }

    /// Whether the machine can set the accessed flag of a leaf although it refuses the access.
    fn may_mark(&self, refusal: Refusal) -> bool {
        refusal.permissions.is_some() && self.subject.marks_refused == Some(refusal.level)
    }

    fn note_verdict(&mut self, page: u64, access: Access, verdict: Verdict) {
        let seen = &mut self.seen;
        match verdict {
            Verdict::Allowed {
                level, first_write, ..
            } => {
                seen.add(Event::Allowed(access), 1);
                seen.add(Event::AllowedAt(level), 1);
                seen.add(Event::High, self.ground.is_high(page).into());
                seen.add(Event::Dirtied(level), first_write.into());
            }
            Verdict::Refused(Refusal {
                level,
                permissions: Some(_),
                withheld,
            }) => {
                seen.add(Event::Refused(access), 1);
                seen.add(Event::RefusedAt(level), 1);
                seen.add(Event::Withheld(level), withheld.into());
            }
            Verdict::Refused(Refusal { level, .. }) => {
                seen.add(Event::Absent(access), 1);
                seen.add(Event::AbsentAt(level), 1);
            }
        }
    }

    fn check_answer(&self, probes: &[Probe], answer: &Answer, expected: &Expected) {
        let context = &self.context;
        assert_eq!(answer.outcomes.len(), probes.len(), "{context}: outcomes");
        let outcomes = answer.outcomes.iter().zip(&expected.outcomes);
        for ((number, probe), (outcome, expected)) in (1..).zip(probes).zip(outcomes) {
            let outcome = self.known(*outcome);
            assert!(
                outcome == *expected,
                "{context}: probe {number}, {probe:x?}: {outcome:x?} instead of {expected:x?}"
            );
        }
        assert_eq!(answer.writers.len(), expected.writers.len(), "{context}");
        let writers = answer.writers.iter().zip(&expected.writers);
        for (frame, (writer, expected)) in (0_u64..).zip(writers) {
            assert_eq!(writer, expected, "{context}: writer of frame {frame:#x}");
        }
        if self.subject.logs {
            let mut log = answer.log.clone();
            log.retain(|gpa| !self.ground.is_reserved(gpa >> PAGE_SHIFT));
            assert!(log == expected.log, "{context}: log of dirtied pages");
        }
    }

    /// Reduces an outcome to its known part: the reported page and some bits of the syndrome.
    fn known(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Violation { gpa, syndrome } => Outcome::Violation {
                gpa: gpa >> PAGE_SHIFT << PAGE_SHIFT,
                syndrome: syndrome & self.subject.syndrome_mask,
            },
            other => other,
        }
    }

    /// Copies the flags that the model cannot predict from the machine: those of its own pages, and accessed flags that
    /// it may or may not have set.
    fn learn(&mut self, unsure: &BTreeSet<u64>) {
        for &page in self.ground.reserved() {
            if let Ok(leaf) = self.table.lookup(page) {
                self.model.set_flags(page, leaf.accessed, leaf.dirty);
            }
        }
        for &first in unsure {
            let dirty = self.model.at(first).is_some_and(|(_, leaf)| leaf.dirty);
            if let Ok(leaf) = self.table.lookup(first) {
                self.model.set_flags(first, leaf.accessed, dirty);
            }
        }
    }
}
