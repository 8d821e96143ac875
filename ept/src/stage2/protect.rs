//! Changing what the guest may do, and splitting.

use crate::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{GpaRange, Hpa, Level};
use crate::format::{Entry, HardwareFormat, Leaf, MemoryType, Permissions};
use crate::notify::OpenRange;
use crate::stage2::flush::Flush;
use crate::stage2::map::replace;
use crate::stage2::{ChangeError, Never, Stage2, entries_of, settled};
use crate::walk::{Action, Change, Place, Run, Visitor, Walk};

impl<'m, F: HardwareFormat> Stage2<'m, F> {
    /// Gives every mapped page of `range` just these permissions; all else that its entry says stays, accessed
    /// and dirty flags included. A huge leaf across an edge is split.
    ///
    /// # Errors
    /// [`ChangeError`], with the [`Flush`] of what was done before it.
    pub fn protect<'t>(
        &'t self,
        range: GpaRange,
        permissions: Permissions,
        open: &OpenRange,
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        let mut protecting = Protecting {
            format: &self.format,
            permissions,
            flush: Flush::nothing(self),
        };
        let result = self
            .checked(range)
            .and_then(|range| {
                let leaf = Leaf::new(Hpa(0), permissions, MemoryType::WriteBack);
                let allowed = self.format.check(&leaf, Level::PAGE);
                allowed.map_err(ChangeError::Unsupported).map(|()| range)
            })
            .and_then(|range| {
                let walk = Walk::change(self, range, open)?;
                settled(walk.run_allocating(&mut protecting))
            });
        if matches!(result, Err(ChangeError::Exhausted { .. })) {
            protecting.flush.not_split();
        }
        (protecting.flush, result)
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
        let mut splitting = Splitting {
            largest,
            flush: Flush::nothing(self),
        };
        let result = self.checked(range).and_then(|range| {
            let walk = Walk::change(self, range, open)?;
            settled(walk.run_allocating(&mut splitting))
        });
        if matches!(result, Err(ChangeError::Exhausted { .. })) {
            splitting.flush.not_split();
        }
        (splitting.flush, result)
    }
}

struct Protecting<'t, 'm, F> {
    format: &'t F,
    permissions: Permissions,
    flush: Flush<'t, 'm, F>,
}

impl<F: HardwareFormat> Protecting<'_, '_, F> {
    /// Changes the entry under `slot` if it is a leaf; hardware may set its flags meanwhile.
    #[inline]
    fn change(&mut self, slot: &AtomicU64, page: u64) {
        let mut raw = slot.load(Ordering::Relaxed);
        while let Entry::Leaf(_) = self.format.decode(raw, Level::PAGE) {
            let new = self.changed(raw, Level::PAGE);
            if new == raw {
                return;
            }
            match replace(slot, raw, new) {
                Ok(()) => return self.flush.changed(GpaRange::of(page, page + 1)),
                Err(found) => raw = found,
            }
        }
    }

    #[inline]
    fn changed(&self, raw: u64, level: Level) -> u64 {
        self.format.with_permissions(raw, level, self.permissions)
    }
}

impl<'t, 'm, 'o, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Change<'o>>
    for Protecting<'t, 'm, F>
{
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Absent => Action::Skip,
            Entry::Leaf(_) if self.changed(place.raw(), place.level()) == place.raw() => {
                Action::Skip
            }
            Entry::Leaf(_) if place.part() == place.span() => {
                let new = self.changed(place.raw(), place.level());
                if replace(place.slot(), place.raw(), new).is_err() {
                    return Action::Again;
                }
                self.flush.changed(place.span());
                Action::Skip
            }
            Entry::Leaf(_) => {
                self.flush.split(place.span());
                Action::Split
            }
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        for (page, slot) in entries_of(run) {
            self.change(slot, page);
        }
        Action::Continue
    }
}

struct Splitting<'t, 'm, F> {
    largest: Level,
    flush: Flush<'t, 'm, F>,
}

impl<'t, 'm, 'o, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Change<'o>>
    for Splitting<'t, 'm, F>
{
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Leaf(_) if place.level() > self.largest => {
                self.flush.split(place.span());
                Action::Split
            }
            Entry::Absent | Entry::Leaf(_) => Action::Skip,
        }
    }

    fn run(&mut self, _: &Run<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        Action::Continue
    }
}
