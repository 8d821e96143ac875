//! A guest without KVM: a thread that stamps pages, and a count of how many such threads run.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use ept::{Gpa, GpaRange, PAGE_SIZE, Region, RegionKind, Source, Tracker, TrackerBitmap};
use migration::{
    Arrival, Description, DestinationGuest, GuestError, Section, SectionKind, SourceGuest,
};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const PAGES: u64 = 512;
/// Pages that the guest rewrites. Those above stay zero, except [`COLD_PAGE`].
const HOT_PAGES: u64 = 64;
const COLD_PAGE: u64 = 300;

pub(crate) type Memory = GuestMemoryMmap<TrackerBitmap>;

/// Counts how many copies of one guest run.
#[derive(Default)]
pub(crate) struct World {
    running: AtomicUsize,
    most: AtomicUsize,
}

impl World {
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    /// Returns the most copies that ever ran at once.
    pub(crate) fn most(&self) -> usize {
        self.most.load(Ordering::SeqCst)
    }

    fn enter(&self) {
        let now = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
    }

    fn leave(&self) {
        self.running.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A guest whose vCPU is a thread that writes to its memory.
pub(crate) struct Guest {
    pub(crate) memory: Memory,
    pub(crate) tracker: Arc<Tracker>,
    world: Arc<World>,
    /// Number of the last stamp. Stamp `n` is in page `n % HOT_PAGES`.
    stamps: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    vcpu: Option<JoinHandle<()>>,
    /// What [`SourceGuest::describe`] says about the guest.
    pub(crate) arrival: Arrival,
    /// Called at each `sync_log` with the number of calls so far.
    pub(crate) on_sync: Option<Box<dyn FnMut(u32) + Send>>,
    syncs: u32,
}

fn new_memory() -> (Memory, Arc<Tracker>) {
    let range = GpaRange::with_len(Gpa(0), PAGES * PAGE_SIZE).unwrap();
    let tracker = Arc::new(
        Tracker::new(&[Region {
            range,
            kind: RegionKind::Ram,
        }])
        .unwrap(),
    );
    let bitmap = TrackerBitmap::new(Arc::clone(&tracker), Gpa(0), Source::Vcpu);
    let size = usize::try_from(PAGES * PAGE_SIZE).unwrap();
    let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    (Memory::from_regions(vec![region]).unwrap(), tracker)
}

impl Guest {
    /// A stopped guest with one cold page.
    pub(crate) fn new(world: &Arc<World>) -> Self {
        let (memory, tracker) = new_memory();
        memory
            .write_obj(COLD_PAGE, GuestAddress(COLD_PAGE * PAGE_SIZE))
            .unwrap();
        Self::with(memory, tracker, world, 0)
    }

    fn with(memory: Memory, tracker: Arc<Tracker>, world: &Arc<World>, stamps: u64) -> Self {
        Self {
            memory,
            tracker,
            world: Arc::clone(world),
            stamps: Arc::new(AtomicU64::new(stamps)),
            stop: Arc::default(),
            vcpu: None,
            arrival: Arrival::Runs,
            on_sync: None,
            syncs: 0,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.vcpu.is_some()
    }

    pub(crate) fn run(&mut self) {
        assert!(self.vcpu.is_none(), "a guest runs once");
        self.world.enter();
        self.stop.store(false, Ordering::SeqCst);
        let (memory, stamps, stop) = (
            self.memory.clone(),
            Arc::clone(&self.stamps),
            Arc::clone(&self.stop),
        );
        self.vcpu = Some(thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                stamp(&memory, &stamps);
                thread::yield_now();
            }
        }));
    }

    /// Stamps the next page, in the place of the thread.
    pub(crate) fn stamp(&mut self) {
        assert!(self.vcpu.is_none());
        stamp(&self.memory, &self.stamps);
    }

    pub(crate) fn halt(&mut self) {
        if let Some(vcpu) = self.vcpu.take() {
            self.stop.store(true, Ordering::SeqCst);
            vcpu.join().unwrap();
            self.world.leave();
        }
    }

    pub(crate) fn stamps(&self) -> u64 {
        self.stamps.load(Ordering::SeqCst)
    }

    /// Checks that every page of a halted guest holds the stamp that the guest wrote last.
    pub(crate) fn audit(&self) {
        assert!(self.vcpu.is_none());
        let last = self.stamps();
        for stamp in last.saturating_sub(HOT_PAGES - 1).max(1)..=last {
            let found: u64 = self.memory.read_obj(hot_page(stamp)).unwrap();
            assert_eq!(found, stamp, "lost write");
        }
        let cold: u64 = self
            .memory
            .read_obj(GuestAddress(COLD_PAGE * PAGE_SIZE))
            .unwrap();
        assert_eq!(cold, COLD_PAGE, "lost cold page");
    }
}

fn stamp(memory: &Memory, stamps: &AtomicU64) {
    let stamp = stamps.load(Ordering::SeqCst) + 1;
    memory.write_obj(stamp, hot_page(stamp)).unwrap();
    stamps.store(stamp, Ordering::SeqCst);
}

fn hot_page(stamp: u64) -> GuestAddress {
    GuestAddress((stamp % HOT_PAGES) * PAGE_SIZE)
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.halt();
    }
}

fn section_kind() -> SectionKind {
    SectionKind::required("stamps", 1)
}

impl SourceGuest for Guest {
    type Memory = Memory;

    fn describe(&self) -> Result<Description, GuestError> {
        let memory = GpaRange::with_len(Gpa(0), PAGES * PAGE_SIZE)?;
        let mut description = Description::new("test", &[memory], 1);
        description.sections.push(section_kind());
        description.arrival = self.arrival;
        Ok(description)
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    // The stamping thread marks the tracker by itself, so that there is no log to read.
    fn sync_log(&mut self) -> Result<(), GuestError> {
        self.syncs += 1;
        if let Some(on_sync) = &mut self.on_sync {
            on_sync(self.syncs);
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.halt();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        // It runs already if `pause` panicked before it paused the guest.
        if !self.is_running() {
            self.run();
        }
        Ok(())
    }

    fn save(&self) -> Result<Vec<Section>, GuestError> {
        Ok(vec![Section {
            kind: section_kind(),
            data: self.stamps().to_le_bytes().to_vec(),
        }])
    }
}

/// A destination that a [`Guest`] arrives in.
pub(crate) struct EmptyGuest {
    world: Arc<World>,
    /// Reason to refuse every guest.
    pub(crate) refusal: Option<&'static str>,
    empty: Option<(Memory, Arc<Tracker>)>,
    guest: Arc<Mutex<Option<Guest>>>,
}

impl EmptyGuest {
    pub(crate) fn new(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            refusal: None,
            empty: None,
            guest: Arc::default(),
        }
    }

    /// Returns the guest if it runs here.
    pub(crate) fn take(self) -> Option<Guest> {
        let guest = self.guest.lock().unwrap().take();
        guest.filter(Guest::is_running)
    }
}

impl DestinationGuest for EmptyGuest {
    type Memory = Memory;

    fn prepare(&mut self, _description: &Description) -> Result<(), GuestError> {
        if let Some(reason) = self.refusal {
            return Err(reason.into());
        }
        self.empty = Some(new_memory());
        Ok(())
    }

    fn memory(&self) -> Option<&Memory> {
        self.empty.as_ref().map(|(memory, _)| memory)
    }

    fn tracker(&self) -> Option<&Arc<Tracker>> {
        self.empty.as_ref().map(|(_, tracker)| tracker)
    }

    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError> {
        let (memory, tracker) = self.empty.clone().ok_or("no memory")?;
        let [section] = sections else {
            return Err("one section is due".into());
        };
        let stamps = u64::from_le_bytes(section.data.as_slice().try_into()?);
        *self.guest.lock().unwrap() = Some(Guest::with(memory, tracker, &self.world, stamps));
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.guest.lock().unwrap().as_mut().ok_or("no guest")?.run();
        Ok(())
    }
}
