//! A table in words, equal neighbours folded.

use core::cell::RefCell;
use core::fmt;

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, HardwareFormat, Leaf};
use crate::stage2::Stage2;
use crate::walk::{Action, EachEntry, Look, Outcome, Page, PageVisitor, Place, Run, Walk};

impl<'m, F: HardwareFormat> Stage2<'m, F> {
    /// Shows what is mapped in `range`: a line for each run of leaves of one size that differ in nothing but
    /// where they lead, one behind the other.
    pub fn dump(&self, range: GpaRange) -> Dump<'_, 'm, F> {
        Dump {
            stage2: self,
            range,
        }
    }
}

/// What [`Stage2::dump`] shows.
#[derive(Debug)]
pub struct Dump<'t, 'm, F> {
    stage2: &'t Stage2<'m, F>,
    range: GpaRange,
}

impl<F: HardwareFormat> fmt::Display for Dump<'_, '_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = Lines {
            folded: None,
            out: RefCell::new(f),
        };
        let mut lines = EachEntry(lines);
        match Walk::look(self.stage2, self.range).run(&mut lines) {
            Outcome::Stopped { value, .. } => return Err(value),
            Outcome::Completed | Outcome::Contended { .. } => {}
        }
        lines.0.end()
    }
}

struct Folded {
    range: GpaRange,
    level: Level,
    first: Leaf,
}

struct Lines<'f, 'b> {
    folded: Option<Folded>,
    out: RefCell<&'f mut fmt::Formatter<'b>>,
}

impl Lines<'_, '_> {
    fn leaf(&mut self, span: GpaRange, level: Level, leaf: Leaf) -> fmt::Result {
        if let Some(folded) = &mut self.folded
            && folded.level == level
            && folded.range.end_page() == span.first_page()
            && leaf == following(folded)
        {
            folded.range = folded.range.hull(&span);
            return Ok(());
        }
        self.end()?;
        self.folded = Some(Folded {
            range: span,
            level,
            first: leaf,
        });
        Ok(())
    }

    fn end(&mut self) -> fmt::Result {
        let Some(Folded {
            range,
            level,
            first,
        }) = self.folded.take()
        else {
            return Ok(());
        };
        let flag = |set, letter| if set { letter } else { '-' };
        writeln!(
            self.out.borrow_mut(),
            "{range} -> {} {} {}{} {:?} {level}",
            first.hpa,
            first.permissions,
            flag(first.accessed, 'a'),
            flag(first.dirty, 'd'),
            first.memory,
        )
    }
}

/// The leaf that would lengthen the run.
fn following(folded: &Folded) -> Leaf {
    let mut next = folded.first;
    next.hpa.0 += folded.range.pages() * crate::addr::PAGE_SIZE;
    next
}

/// A walk stops here only when the writer fails.
fn go_on(result: fmt::Result) -> Action<fmt::Error> {
    match result {
        Ok(()) => Action::Continue,
        Err(error) => Action::Stop(error),
    }
}

impl<'t, 'm, F: HardwareFormat> PageVisitor<'t, Stage2<'m, F>, Look> for Lines<'_, '_>
where
    'm: 't,
{
    type Stop = fmt::Error;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Look>) -> Action<fmt::Error> {
        match place.entry() {
            Entry::Leaf(leaf) => go_on(self.leaf(place.span(), place.level(), leaf)),
            Entry::Absent | Entry::Table(_) => Action::Continue,
        }
    }

    fn page(
        &mut self,
        _: &Run<'_, 't, Stage2<'m, F>, Look>,
        page: Page<Leaf>,
    ) -> Action<fmt::Error> {
        match page.entry {
            Entry::Leaf(leaf) => {
                let span = GpaRange::of(page.page, page.page + 1);
                go_on(self.leaf(span, Level::PAGE, leaf))
            }
            Entry::Absent | Entry::Table(_) => Action::Continue,
        }
    }
}
