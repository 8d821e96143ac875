//! What a vCPU visits in each pass, and what every page must hold at any moment.
//!
//! A pass is one or two legs; a leg is a run of pages in some order that all hold the same
//! iteration before it and the pass's number after it. The plan is a pure function of the
//! configuration and the pass, so what a page must hold never has to be read from memory that
//! might have been lost.

use super::{Config, Order, Pattern, Share};

/// With [`Pattern::Hot`], the pages that are not hot are cut into so many strips, and each pass
/// rewrites one of them.
pub const COLD_STRIPS: u64 = 16;

/// The pass that populates the area.
const FIRST_PASS: u64 = 1;

/// Which part of a vCPU's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Its part of the working set.
    Work,
    /// Its part of the cold pages.
    Cold,
}

/// A run of pages, an order, and the iteration that all of them hold before they are rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// The part of the share that `first` counts in.
    pub region: Region,
    /// First page of the run.
    pub first: u64,
    /// The order over the run.
    pub order: Order,
    /// The iteration that the pages hold.
    pub expected: u64,
}

/// Part of a leg: its positions `from..to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The leg, with what its pages hold now.
    pub leg: Leg,
    /// First position.
    pub from: u64,
    /// One past the last position.
    pub to: u64,
}

/// How far a vCPU has come: everything before it in the pass holds the pass's number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The pass under way. Passes are numbered from 1, which populates.
    pub pass: u64,
    /// The leg of that pass.
    pub leg: u64,
    /// The position in that leg's order.
    pub position: u64,
}

/// One vCPU's plan.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    share: Share,
    pattern: Pattern,
    seed: u64,
}

impl Plan {
    /// The plan of vCPU `cpu` for its `share`.
    #[must_use]
    pub fn new(config: &Config, cpu: u32, share: Share) -> Self {
        let seed = config.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ u64::from(cpu) << 56;
        Self {
            share,
            pattern: config.pattern,
            seed,
        }
    }

    /// Leg `leg` of pass `pass`, from pass 1 on; `None` if the pass has no such leg.
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

    /// Pages of the first leg of every pass after the first.
    fn hot_leg(&self, pass: u64) -> Leg {
        let mut leg = ascending(Region::Work, 0, self.share.hot, pass - 1);
        if self.pattern == Pattern::Random {
            leg.order = Order::shuffled(self.share.hot, self.seed.wrapping_add(pass));
        }
        leg
    }

    const fn has_strips(&self) -> bool {
        self.share.work > self.share.hot
    }

    /// Strip `strip` of the pages that are not hot, as it is once pass `done` has been through.
    fn strip(&self, strip: u64, done: u64) -> Leg {
        let rest = self.share.work - self.share.hot;
        // Cut so that no product of page and strip numbers is needed.
        let (each, more) = (rest / COLD_STRIPS, rest % COLD_STRIPS);
        let first = self.share.hot + strip * each + strip.min(more);
        let pages = each + u64::from(strip < more);
        ascending(Region::Work, first, pages, last_rewrite(strip, done))
    }

    /// Calls `visit` for runs of pages that together are the whole share, each once, with what
    /// they hold at `at`.
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
            self.audit_what_the_pass_leaves_alone(at.pass, visit);
        }
    }

    fn audit_what_the_pass_leaves_alone(&self, pass: u64, mut visit: impl FnMut(Span)) {
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

fn whole(leg: Leg) -> Span {
    Span {
        leg,
        from: 0,
        to: leg.order.positions(),
    }
}

const fn ascending(region: Region, first: u64, pages: u64, expected: u64) -> Leg {
    Leg {
        region,
        first,
        order: Order::ascending(pages),
        expected,
    }
}

/// The last pass up to `done` that rewrote strip `strip`; the populating pass if none did.
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

    /// A share's pages, each holding the number of the pass that wrote it last, 0 at first.
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

        /// Visits as the guest does, until `steps` positions have been passed.
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
        fn every_expectation_is_what_was_written(
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
                    // Seen twice would now be noticed.
                    *model.page(span.leg.region, span.leg.first + page) = u64::MAX;
                    seen += 1;
                }
            });
            prop_assert_eq!(seen, share.work + share.cold);
        }
    }
}
