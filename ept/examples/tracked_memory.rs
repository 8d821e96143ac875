//! A rust-vmm monitor's memory, tracked: `GuestMemoryMmap` with one type changed.
//!
//!     cargo run -p ferry-ept --features vm-memory --example tracked_memory

use std::error::Error;
use std::sync::Arc;

use ept::{Epoch, Gpa, GpaRange, Region, RegionKind, Start, Tracker, TrackerBitmap};
use vm_memory::mmap::{GuestRegionMmap, MmapRegionBuilder};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM_BYTES: usize = 64 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let ram = GpaRange::with_len(Gpa(0), RAM_BYTES as u64)?;
    let tracker = Arc::new(Tracker::new(&[Region {
        range: ram,
        kind: RegionKind::Ram,
    }])?);

    // The one change: the bitmap of each region is a view of the tracker.
    let bitmap = TrackerBitmap::new(Arc::clone(&tracker), Gpa(0), ept::Source::Device);
    let mapping = MmapRegionBuilder::new_with_bitmap(RAM_BYTES, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or("it ends too high")?;
    let memory = GuestMemoryMmap::from_regions(vec![region])?;

    // Whoever wants to know what changes begins an epoch; any number of them may.
    let migration = Epoch::begin(&tracker, "migration", Start::Clean)?;
    let display = Epoch::begin(&tracker, "display", Start::Clean)?;

    // A device writes, as devices do.
    memory.write_slice(&[7; 5000], GuestAddress(0x1234))?;
    memory.write_obj(42_u64, GuestAddress(0x30_0000))?;

    // What one consumer takes stays dirty for the other.
    let harvest = migration.harvest(ram)?;
    for run in harvest.runs() {
        println!("to be sent: {run}");
    }
    harvest.commit();
    println!(
        "the display has not seen {} pages",
        display.harvest(ram)?.pages()
    );
    Ok(())
}
