//! The plan of a vCPU: the pages that it visits in each pass, and the iteration that every page must
//! hold at any time.
//!
//! A pass consists of one or two legs. A leg is a run of pages with an order. All its pages hold the
//! same iteration before the leg and the number of the pass after it. The plan is a pure function of
//! the configuration and the pass, so that expected values are never read from memory that may have
//! been lost.

use super::{Config, Order, Pattern, Share};

/// Number of strips into which [`Pattern::Hot`] divides the pages that are not hot. Each pass
/// rewrites one strip.
pub const COLD_STRIPS: u64 = 16;

/// Number of the first pass, which populates the area.
const FIRST_PASS: u64 = 1;

/// Part of a vCPU's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Pages of the working set.
    Work,
    /// Cold pages.
    Cold,
}

/// A run of pages, their order, and the iteration that they hold before they are rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Part of the share that contains the run.
    pub region: Region,
    /// First page of the run, counted from the start of the region.
    pub first: u64,
    /// Order in which the pages are visited.
    pub order: Order,
    /// Iteration that the pages hold.
    pub expected: u64,
}

/// The positions `from..to` of a leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The leg, whose `expected` is the iteration that these pages hold now.
    pub leg: Leg,
    /// First position.
    pub from: u64,
    /// One past the last position.
    pub to: u64,
}

/// Progress of a vCPU. All pages before it in the pass hold the number of the pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Number of the current pass. Pass 1 populates the area.
    pub pass: u64,
    /// Index of the current leg in the pass.
    pub leg: u64,
    /// Next position in the order of the leg.
    pub position: u64,
}

/// Plan of one vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    share: Share,
    pattern: Pattern,
    seed: u64,
}

impl Plan {
    /// Creates the plan of vCPU `cpu` for its share.
    #[must_use]
    pub fn new(config: &Config, cpu: u32, share: Share) -> Self {
        let seed = config.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ u64::from(cpu) << 56;
        Self {
            share,
            pattern: config.pattern,
            seed,
        }
    }

    /// Returns leg `leg` of pass `pass`, or `None` if the pass has no such leg. Passes start at 1.
    #[must_use]
    pub fn leg(&self, pass: u64, leg: u64) -> Option<Leg> {
        match (pass, leg) {
            (FIRST_PASS, 0) => Some(ascending(Region::Work, 0, self.share.work, 0)),
            (FIRST_PASS, 1) => Some(ascending(Region::Cold, 0, self.share.cold, 0)),
            (FIRST_PASS, _) => None,
            (_, 0) => Some(self.hot_leg(pass)),
            (_, 1) if self.has_strips() => Some(self.strip(pass % COLD_STRIPS, pass - 1)),
            _ => None,
        }
    }

    /// Returns the first leg of a pass after the populating one.
    fn hot_leg(&self, pass: u64) -> Leg {
        let mut leg = ascending(Region::Work, 0, self.share.hot, pass - 1);
        if self.pattern == Pattern::Random {
            leg.order = Order::shuffled(self.share.hot, self.seed.wrapping_add(pass));
        }
        leg
    }

    /// Returns true if there are pages that are not hot.
    const fn has_strips(&self) -> bool {
        self.share.work > self.share.hot
    }

    /// Returns strip `strip` of the pages that are not hot, with the iteration that they hold after pass
    /// `done`.
    fn strip(&self, strip: u64, done: u64) -> Leg {
        let rest = self.share.work - self.share.hot;
        // Divides first, because a product of page and strip numbers could overflow.
        let (each, more) = (rest / COLD_STRIPS, rest % COLD_STRIPS);
        let first = self.share.hot + strip * each + strip.min(more);
        let pages = each + u64::from(strip < more);
        ascending(Region::Work, first, pages, last_rewrite(strip, done))
    }

    /// Calls `visit` for spans that together cover every page of the share exactly once, with the
    /// iteration that the pages hold when the vCPU is at `at`.
    pub fn audit(&self, at: Position, mut visit: impl FnMut(Span)) {
        let mut index = 0;
        while let Some(leg) = self.leg(at.pass, index) {
            let reached = match index {
                index if index < at.leg => leg.order.positions(),
                index if index == at.leg => at.position.min(leg.order.positions()),
                _ => 0,
            };
            visit(Span {
                leg: Leg {
                    expected: at.pass,
                    ..leg
                },
                from: 0,
                to: reached,
            });
            visit(Span {
                leg,
                from: reached,
                to: leg.order.positions(),
            });
            index += 1;
        }
        if at.pass > FIRST_PASS {
            self.audit_other_pages(at.pass, visit);
        }
    }

    /// Calls `visit` for the pages that pass `pass` does not rewrite.
    fn audit_other_pages(&self, pass: u64, mut visit: impl FnMut(Span)) {
        for strip in (0..COLD_STRIPS).filter(|strip| *strip != pass % COLD_STRIPS) {
            visit(whole(self.strip(strip, pass)));
        }
        visit(whole(ascending(
            Region::Cold,
            0,
            self.share.cold,
            FIRST_PASS,
        )));
    }
}

/// Returns a span of all positions of a leg.
fn whole(leg: Leg) -> Span {
    Span {
        leg,
        from: 0,
        to: leg.order.positions(),
    }
}

/// Returns a leg in ascending order.
const fn ascending(region: Region, first: u64, pages: u64, expected: u64) -> Leg {
    Leg {
        region,
        first,
        order: Order::ascending(pages),
        expected,
    }
}

/// Returns the last pass up to `done` that rewrote strip `strip`, or the populating pass if none did.
const fn last_rewrite(strip: u64, done: u64) -> u64 {
    let ago = (done % COLD_STRIPS + COLD_STRIPS - strip) % COLD_STRIPS;
    if done < FIRST_PASS + 1 + ago {
        FIRST_PASS
    } else {
        done - ago
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pages of a share. Each holds the number of the pass that wrote it last, initially 0.
    struct Model {
        work: Vec<u64>,
        cold: Vec<u64>,
    }

    impl Model {
        fn new(share: Share) -> Self {
            let zeroes = |pages| vec![0; usize::try_from(pages).unwrap()];
            Self {
                work: zeroes(share.work),
                cold: zeroes(share.cold),
            }
        }

        fn page(&mut self, region: Region, index: u64) -> &mut u64 {
            let index = usize::try_from(index).unwrap();
            match region {
                Region::Work => &mut self.work[index],
                Region::Cold => &mut self.cold[index],
            }
        }

        /// Visits `steps` positions in the order of the guest.
        fn run(&mut self, plan: &Plan, steps: u64) -> Position {
            let mut at = Position {
                pass: 1,
                leg: 0,
                position: 0,
            };
            for _ in 0..steps {
                let Some(leg) = plan.leg(at.pass, at.leg) else {
                    at = Position {
                        pass: at.pass + 1,
                        leg: 0,
                        position: 0,
                    };
                    continue;
                };
                if at.position == leg.order.positions() {
                    at = Position {
                        leg: at.leg + 1,
                        position: 0,
                        ..at
                    };
                    continue;
                }
                if let Some(page) = leg.order.page(at.position) {
                    let held = self.page(leg.region, leg.first + page);
                    assert_eq!(
                        *held, leg.expected,
                        "page {page} of {leg:?} in pass {}",
                        at.pass
                    );
                    *held = at.pass;
                }
                at.position += 1;
            }
            at
        }
    }

    fn shares() -> impl Strategy<Value = Share> {
        (1u64..70, 1u64..70, 0u64..20).prop_map(|(work, hot, cold)| Share {
            work_first: 0,
            work,
            hot: hot.min(work),
            cold_first: work,
            cold,
        })
    }

    proptest! {
        #[test]
        fn expected_iterations_are_those_that_were_written(
            share in shares(), seed: u64, steps in 0u64..6000,
            pattern in prop::sample::select(vec![Pattern::Sequential, Pattern::Random, Pattern::Hot]),
        ) {
            let share = Share {
                hot: if pattern == Pattern::Hot { share.hot } else { share.work },
                ..share
            };
            let plan = Plan::new(&Config { pattern, seed, ..Config::default() }, 3, share);
            let mut model = Model::new(share);
            let at = model.run(&plan, steps);

            let mut seen = 0;
            plan.audit(at, |span| {
                for page in (span.from..span.to).filter_map(|n| span.leg.order.page(n)) {
                    let held = *model.page(span.leg.region, span.leg.first + page);
                    assert_eq!(held, span.leg.expected, "page {page} of {span:?} at {at:?}");
                    // Makes a second visit of the same page fail.
                    *model.page(span.leg.region, span.leg.first + page) = u64::MAX;
                    seen += 1;
                }
            });
            prop_assert_eq!(seen, share.work + share.cold);
        }
    }
}
