//! Changing what the guest may do, and splitting.

use crate::addr::{GpaRange, Hpa, Level};
use crate::format::{Entry, HardwareFormat, Leaf, MemoryType, Permissions};
use crate::notify::OpenRange;
use crate::stage2::flush::{Flush, Pages};
use crate::stage2::map::replace;
use crate::stage2::{ChangeError, Never, Stage2, change_entries, settled};
use crate::walk::{Action, Change, Place, Run, Visitor, Writes};

impl<'m, F: HardwareFormat> Stage2<'m, F> {
    /// Gives every mapped page of `range` just these permissions; all else that its entry says stays, accessed
    /// and dirty flags included. A huge leaf across an edge is split.
    ///
    /// Where writes are tracked and the right to write is withheld it stays so, if the new permissions have it. A page
    /// that becomes writable by this is not tracked before the next [`Stage2::track_writes`].
    ///
    /// # Errors
    /// [`ChangeError`], with the [`Flush`] of what was done before it.
    pub fn protect<'t>(
        &'t self,
        range: GpaRange,
        permissions: Permissions,
        open: &OpenRange,
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        if let Err(refused) = self.inside(range) {
            return (Flush::nothing(self), Err(refused.into()));
        }
        let leaf = Leaf::new(Hpa(0), permissions, MemoryType::WriteBack);
        if let Err(unsupported) = self.format.check(&leaf, Level::PAGE) {
            let error = ChangeError::Unsupported(unsupported);
            return (Flush::nothing(self), Err(error));
        }
        self.rewrite(range, open, |raw, level| {
            self.permitted(raw, level, permissions)
        })
    }

    /// Splits every huge leaf that meets `range`, until none is larger than `largest`. Translations and
    /// permissions stay what they are; a leaf that was accessed or dirty makes all its parts so.
    ///
    /// # Errors
    /// [`ChangeError`], with the [`Flush`] of what was done before it.
    pub fn split<'t>(
        &'t self,
        range: GpaRange,
        largest: Level,
        open: &OpenRange,
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        self.change(range, open, |walk, flush| {
            let ended = walk.run_allocating_in_turn(&mut Splitting { largest, flush });
            settled(ended)
        })
    }

    /// The leaf `raw` with just `permissions`, but for a right to write that is withheld.
    fn permitted(&self, raw: u64, level: Level, permissions: Permissions) -> u64 {
        let format = &self.format;
        if raw & F::WRITE_TRACKED == 0 {
            return format.with_permissions(raw, level, permissions);
        }
        let granted = format.with_permissions(raw & !F::WRITE_TRACKED, level, permissions);
        format.with_write_tracked(granted, level)
    }

    /// Replaces every leaf of `range` by what `rule` makes of it, where that differs.
    pub(super) fn rewrite<'t>(
        &'t self,
        range: GpaRange,
        open: &OpenRange,
        rule: impl Fn(u64, Level) -> u64,
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        self.change(range, open, |walk, flush| {
            let mut rewriting = Rewriting {
                format: &self.format,
                rule,
                flush,
            };
            let ended = walk.run_allocating_in_turn(&mut rewriting);
            settled(ended)
        })
    }
}

/// Replaces leaves by what a rule makes of (raw value, level). A huge leaf across an edge that the rule would change is
/// split.
pub(super) struct Rewriting<'f, 't, 'm, F, R> {
    pub(super) format: &'t F,
    pub(super) rule: R,
    pub(super) flush: &'f mut Flush<'t, 'm, F>,
}

impl<'t, 'm, A: Writes, F, R> Visitor<'t, Stage2<'m, F>, A> for Rewriting<'_, 't, 'm, F, R>
where
    F: HardwareFormat,
    R: Fn(u64, Level) -> u64,
{
    type Stop = Never;

    fn replacing(&self, table: u64) -> u64 {
        self.flush.replacing(table)
    }

    fn was_split(&mut self, span: GpaRange) {
        self.flush.split(span);
    }

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, A>) -> Action<Never> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Absent => Action::Skip,
            Entry::Leaf(_) => {
                let (raw, span) = (place.raw(), place.span());
                let new = (self.rule)(raw, place.level());
                if new == raw {
                    return Action::Skip;
                }
                if place.part() != span {
                    return Action::Split;
                }
                if replace(place.slot(), raw, new).is_err() {
                    return Action::Again;
                }
                self.flush.changed(span);
                Action::Skip
            }
        }
    }

    #[inline]
    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, F>, A>) -> Action<Never> {
        let mut pages = Pages::default();
        let wanted = |raw| match self.format.decode(raw, Level::PAGE) {
            Entry::Leaf(_) => (self.rule)(raw, Level::PAGE),
            Entry::Absent | Entry::Table(_) => raw,
        };
        change_entries(run, wanted, |page, slot, mut raw, mut new| {
            while let Err(found) = replace(slot, raw, new) {
                // Hardware has set a flag meanwhile.
                (raw, new) = (found, wanted(found));
                if raw == new {
                    return;
                }
            }
            pages.add(page);
        });
        self.flush.changed_pages(pages);
        Action::Continue
    }
}

struct Splitting<'f, 't, 'm, F> {
    largest: Level,
    flush: &'f mut Flush<'t, 'm, F>,
}

impl<'t, 'm, 'o, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Change<'o>>
    for Splitting<'_, 't, 'm, F>
{
    type Stop = Never;

    fn replacing(&self, table: u64) -> u64 {
        self.flush.replacing(table)
    }

    fn was_split(&mut self, span: GpaRange) {
        self.flush.split(span);
    }

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Leaf(_) if place.level() > self.largest => Action::Split,
            Entry::Absent | Entry::Leaf(_) => Action::Skip,
        }
    }

    fn run(&mut self, _: &Run<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        Action::Continue
    }
}
