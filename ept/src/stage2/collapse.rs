//! Making huge leaves of tables again.

use crate::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, HardwareFormat, Leaf, TableId, Tables};
use crate::notify::OpenRange;
use crate::stage2::flush::Flush;
use crate::stage2::map::replace;
use crate::stage2::{ChangeError, Never, Stage2, settled};
use crate::walk::{Action, Change, Place, Run, Visitor};

impl<'m, F: HardwareFormat> Stage2<'m, F> {
    /// Replaces tables that lie wholly in `range` and say what one leaf of level `to` can say. The leaf is
    /// accessed or dirty if any of its parts was.
    ///
    /// The open range says that no vCPU uses the tables meanwhile. Whatever else walks them and sets flags (an
    /// IOMMU) must be stopped, too.
    ///
    /// # Errors
    /// [`ChangeError`], with the [`Flush`] of what was done before it.
    pub fn collapse<'t>(
        &'t self,
        range: GpaRange,
        to: Level,
        open: &OpenRange,
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        self.change(range, open, |walk, flush| {
            let mut collapsing = Collapsing {
                stage2: self,
                to: to.min(self.format.largest_leaf()),
                flush,
            };
            let ended = walk.run_in_turn(&mut collapsing);
            settled(Ok(ended))
        })
    }

    /// The leaf of `level` that says what the entries of `table`, one level lower, say together.
    fn together(&self, table: TableId, level: Level) -> Option<Leaf> {
        let below = level.down();
        let decode = |slot: &AtomicU64| {
            let raw = slot.load(Ordering::SeqCst);
            match self.format.decode(raw, below) {
                Entry::Leaf(leaf) => Some(leaf),
                Entry::Absent | Entry::Table(_) => None,
            }
        };
        let slots = self.upper(table);
        let first = decode(slots.first()?)?;
        let mut all = first;
        for (index, slot) in slots.iter().enumerate() {
            let leaf = decode(slot)?;
            let Leaf {
                accessed, dirty, ..
            } = leaf;
            let expected = Leaf {
                accessed,
                dirty,
                ..first.part(index, below)
            };
            if leaf != expected {
                return None;
            }
            all.accessed |= accessed;
            all.dirty |= dirty;
        }
        self.format.check(&all, level).ok().map(|()| all)
    }
}

struct Collapsing<'f, 't, 'm, F> {
    stage2: &'t Stage2<'m, F>,
    to: Level,
    flush: &'f mut Flush<'t, 'm, F>,
}

impl<'t, 'm, F: HardwareFormat> Collapsing<'_, 't, 'm, F> {
    /// Collapses what is below the entry of `level` under `slot`, which maps `span`, and then the entry itself: from
    /// the lowest level up, because what is below may become leaves first. It goes as deep as there are levels.
    fn collapse(&mut self, slot: &AtomicU64, span: GpaRange, level: Level) {
        let Some((_, table)) = self.table_at(slot, level) else {
            return;
        };
        if level > Level::MIB2 {
            let below = level.down();
            let firsts = (span.first_page()..).step_by(step(below));
            for (first, slot) in firsts.zip(self.stage2.upper(table)) {
                self.collapse(slot, GpaRange::of(first, first + below.pages()), below);
            }
        }
        let Some(leaf) = self.stage2.together(table, level) else {
            return;
        };
        let new = self.stage2.format.encode(Entry::Leaf(leaf), level);
        let new = self.flush.replacing(new);
        // Whoever broke the entry may be making it now: it is the same table then, in other words.
        while let Some((raw, same)) = self.table_at(slot, level)
            && same == table
        {
            if replace(slot, raw, new).is_ok() {
                self.stage2.pool.push(self.flush.detached(), table);
                self.flush.collapsed(span);
                return;
            }
        }
    }

    /// The table that the entry under `slot` points to, if it does, and its raw value.
    fn table_at(&self, slot: &AtomicU64, level: Level) -> Option<(u64, TableId)> {
        let raw = slot.load(Ordering::SeqCst);
        match self.stage2.format.decode(raw, level) {
            Entry::Table(table) => Some((raw, table)),
            Entry::Absent | Entry::Leaf(_) => None,
        }
    }
}

/// Pages of an entry, as a step.
fn step(level: Level) -> usize {
    usize::try_from(level.pages()).unwrap_or(usize::MAX)
}

impl<'t, 'm, 'o, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Change<'o>>
    for Collapsing<'_, 't, 'm, F>
{
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        let (level, span) = (place.level(), place.span());
        if level > self.to || place.part() != span {
            return Action::Continue;
        }
        self.collapse(place.slot(), span, level);
        Action::Skip
    }

    fn run(&mut self, _: &Run<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        Action::Continue
    }
}
