//! Ferry: a tracker of one region, with one consumer, whose harvests are committed.

use std::sync::Arc;

use ept::{Epoch, Gpa, GpaRange, Marker, Region, RegionKind, Source, Start, Tracker};

use super::{Consumer, Dirt, DirtySet, Marks, PAGE, RUN, SharedSet};

/// 4 KiB detail was made where something is marked, and nowhere else.
pub(crate) struct FerryAsMarked {
    tracker: Arc<Tracker>,
    epoch: Epoch,
    ram: GpaRange,
}

impl DirtySet for FerryAsMarked {
    const NAME: &'static str = "ferry, as marked";

    fn new(dirt: &Dirt) -> Self {
        let bytes = dirt.len() as u64 * 64 * PAGE;
        let range = GpaRange::with_len(Gpa(0), bytes).expect("a range");
        let kind = RegionKind::Ram;
        let tracker = Arc::new(Tracker::new(&[Region { range, kind }]).expect("memory"));
        Self {
            epoch: Epoch::begin(&tracker, "bench", Start::Clean).expect("memory"),
            tracker,
            ram: range,
        }
    }

    /// As KVM's log tells it.
    fn dirty(&mut self, dirt: &Dirt) {
        self.tracker.mark_words(Gpa(0), dirt, Source::Vcpu);
    }

    fn harvest(&mut self, consumer: &mut Consumer) {
        let harvest = self.epoch.harvest(self.ram).expect("memory");
        for run in harvest.runs() {
            consumer.run(run.first_page(), run.pages());
        }
        harvest.commit();
    }

    fn bytes(&self) -> usize {
        self.tracker.memory_bytes()
    }
}

impl FerryAsMarked {
    /// Takes all dirty pages and makes them dirty again for the one consumer.
    pub(crate) fn roll_back(&self) {
        self.epoch.harvest(self.ram).expect("memory").rollback();
    }
}

impl Marks for Marker {
    #[inline]
    fn mark_page(&mut self, page: u64) {
        self.mark(Gpa(page * PAGE), PAGE);
    }

    #[inline]
    fn mark_run(&mut self, first_page: u64) {
        self.mark(Gpa(first_page * PAGE), RUN * PAGE);
    }
}

impl Marks for &Tracker {
    #[inline]
    fn mark_page(&mut self, page: u64) {
        self.mark(Gpa(page * PAGE), PAGE, Source::Device);
    }

    #[inline]
    fn mark_run(&mut self, first_page: u64) {
        let first = Gpa(first_page * PAGE);
        self.mark(first, RUN * PAGE, Source::Device);
    }
}

/// There is 4 KiB detail everywhere, as in a guest that has written everywhere, page by page.
pub(crate) struct Ferry(FerryAsMarked);

impl DirtySet for Ferry {
    const NAME: &'static str = "ferry";

    fn new(dirt: &Dirt) -> Self {
        let ferry = FerryAsMarked::new(dirt);
        ferry.tracker.reserve(ferry.ram).expect("memory");
        Self(ferry)
    }

    fn dirty(&mut self, dirt: &Dirt) {
        self.0.dirty(dirt);
    }

    fn harvest(&mut self, consumer: &mut Consumer) {
        self.0.harvest(consumer);
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl SharedSet for Ferry {
    /// Each thread has a marker.
    fn shared_marks(&self) -> impl Marks {
        self.0.tracker.marker(Source::Device).expect("memory")
    }
}

/// As [`Ferry`], with one figure that all threads count on.
pub(crate) struct FerryWithoutMarker(Ferry);

impl DirtySet for FerryWithoutMarker {
    const NAME: &'static str = "ferry, no marker";

    fn new(dirt: &Dirt) -> Self {
        Self(Ferry::new(dirt))
    }

    fn dirty(&mut self, dirt: &Dirt) {
        self.0.dirty(dirt);
    }

    fn harvest(&mut self, consumer: &mut Consumer) {
        self.0.harvest(consumer);
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl SharedSet for FerryWithoutMarker {
    fn shared_marks(&self) -> impl Marks {
        &*self.0.0.tracker
    }
}
