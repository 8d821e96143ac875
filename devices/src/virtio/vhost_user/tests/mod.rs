//! The vhost-user front end, with back ends that work and with back ends that do not.

mod back_end;
mod connection;
mod failures;
mod refusals;

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::super::testing::*;
use super::super::{BlockSnapshot, DeviceState, Interrupt, MmioTransport, VirtioSnapshot};
use super::{Result, VhostUser, VhostUserOptions, VhostUserSnapshot, spec};
use back_end::*;

const SECTORS: usize = 256;
const HEADER: u64 = DATA - 0x1000;
const STATUS: u64 = DATA - 0x800;
const FLUSH: u64 = 1 << 9;
const WRITE_CACHE: u64 = 1 << 11;

/// Returns the memory of the tests as shared mappings of one memory file.
fn shared_memory() -> Memory {
    let file = File::from(memfd_create("test-ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(16 << 20).unwrap();
    let file = Arc::new(file);
    let region = |start, offset| {
        let file = FileOffset::from_arc(Arc::clone(&file), offset);
        (GuestAddress(start), 8 << 20, Some(file))
    };
    let regions = [region(0, 0), region(HIGH, 8 << 20)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges_with_files(regions);
    Arc::new(memory.unwrap())
}

fn connect(back_end: &BackEnd, memory: &Memory, interrupt: &Interrupt) -> VhostUser<Memory> {
    try_connect(back_end, memory, interrupt).unwrap_or_else(|error| panic!("{error}"))
}

fn try_connect(
    back_end: &BackEnd,
    memory: &Memory,
    interrupt: &Interrupt,
) -> Result<VhostUser<Memory>> {
    VhostUser::connect(VhostUserOptions {
        socket: back_end.socket(),
        memory: Arc::clone(memory),
        interrupt: interrupt.clone(),
    })
}

/// Returns a driver for a new guest, and its disk.
fn guest(back_end: &BackEnd) -> (Driver, VhostUser<Memory>) {
    let memory = shared_memory();
    let (interrupt, line) = interrupt();
    let disk = connect(back_end, &memory, &interrupt);
    let device = MmioTransport::vhost_user("_disk0", &disk, interrupt);
    (Driver::over(device, memory, line), disk)
}

/// Restores the device of `driver` on another back end.
fn moved(driver: Driver, back_end: &BackEnd) -> (Driver, VhostUser<Memory>) {
    let saved = driver.device.save().unwrap();
    let (interrupt, line) = interrupt();
    let disk = connect(back_end, &driver.memory, &interrupt);
    let device = MmioTransport::restore_vhost_user("_disk0", &disk, interrupt, &saved).unwrap();
    (driver.with(device, line), disk)
}

fn header(driver: &Driver, kind: u32, sector: u64) {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    driver.write_memory(HEADER, &bytes);
    driver.write_memory(STATUS, &[0xff]);
}

fn write_sector(driver: &mut Driver, sector: u64, fill: u8) {
    driver.write_memory(DATA, &[fill; 512]);
    header(driver, 1, sector);
    driver.request(
        0,
        &[
            Part::Out(HEADER, 16),
            Part::Out(DATA, 512),
            Part::In(STATUS, 1),
        ],
    );
    assert_eq!(driver.read_memory(STATUS, 1), [0]);
}

fn read_sector(driver: &mut Driver, sector: u64, to: u64) -> Vec<u8> {
    header(driver, 0, sector);
    driver.request(
        0,
        &[
            Part::Out(HEADER, 16),
            Part::In(to, 512),
            Part::In(STATUS, 1),
        ],
    );
    assert_eq!(driver.read_memory(STATUS, 1), [0]);
    driver.read_memory(to, 512)
}

fn taken(disk: &VhostUser<Memory>) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    disk.take_log(|start, words| {
        for (index, word) in (0..).zip(words) {
            let first = start / 4096 + index * 64;
            pages.extend(
                (0..64)
                    .filter(|bit| word >> bit & 1 == 1)
                    .map(|bit| first + bit),
            );
        }
    });
    pages
}

#[test]
fn a_disk_is_what_its_back_end_says() {
    let back_end = BackEnd::start(Behavior::default());
    let (mut driver, disk) = guest(&back_end);
    assert_eq!(disk.sectors(), SECTORS as u64);
    assert_eq!(driver.get(0x08), 2);
    // Neither MQ nor the features between front end and back end are offered to the driver.
    assert_eq!(
        driver.offered(),
        VERSION_1 | EVENT_INDEX | FLUSH | WRITE_CACHE
    );
    let capacity = driver.config::<8>(0);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS as u64);
    assert_eq!(driver.config::<1>(60), [0]);
    // The back end does not know guest memory before DRIVER_OK.
    assert!(back_end.bodies(SET_MEM_TABLE).is_empty());
}

#[test]
fn a_driver_writes_and_reads_through_the_back_end() {
    for features in [0, EVENT_INDEX] {
        let back_end = BackEnd::start(Behavior::default());
        let (mut driver, _disk) = guest(&back_end);
        driver.start(features);
        // More requests than the ring has entries.
        for sector in 0..40_u8 {
            let fill = sector + 1;
            write_sector(&mut driver, sector.into(), fill);
            assert_eq!(back_end.seen().disk[usize::from(sector) * 512], fill);
            let found = read_sector(&mut driver, sector.into(), HIGH + 0x1000);
            assert_eq!(found, [fill; 512]);
        }
        let features = u64::from_ne_bytes(back_end.bodies(SET_FEATURES)[0][..].try_into().unwrap());
        assert_eq!(features & LOG_ALL, 0);
    }
}

#[test]
fn a_disk_goes_on_where_it_was_paused_and_after_a_reset_from_its_beginning() {
    let back_end = BackEnd::start(Behavior::default());
    let (mut driver, disk) = guest(&back_end);
    driver.start(EVENT_INDEX);
    for round in 1..6_u8 {
        write_sector(&mut driver, 7, round);
        driver.device.pause();
        driver.device.pause();
        // A request that is made during the pause waits.
        driver.write_memory(DATA, &[round + 100; 512]);
        header(&driver, 1, 8);
        let parts = [
            Part::Out(HEADER, 16),
            Part::Out(DATA, 512),
            Part::In(STATUS, 1),
        ];
        let head = driver.add(0, &parts);
        driver.notify(0);
        assert_eq!(driver.used(0), None);
        let saved = driver.device.save().unwrap();
        let done = u16::from(round) * 2 - 1;
        assert_eq!(saved.transport.queues[0].next_available, done);
        assert_eq!(saved.transport.queues[0].next_used, done);
        driver.device.resume();
        driver.device.resume();
        assert_eq!(driver.wait_used(0).0, head);
        assert_eq!(back_end.seen().disk[8 * 512], round + 100);
    }
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
    driver.start(0);
    write_sector(&mut driver, 9, 9);
    disk.check_connected().unwrap();
    assert_eq!(back_end.bodies(SET_MEM_TABLE).len(), 1);
}

#[test]
fn the_write_cache_is_switched_by_the_driver_and_back_by_a_reset() {
    let back_end = BackEnd::start(Behavior::default());
    let (mut driver, _disk) = guest(&back_end);
    driver.start(FLUSH | WRITE_CACHE);
    assert_eq!(driver.config::<1>(32), [1]);
    driver.device_write(0x100 + 32, &[0]);
    assert_eq!(driver.config::<1>(32), [0]);
    driver.device_write(0x100 + 32, &[2]);
    driver.device_write(0x100, &[1; 8]);
    assert_eq!(driver.config::<1>(32), [0]);
    driver.device.pause();
    let other = BackEnd::start(Behavior::default());
    let (mut driver, _disk) = moved(driver, &other);
    driver.device.resume();
    assert_eq!(driver.config::<1>(32), [0]);
    driver.set(0x70, 0);
    assert_eq!(driver.config::<1>(32), [1]);
    driver.start(WRITE_CACHE);
    let values = |back_end: &BackEnd| -> Vec<u8> {
        let bodies = back_end.bodies(SET_CONFIG);
        bodies.iter().map(|body| body[12]).collect()
    };
    assert_eq!(values(&back_end), [1, 0]);
    assert_eq!(values(&other), [0, 1]);
}

#[test]
fn what_the_back_end_writes_is_in_the_log_while_there_is_one() {
    // Sizes of the replies of DPDK, libvhost-user and rust-vmm.
    for log_answer in [0, 8, 16] {
        let back_end = BackEnd::start(Behavior {
            log_answer,
            ..Behavior::default()
        });
        let (mut driver, disk) = guest(&back_end);
        driver.start(EVENT_INDEX);
        read_sector(&mut driver, 1, DATA);
        assert!(taken(&disk).is_empty(), "logging is not enabled");
        disk.can_log().unwrap();
        disk.start_log().unwrap();
        for round in 0..20 {
            let to = HIGH + 0xf00 + round * 0x3000;
            read_sector(&mut driver, round, to);
            if round % 3 == 0 {
                driver.device.pause();
                driver.device.resume();
            }
            if round % 4 == 3 {
                driver.device.pause();
                let written = std::mem::take(&mut back_end.seen().written);
                assert!(written.contains(&(to / 4096)) && written.contains(&((to + 511) / 4096)));
                let taken = taken(&disk);
                assert!(taken.is_superset(&written), "{taken:x?} {written:x?}");
                // The only additional page may be the used ring, which the front end marks when it stops the queue.
                let used = driver.rings[0].used() / 4096;
                let more: Vec<_> = taken.difference(&written).copied().collect();
                assert!(more.is_empty() || more == [used], "{more:x?}");
                driver.device.resume();
            }
        }
        // The driver does not notice when logging is disabled and enabled again.
        disk.stop_log().unwrap();
        disk.stop_log().unwrap();
        back_end.seen().written.clear();
        read_sector(&mut driver, 1, DATA);
        assert!(back_end.seen().written.is_empty());
        assert!(taken(&disk).is_empty());
        disk.start_log().unwrap();
        read_sector(&mut driver, 1, DATA);
        driver.device.pause();
        let taken = taken(&disk);
        assert!(taken.contains(&(DATA / 4096)), "{taken:x?}");
        assert!(
            taken.contains(&(driver.rings[0].used() / 4096)),
            "{taken:x?}"
        );
    }
}

/// This happens at a migration source whose migration fails after it has paused the guest.
#[test]
fn a_log_that_ends_while_the_disk_is_paused_is_not_written_to_after_it() {
    let back_end = BackEnd::start(Behavior::default());
    let (mut driver, disk) = guest(&back_end);
    driver.start(EVENT_INDEX);
    disk.start_log().unwrap();
    read_sector(&mut driver, 1, DATA);
    driver.device.pause();
    assert!(taken(&disk).contains(&(DATA / 4096)));
    disk.stop_log().unwrap();
    back_end.seen().written.clear();
    driver.device.resume();
    read_sector(&mut driver, 1, HIGH);
    assert!(back_end.seen().written.is_empty());
    write_sector(&mut driver, 2, 2);
    assert_eq!(back_end.seen().disk[2 * 512], 2);
}

#[test]
fn a_log_that_began_before_the_driver_was_ready_is_used() {
    let back_end = BackEnd::start(Behavior::default());
    let (mut driver, disk) = guest(&back_end);
    disk.start_log().unwrap();
    assert!(back_end.bodies(SET_LOG_BASE).is_empty());
    driver.start(0);
    read_sector(&mut driver, 3, HIGH);
    driver.device.pause();
    assert!(taken(&disk).contains(&(HIGH / 4096)));
}

#[test]
fn a_guest_moves_to_another_back_end_with_a_request_that_nobody_began() {
    let back_end = BackEnd::start(Behavior::default());
    let (mut driver, _disk) = guest(&back_end);
    driver.start(EVENT_INDEX);
    for sector in 0..21 {
        write_sector(&mut driver, sector, 1);
    }
    driver.device.pause();
    let parts = [
        Part::Out(HEADER, 16),
        Part::Out(DATA, 512),
        Part::In(STATUS, 1),
    ];
    header(&driver, 1, 99);
    let head = driver.add(0, &parts);
    let other = BackEnd::start(Behavior::default());
    let (mut driver, _disk) = moved(driver, &other);
    // Before the guest resumes, the new back end has guest memory but no queue.
    assert_eq!(other.bodies(SET_MEM_TABLE).len(), 1);
    assert!(other.bodies(SET_VRING_BASE).is_empty() && other.bodies(SET_VRING_KICK).is_empty());
    driver.device.resume();
    assert_eq!(driver.wait_used(0).0, head);
    assert_eq!(other.seen().disk[99 * 512], 1);
    assert_eq!(back_end.seen().disk[99 * 512], 0);
    assert_eq!(other.bodies(SET_VRING_BASE)[0][4..], 21_u32.to_ne_bytes());
    for sector in 0..21 {
        write_sector(&mut driver, sector, 2);
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let back_end = BackEnd::start(Behavior::default());
    let (driver, disk) = guest(&back_end);
    driver.device.pause();
    let saved = driver.device.save().unwrap();
    let refused = |saved: &VirtioSnapshot| {
        let (interrupt, _line) = interrupt();
        let refused = MmioTransport::restore_vhost_user("_disk0", &disk, interrupt, saved);
        refused.err().unwrap().to_string()
    };
    let mut larger = saved.clone();
    larger.device = DeviceState::new(&VhostUserSnapshot {
        sectors: 1,
        write_back: true,
    });
    assert!(
        refused(&larger).contains("the saved disk has 1 sectors"),
        "{}",
        refused(&larger)
    );
    let mut other = saved.clone();
    // Both states belong to the same device type, so only their field numbers differ.
    other.device = DeviceState::new(&BlockSnapshot {
        sectors: SECTORS as u64,
        id: Vec::new(),
    });
    assert!(refused(&other).contains("missing value at index 2"));
    let mut features = saved;
    features.transport.status = RUNNING;
    features.transport.driver_features = VERSION_1 | 1 << 12;
    assert!(refused(&features).contains("features 0x1000"));
}
