//! Adaptor for visitors that see one page at a time instead of a whole leaf table.

use crate::addr::{GpaRange, TABLE_ENTRIES};
use crate::format::{Entry, Format, Tables};
use crate::walk::{Action, Place, Run, Visitor};

/// An entry of level 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page<L> {
    /// Number of the page.
    pub page: u64,
    /// Index of the entry in its leaf table.
    pub index: usize,
    /// Decoded value of the entry.
    pub entry: Entry<L>,
}

/// Visitor that sees one entry at a time.
pub trait PageVisitor<'t, T: Tables, A> {
    /// Value of [`Action::Stop`].
    type Stop;

    /// Visits an entry above level 0.
    fn entry(&mut self, place: &Place<'_, 't, T, A>) -> Action<Self::Stop>;

    /// Visits an entry of level 0 in `run`. `Again` shows the whole run again, and `Stop` stops; all other actions mean
    /// `Continue`.
    fn page(
        &mut self,
        run: &Run<'_, 't, T, A>,
        page: Page<<T::Format as Format>::Leaf>,
    ) -> Action<Self::Stop>;
}

/// A [`Visitor`] that calls a [`PageVisitor`].
#[derive(Debug)]
pub struct EachEntry<V>(pub V);

impl<'t, T, A, V> Visitor<'t, T, A> for EachEntry<V>
where
    T: Tables,
    V: PageVisitor<'t, T, A>,
{
    type Stop = V::Stop;

    fn entry(&mut self, place: &Place<'_, 't, T, A>) -> Action<V::Stop> {
        self.0.entry(place)
    }

    fn run(&mut self, run: &Run<'_, 't, T, A>) -> Action<V::Stop> {
        for (page, index) in indexes(run.part()) {
            let entry = run.decode(index);
            match self.0.page(run, Page { page, index, entry }) {
                Action::Again => return Action::Again,
                Action::Stop(value) => return Action::Stop(value),
                Action::Continue | Action::Descend | Action::Skip | Action::Split => {}
            }
        }
        Action::Continue
    }
}

/// Iterates over the pages of `part`, which lies in one leaf table, with their indices in it.
fn indexes(part: GpaRange) -> impl Iterator<Item = (u64, usize)> {
    let mask = TABLE_ENTRIES as u64 - 1;
    (part.first_page()..part.end_page())
        .map(move |page| (page, usize::try_from(page & mask).unwrap_or(usize::MAX)))
}
