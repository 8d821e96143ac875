//! A tracker, and what each of its consumers should find.

use std::collections::VecDeque;
use std::sync::Arc;

use ept::{
    Changed, Epoch, Fault, Gpa, GpaRange, Harvest, Notifier, ProtectError, Region, RegionKind,
    Source, Tracker,
};

use crate::model::PageSet;
use crate::pages::{count, gpa, pages};
use crate::tracker::script::{Fate, Step, source, start, words};

const MOST_EPOCHS: usize = 3;
const MOST_HELD: usize = 4;
/// Pages that bitmaps of a harvest are compared for.
const WINDOW: u64 = 1100;

/// A consumer.
struct Consumer {
    epoch: Epoch,
    number: u64,
    /// What it must find.
    dirty: PageSet,
    /// What was ever dirty for it.
    ever: PageSet,
}

/// A harvest that is not settled yet.
struct Held {
    harvest: Harvest,
    number: u64,
    pages: Vec<GpaRange>,
}

/// A tracker under test.
pub(super) struct Checked {
    tracker: Arc<Tracker>,
    regions: Vec<Region>,
    /// It has all the tables that it wants.
    enough: bool,
    consumers: Vec<Consumer>,
    begun: u64,
    held: VecDeque<Held>,
    protected: PageSet,
    outside: u64,
    /// Pages that each source dirtied, and what is dirty, until the first of them are taken.
    counted: Option<([u64; Source::ALL.len()], PageSet)>,
    /// Pages were marked or released whole for want of a table.
    coarse: bool,
}

impl Checked {
    pub(super) fn new(tracker: Tracker, enough: bool) -> Self {
        Self {
            regions: tracker.regions(),
            tracker: Arc::new(tracker),
            enough,
            consumers: Vec::new(),
            begun: 0,
            held: VecDeque::new(),
            protected: PageSet::new(),
            outside: 0,
            counted: Some(Default::default()),
            coarse: false,
        }
    }

    pub(super) fn step(&mut self, step: Step) {
        match step {
            Step::Mark {
                at,
                offset,
                bytes,
                source: number,
            } => {
                let byte = gpa(at.page(&self.regions)).0 + u64::from(offset % 4096);
                self.mark(byte, bytes.count(), source(number));
            }
            Step::MarkWords { first, words: bits } => {
                self.mark_words(first.page(&self.regions), &words(&bits));
            }
            Step::MarkEpoch(number, span) => {
                let range = span.range(&self.regions);
                let parts = self.tracked(range);
                if let Some(consumer) = self.consumer(number) {
                    consumer.epoch.mark(range);
                    parts
                        .into_iter()
                        .for_each(|part| consumer.found_dirty(part));
                }
            }
            Step::Begin { epoch, all_dirty } => self.begin(epoch, all_dirty),
            Step::End(number) => {
                if !self.consumers.is_empty() {
                    let number = usize::from(number) % self.consumers.len();
                    self.consumers.remove(number);
                }
            }
            Step::Harvest {
                epoch,
                span,
                most,
                fate,
            } => {
                let range = span.range(&self.regions);
                self.harvest(epoch, range, most.map_or(u64::MAX, u64::from), fate);
            }
            Step::Settle(fate) => {
                if let Some(held) = self.held.pop_front() {
                    self.settle(held, fate);
                }
            }
            Step::Protect(span) => self.toggle(span.range(&self.regions), true),
            Step::Unprotect(span) => self.toggle(span.range(&self.regions), false),
            Step::Fault(at) => self.fault(at.page(&self.regions)),
            Step::Reserve(span) => {
                let reserved = self.tracker.reserve(span.range(&self.regions));
                assert!(reserved.is_ok() || !self.enough);
            }
        }
    }

    fn consumer(&mut self, number: u8) -> Option<&mut Consumer> {
        let consumers = self.consumers.len().max(1);
        self.consumers.get_mut(usize::from(number) % consumers)
    }

    /// The parts of `range` that lie in regions.
    fn tracked(&self, range: GpaRange) -> Vec<GpaRange> {
        let parts = self.regions.iter();
        parts
            .filter_map(|region| region.range.intersection(&range))
            .collect()
    }

    /// The pages of `range` were marked: for everybody, by `source`.
    fn marked(&mut self, range: GpaRange, source: Source) {
        let parts = self.tracked(range);
        self.outside += range.pages() - count(&parts);
        for part in parts {
            for consumer in &mut self.consumers {
                consumer.found_dirty(part);
            }
            if let Some((by_source, dirty)) = &mut self.counted {
                let before = count(&dirty.ranges(part, |()| true));
                by_source[source as usize] += part.pages() - before;
                dirty.set(part, ());
            }
        }
    }

    fn mark(&mut self, byte: u64, bytes: u64, source: Source) {
        self.tracker.mark(Gpa(byte), bytes, source);
        if bytes > 0 {
            let last = byte.saturating_add(bytes - 1) >> 12;
            self.marked(pages(byte >> 12, last + 1), source);
        }
    }

    fn mark_words(&mut self, first: u64, words: &[u64]) {
        self.tracker.mark_words(gpa(first), words, Source::Vcpu);
        for (page, word) in (first..).step_by(64).zip(words) {
            let bits = (page..GpaRange::ALL.end_page()).zip(0..64);
            for (page, bit) in bits {
                if word >> bit & 1 == 1 {
                    self.marked(pages(page, page + 1), Source::Vcpu);
                }
            }
        }
    }

    fn begin(&mut self, number: u8, all_dirty: bool) {
        self.begun += 1;
        let epoch = Epoch::begin(&self.tracker, "any", start(all_dirty)).expect("few epochs");
        let mut consumer = Consumer {
            epoch,
            number: self.begun,
            dirty: PageSet::new(),
            ever: PageSet::new(),
        };
        if all_dirty {
            let all = self.tracked(GpaRange::ALL);
            all.into_iter().for_each(|part| consumer.found_dirty(part));
        } else {
            // What was marked so far is handed to the others.
            self.counted = None;
        }
        if self.consumers.len() < MOST_EPOCHS {
            self.consumers.push(consumer);
        } else {
            self.consumers[usize::from(number) % MOST_EPOCHS] = consumer;
        }
    }

    fn harvest(&mut self, number: u8, range: GpaRange, most: u64, fate: Fate) {
        let Some(consumer) = self.consumer(number) else {
            return;
        };
        let number = consumer.number;
        let harvest = consumer.epoch.harvest_up_to(range, most).expect("memory");
        let found = read(&harvest, range);
        self.check_found(number, &harvest, &found, range, most.max(1));
        let mut consumers = self.consumers.iter_mut();
        let consumer = consumers.find(|one| one.number == number);
        let consumer = consumer.expect("it has just harvested");
        found.iter().for_each(|run| consumer.dirty.clear(*run));
        self.counted = None;
        let held = Held {
            harvest,
            number,
            pages: found,
        };
        self.settle(held, fate);
    }

    /// Nothing is lost, nothing is made up, and a bounded harvest ends where it should.
    fn check_found(
        &self,
        number: u64,
        harvest: &Harvest,
        found: &[GpaRange],
        range: GpaRange,
        most: u64,
    ) {
        let end = harvest.rest().map_or(range.end_page(), |rest| {
            assert_eq!(rest.end_page(), range.end_page());
            assert!(harvest.pages() >= most, "{rest} is left of {range}");
            rest.first_page()
        });
        let looked_at = (range.first_page() < end).then(|| pages(range.first_page(), end));
        let within =
            |set: &PageSet| looked_at.map_or(Vec::new(), |part| set.ranges(part, |()| true));
        let mut consumers = self.consumers.iter();
        let consumer = consumers.find(|one| one.number == number);
        let consumer = consumer.expect("it has just harvested");
        let (owed, ever) = (within(&consumer.dirty), within(&consumer.ever));
        if self.enough {
            assert_eq!(found, owed);
            assert!(harvest.pages() < most.saturating_add(512));
        }
        assert!(covers(found, &owed), "{owed:?} was dirty, {found:?} found");
        if !self.is_coarse() {
            assert!(covers(&ever, found), "{found:?} is made up");
        }
        let tracked: Vec<_> = self.regions.iter().map(|region| region.range).collect();
        assert!(found.iter().all(|run| is_in(&tracked, *run)), "{found:?}");
    }

    fn settle(&mut self, held: Held, fate: Fate) {
        match fate {
            Fate::Commit => return held.harvest.commit(),
            Fate::Hold if self.held.len() < MOST_HELD => return self.held.push_back(held),
            Fate::Rollback => held.harvest.rollback(),
            Fate::Drop | Fate::Hold => drop(held.harvest),
        }
        // Its epoch may have ended.
        let mut consumers = self.consumers.iter_mut();
        if let Some(consumer) = consumers.find(|one| one.number == held.number) {
            for run in held.pages {
                consumer.found_dirty(run);
            }
        }
    }

    fn toggle(&mut self, range: GpaRange, protect: bool) {
        let open = Notifier::new().open(range).expect("nobody objects");
        let result = if protect {
            self.tracker.protect(range, &open)
        } else {
            self.tracker.unprotect(range, &open)
        };
        let (end, changed) = match result {
            Ok(changed) => (range.end_page(), changed),
            Err(ProtectError::OutOfTables { reached, changed }) => {
                assert!(!self.enough && range.contains(reached));
                (reached.page(), changed)
            }
            Err(error) => return assert_eq!(Some(error), self.refusal(range)),
        };
        assert_eq!(self.refusal(range), None);
        if range.first_page() == end {
            return assert_eq!(changed, Changed::default());
        }
        let done = pages(range.first_page(), end);
        // Pages that were not yet so.
        let mut expected = self.protected.clone();
        expected.update(done, |was| (was.is_some() != protect).then_some(()));
        let runs = expected.ranges(done, |()| true);
        assert_eq!(changed.pages, count(&runs));
        assert!(changed.entries <= changed.pages);
        let hull = runs.iter().copied().reduce(|all, run| all.hull(&run));
        assert_eq!(changed.interval, hull);
        self.protected.update(done, |_| protect.then_some(()));
    }

    /// Why `range` may not be protected: its first page that is in no region, or in one that nobody writes to.
    fn refusal(&self, range: GpaRange) -> Option<ProtectError> {
        let mut next = range.first_page();
        while next < range.end_page() {
            let gpa = gpa(next);
            let found = self.regions.iter().find(|one| one.range.contains(gpa));
            next = match found {
                None => return Some(ProtectError::Outside(gpa)),
                Some(region) => match region.kind {
                    RegionKind::Ram | RegionKind::DeviceRam => region.range.end_page(),
                    kind => return Some(ProtectError::Kind { gpa, kind }),
                },
            };
        }
        None
    }

    fn fault(&mut self, page: u64) {
        let this = pages(page, page + 1);
        let inside = !self.tracked(this).is_empty();
        let was = self.protected.get(page).is_some();
        let released = match self.tracker.fault(gpa(page)) {
            Fault::Outside => {
                assert!(!inside);
                self.outside += 1;
                return;
            }
            Fault::Open => {
                assert!(inside && !was);
                this
            }
            Fault::Released(range) => {
                assert!(inside && was && range.contains(gpa(page)));
                assert!(range == this || !self.enough);
                self.coarse |= range != this;
                range
            }
        };
        // What was released with it was protected, too, and is dirty now.
        for part in self.tracked(released) {
            let runs = self.protected.ranges(part, |()| true);
            assert!(part == this || runs == [part], "{part} was not protected");
            for consumer in &mut self.consumers {
                consumer.found_dirty(part);
            }
        }
        self.protected.clear(released);
        if released == this {
            if let Some((by_source, dirty)) = &mut self.counted {
                by_source[Source::Fault as usize] += u64::from(dirty.get(page).is_none());
                dirty.set(this, ());
            }
        } else {
            self.counted = None;
        }
    }

    fn is_coarse(&self) -> bool {
        let coarse = self.tracker.counters().coarse > 0;
        assert!(!(self.enough && coarse), "there were tables enough");
        coarse || self.coarse
    }

    /// Everything is harvested by everybody, and then nothing is left.
    pub(super) fn end(mut self) {
        self.check_pages();
        assert_eq!(self.tracker.counters().outside, self.outside);
        if let Some((by_source, _)) = &self.counted
            && self.enough
        {
            let counters = self.tracker.counters();
            let found = Source::ALL.map(|source| counters.dirtied_by(source));
            assert_eq!(&found, by_source);
        }
        while let Some(held) = self.held.pop_front() {
            self.settle(held, Fate::Rollback);
        }
        for number in 0..self.consumers.len() {
            let number = u8::try_from(number).expect("few epochs");
            self.harvest(number, GpaRange::ALL, u64::MAX, Fate::Commit);
        }
        for consumer in &self.consumers {
            let rest = consumer.epoch.harvest(GpaRange::ALL).expect("memory");
            assert!(rest.is_empty(), "what was taken is still there");
        }
    }

    /// Pages at the edges of everything, one by one.
    fn check_pages(&self) {
        let all = GpaRange::ALL;
        let mut edges: Vec<GpaRange> = self.regions.iter().map(|one| one.range).collect();
        edges.extend(self.protected.ranges(all, |()| true).iter().take(8));
        for consumer in &self.consumers {
            edges.extend(consumer.dirty.ranges(all, |()| true).iter().take(16));
        }
        let edges = edges.iter().flat_map(|range| {
            let (first, last) = (range.first_page(), range.end_page() - 1);
            [
                first.saturating_sub(1),
                first,
                last,
                (last + 1).min(all.end_page() - 1),
            ]
        });
        for page in edges {
            let at = gpa(page);
            let protected = self.protected.get(page).is_some();
            assert_eq!(self.tracker.is_protected(at), protected, "page {page:#x}");
            let mut any = false;
            for consumer in &self.consumers {
                let (found, owed) = (consumer.epoch.dirty_at(at), consumer.dirty.get(page));
                assert!(found || owed.is_none(), "page {page:#x} was lost");
                assert!(!self.enough || found == owed.is_some(), "page {page:#x}");
                any |= found;
            }
            assert!(self.consumers.is_empty() || self.tracker.dirty_at(at) == any);
        }
    }
}

impl Consumer {
    fn found_dirty(&mut self, part: GpaRange) {
        self.dirty.set(part, ());
        self.ever.set(part, ());
    }
}

/// The pages of a harvest of `range`, after checking that every view of it agrees with every other.
fn read(harvest: &Harvest, range: GpaRange) -> Vec<GpaRange> {
    let runs: Vec<GpaRange> = harvest.runs().collect();
    for pair in runs.windows(2) {
        assert!(pair[0].end_page() < pair[1].first_page(), "{pair:?}");
    }
    assert!(runs.iter().all(|run| range.covers(run)));
    assert_eq!(harvest.pages(), count(&runs));
    assert_eq!(harvest.is_empty(), runs.is_empty());
    let hull = runs.iter().copied().reduce(|all, run| all.hull(&run));
    assert_eq!(harvest.interval(), hull);

    // Two windows: at the start of the range, and near the end of what was found.
    let end = hull.unwrap_or(range).end_page();
    for first in [range.first_page(), end.saturating_sub(WINDOW / 2)] {
        let window = pages(first, (first + WINDOW).min(GpaRange::ALL.end_page()));
        let inside = runs.iter().filter_map(|run| run.intersection(&window));
        let cut: Vec<GpaRange> = harvest.runs_in(window).collect();
        assert!(inside.eq(cut.iter().copied()), "{cut:?} of {runs:?}");
        let mut expected = vec![0; usize::try_from(window.pages().div_ceil(64)).unwrap()];
        for page in cut.iter().flat_map(|run| run.first_page()..run.end_page()) {
            let bit = page - window.first_page();
            expected[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
        }
        assert!(harvest.words_in(window).eq(expected), "words of {window}");
        for run in cut.iter().take(8) {
            let (first, end) = (run.first_page(), run.end_page());
            assert!(harvest.contains(gpa(first)) && harvest.contains(gpa(end - 1)));
            assert!(end == window.end_page() || !harvest.contains(gpa(end)));
        }
    }
    runs
}

/// Whether `one` has every page of `other`; both are maximal and in order.
fn covers(one: &[GpaRange], other: &[GpaRange]) -> bool {
    other
        .iter()
        .all(|run| one.iter().any(|all| all.covers(run)))
}

/// Whether every page of `run` is in one of `parts`.
fn is_in(parts: &[GpaRange], run: GpaRange) -> bool {
    let both = parts.iter().filter_map(|part| part.intersection(&run));
    both.map(|part| part.pages()).sum::<u64>() == run.pages()
}
