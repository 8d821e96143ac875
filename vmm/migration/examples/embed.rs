//! A monitor without KVM that migrates its guest to a second one in the same process.
//!
//! Its guest is a thread that counts in guest memory. That is enough to show everything that a monitor has to provide:
//! memory with a dirty tracker, a guest that can be paused, its state as sections, and a stream.
//!
//!     cargo run -p ferry-migration --example embed

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ept::{Gpa, GpaRange, Region, RegionKind, Source, Tracker, TrackerBitmap};
use migration::{
    Attempt, Description, DestinationGuest, DigestCheck, GuestError, Halves, ReceiveOptions,
    Section, SectionKind, SendOptions, SourceGuest, Stream, misfits, receive, send,
};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub(crate) fn main() -> Result<(), GuestError> {
    let mut source = Monitor::new()?;
    source.run();
    let (near, far) = UnixStream::pair()?;
    // Each side has a thread of its own, usually in another process on another host.
    let destination = thread::spawn(move || {
        let mut monitor = Monitor::new()?;
        let attempt = Attempt::arriving("source");
        receive(
            &mut monitor,
            Tunnel(far),
            &ReceiveOptions::default(),
            &attempt,
        )?;
        Ok::<_, GuestError>(monitor)
    });
    let options = SendOptions {
        digest: DigestCheck::Compare,
        ..SendOptions::default()
    };
    let attempt = Attempt::new("destination");
    let sent = send(&mut source, Tunnel(near), &options, &attempt);
    let arrived = destination.join().map_err(|_| "the destination panicked")?;
    sent?;
    let mut arrived = arrived?;

    let report = attempt.report();
    println!(
        "sent {} bytes in {} rounds, guest paused for {:.1} ms",
        report.bytes_sent,
        report.rounds.len(),
        report.downtime_ms
    );
    let before = source.count.load(SeqCst);
    thread::sleep(Duration::from_millis(50));
    SourceGuest::pause(&mut arrived)?;
    let after = arrived.check()?;
    println!("the guest had counted to {before} and went on to {after}");
    if source.vcpu.is_some() || after <= before {
        return Err("the guest does not run where it should".into());
    }
    Ok(())
}

/// Any reliable connection can be a stream: this one stands for a vsock or TLS connection.
struct Tunnel(UnixStream);

impl Stream for Tunnel {
    fn split(self) -> io::Result<Halves> {
        let (reader, writer) = (self.0.try_clone()?, self.0.try_clone()?);
        // An error means that the direction has ended already.
        Ok(Halves::new(reader, writer, move |half| {
            let _ended = self.0.shutdown(half);
        }))
    }
}

const RAM: u64 = 64 << 20;
/// Pages that the guest writes to, in turns.
const PAGES: u64 = 1000;

/// Writes through this type mark the tracker by themselves. The writes of KVM vCPUs do not: see the example `kvm`.
type Memory = GuestMemoryMmap<TrackerBitmap>;

/// A monitor with one guest of one vCPU.
struct Monitor {
    memory: Memory,
    tracker: Arc<Tracker>,
    /// State of the vCPU: how far it has counted.
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    vcpu: Option<JoinHandle<()>>,
}

impl Monitor {
    fn new() -> Result<Self, GuestError> {
        let (range, kind) = (GpaRange::with_len(Gpa(0), RAM)?, RegionKind::Ram);
        let tracker = Arc::new(Tracker::new(&[Region { range, kind }])?);
        let bitmap = TrackerBitmap::new(Arc::clone(&tracker), Gpa(0), Source::Vcpu);
        let region = MmapRegionBuilder::new_with_bitmap(usize::try_from(RAM)?, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()?;
        let region = GuestRegionMmap::new(region, GuestAddress(0)).ok_or("guest memory")?;
        Ok(Self {
            memory: Memory::from_regions(vec![region])?,
            tracker,
            count: Arc::default(),
            stop: Arc::default(),
            vcpu: None,
        })
    }

    /// Runs the guest, unless it runs already.
    fn run(&mut self) {
        if self.vcpu.is_some() {
            return;
        }
        self.stop.store(false, SeqCst);
        let (memory, count) = (self.memory.clone(), Arc::clone(&self.count));
        let stop = Arc::clone(&self.stop);
        self.vcpu = Some(thread::spawn(move || {
            while !stop.load(SeqCst) {
                let next = count.load(SeqCst) + 1;
                if memory.write_obj(next, address(next)).is_ok() {
                    count.store(next, SeqCst);
                }
                thread::yield_now();
            }
        }));
    }

    /// Checks that memory holds all that the paused guest has written. Returns its count.
    fn check(&self) -> Result<u64, GuestError> {
        let last = self.count.load(SeqCst);
        for written in last.saturating_sub(PAGES - 1).max(1)..=last {
            let found: u64 = self.memory.read_obj(address(written))?;
            if found != written {
                return Err(format!("lost write: {written}, found {found}").into());
            }
        }
        Ok(last)
    }
}

fn address(count: u64) -> GuestAddress {
    GuestAddress((count % PAGES) * ept::PAGE_SIZE)
}

fn vcpu_kind() -> SectionKind {
    SectionKind::required("vcpu0", 1)
}

impl SourceGuest for Monitor {
    type Memory = Memory;

    fn describe(&self) -> Result<Description, GuestError> {
        let memory = [GpaRange::with_len(Gpa(0), RAM)?];
        let mut description = Description::new("embed example", &memory, 1);
        description.sections = vec![vcpu_kind()];
        Ok(description)
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.stop.store(true, SeqCst);
        match self.vcpu.take().map(JoinHandle::join) {
            Some(Err(_)) => Err("the vCPU panicked".into()),
            _ => Ok(()),
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.run();
        Ok(())
    }

    fn save(&self) -> Result<Vec<Section>, GuestError> {
        let (kind, count) = (vcpu_kind(), self.count.load(SeqCst));
        let data = count.to_le_bytes().to_vec();
        Ok(vec![Section { kind, data }])
    }
}

impl DestinationGuest for Monitor {
    type Memory = Memory;

    fn prepare(&mut self, description: &Description) -> Result<(), GuestError> {
        let misfits = misfits(&description.sections, &[vcpu_kind()]);
        if !misfits.is_empty() {
            return Err(misfits.join("; ").into());
        }
        if description.ranges()? != [GpaRange::with_len(Gpa(0), RAM)?] || description.cpus != 1 {
            return Err("this monitor has 64 MiB of memory and one vCPU".into());
        }
        Ok(())
    }

    fn memory(&self) -> Option<&Memory> {
        Some(&self.memory)
    }

    fn tracker(&self) -> Option<&Arc<Tracker>> {
        Some(&self.tracker)
    }

    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError> {
        let Some(vcpu) = Section::find(sections, "vcpu0") else {
            return Err("the guest has one section".into());
        };
        let count = u64::from_le_bytes(vcpu.data.as_slice().try_into()?);
        self.count.store(count, SeqCst);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.run();
        Ok(())
    }
}
