//! The per-entry adaptor: a leaf table's run, one page at a time.

use crate::addr::{GpaRange, TABLE_ENTRIES};
use crate::format::{Entry, Format, Tables};
use crate::walk::{Action, Place, Run, Visitor};

/// One level-0 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page<L> {
    /// Number of the page.
    pub page: u64,
    /// Index in its leaf table.
    pub index: usize,
    /// What the entry said.
    pub entry: Entry<L>,
}

/// Sees entries one at a time.
pub trait PageVisitor<'t, T: Tables, A> {
    /// What a stop carries.
    type Stop;

    /// An entry above level 0.
    fn entry(&mut self, place: &Place<'_, 't, T, A>) -> Action<Self::Stop>;

    /// A level-0 entry of `run`; only `Stop` and `Again` (the whole run) differ from `Continue`.
    fn page(
        &mut self,
        run: &Run<'_, 't, T, A>,
        page: Page<<T::Format as Format>::Leaf>,
    ) -> Action<Self::Stop>;
}

/// Makes a [`Visitor`] of a [`PageVisitor`].
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

/// The pages of `part`, which lies in one leaf table, with their indexes there.
fn indexes(part: GpaRange) -> impl Iterator<Item = (u64, usize)> {
    let mask = TABLE_ENTRIES as u64 - 1;
    (part.first_page()..part.end_page())
        .map(move |page| (page, usize::try_from(page & mask).unwrap_or(usize::MAX)))
}
