//! The functions of the 2019 thread.

use std::sync::atomic::{AtomicU64, Ordering};

use ept::apply::{
    AllocatingError, ApplyError, Existing, Missing, apply_to_page_range, apply_to_pfn_range,
    apply_to_pfn_range_allocating,
};
use ept::format::{Entry, HardwareFormat, Permissions};
use ept::{Gpa, GpaRange, Level, OpenRange};

use crate::pages::pages;
use crate::stage2::change::open;
use crate::stage2::guest::Guest;
use crate::stage2::script::{Apply, Function, Open};

/// What the callback says when it has enough.
#[derive(Debug, PartialEq)]
struct Enough;

impl std::fmt::Display for Enough {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("enough")
    }
}

impl Function {
    fn fills(self) -> bool {
        !matches!(self, Self::Refusing | Self::Skipping)
    }

    fn refuses(self) -> bool {
        !matches!(self, Self::Skipping | Self::FillingSplitting)
    }
}

impl<F: HardwareFormat> Guest<'_, '_, F> {
    pub(super) fn apply(&mut self, apply: Apply, range: GpaRange, how: Open) {
        let open = open(range, how);
        let may_be_called = self.window.span.covers(&range) && open.range().covers(&range);
        let leaves = if may_be_called {
            self.leaves(range)
        } else {
            Vec::new()
        };
        let mut seen = Vec::new();
        let result = self.call(apply, range, &open, &mut seen);
        assert!(may_be_called || seen.is_empty());
        assert!(
            seen.windows(2).all(|pair| pair[0] < pair[1]),
            "in order, once"
        );
        assert!(seen.iter().all(|page| range.contains(Gpa(page << 12))));
        let huge = leaves.iter().find(|leaf| leaf.pages() > 1);
        let refused = huge.filter(|_| apply.function.refuses());
        let refused = refused.map(|leaf| leaf.first_page().max(range.first_page()));
        let end = match result {
            Ok(()) => {
                assert!(may_be_called && refused.is_none());
                range.end_page()
            }
            Err(AllocatingError::Apply(error)) => match error {
                ApplyError::Beyond { .. } | ApplyError::NotOpen(_) => {
                    assert!(!may_be_called);
                    return;
                }
                ApplyError::Callback { at, error: Enough } => {
                    assert_eq!(
                        seen.len(),
                        usize::from(apply.fails_at.expect("it failed")) + 1
                    );
                    assert_eq!(seen.last(), Some(&at.page()));
                    at.page() + 1
                }
                ApplyError::HugeLeaf { at } => {
                    assert_eq!(Some(at.page()), refused);
                    at.page()
                }
                error @ (ApplyError::Contended { .. } | ApplyError::Unflushed) => {
                    panic!("{error}")
                }
            },
            Err(AllocatingError::Exhausted(exhausted)) => {
                assert!(apply.function.fills());
                assert_eq!(self.stage2.available(), 0);
                exhausted.reached.page()
            }
        };
        if range.first_page() < end {
            let reached = pages(range.first_page(), end);
            self.check_seen(apply.function, reached, &leaves, &seen);
            if apply.protects {
                self.follow_protection(reached, &seen);
            }
        }
        self.compare(range);
    }

    fn call(
        &self,
        apply: Apply,
        range: GpaRange,
        open: &OpenRange,
        seen: &mut Vec<u64>,
    ) -> Result<(), AllocatingError<Enough>> {
        let (stage2, format) = (self.stage2, self.format);
        let callback = |entry: &AtomicU64, at: Gpa| {
            seen.push(at.page());
            if apply.protects {
                let read_only = |raw| match format.decode(raw, Level::PAGE) {
                    Entry::Leaf(_) => {
                        Some(format.with_permissions(raw, Level::PAGE, Permissions::READ))
                    }
                    _ => None,
                };
                let _ = entry.fetch_update(Ordering::SeqCst, Ordering::SeqCst, read_only);
            }
            match apply.fails_at {
                Some(call) if seen.len() > usize::from(call) => Err(Enough),
                _ => Ok(()),
            }
        };
        let plain = AllocatingError::Apply;
        let (flush, result) = match apply.function {
            Function::Refusing => {
                let refuse = Existing::Refuse;
                let (flush, result) = apply_to_pfn_range(stage2, range, open, refuse, callback);
                (flush, result.map_err(plain))
            }
            Function::Skipping => {
                let skip = Existing::Skip;
                let (flush, result) = apply_to_pfn_range(stage2, range, open, skip, callback);
                (flush, result.map_err(plain))
            }
            Function::FillingRefusing => {
                apply_to_pfn_range_allocating(stage2, range, open, Missing::Refuse, callback)
            }
            Function::FillingSplitting => {
                apply_to_pfn_range_allocating(stage2, range, open, Missing::Split, callback)
            }
            Function::PageRange => apply_to_page_range(stage2, range, open, callback),
        };
        flush.done();
        result
    }

    /// Every page that has an entry of its own was shown; where missing tables are filled in, every page at all.
    fn check_seen(&self, function: Function, reached: GpaRange, leaves: &[GpaRange], seen: &[u64]) {
        if function.fills() {
            let all = reached.first_page()..reached.end_page();
            assert!(
                seen.iter().copied().eq(all),
                "pages of {reached} are left out"
            );
            return;
        }
        for leaf in leaves.iter().filter(|leaf| reached.overlaps(leaf)) {
            let (first, end) = (leaf.first_page(), leaf.end_page());
            let from = seen.partition_point(|page| *page < first);
            let shown = seen.get(from).is_some_and(|page| *page < end);
            assert_eq!(shown, leaf.pages() == 1, "{leaf}");
        }
    }

    fn follow_protection(&mut self, reached: GpaRange, seen: &[u64]) {
        for (run, _) in self.model.runs(reached) {
            let from = seen.partition_point(|page| *page < run.first_page());
            let shown = seen[from..]
                .iter()
                .take_while(|page| **page < run.end_page());
            for page in shown.copied() {
                self.changed(pages(page, page + 1), |guest, page| {
                    guest.permitted(page, Permissions::READ)
                });
            }
        }
    }
}
