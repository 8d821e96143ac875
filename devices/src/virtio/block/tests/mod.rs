//! A block device and its driver. The tests compare what the driver sees with the image file.

mod ranges;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::testing::*;
use super::super::{DeviceState, MmioTransport};
use super::*;
use crate::rate_limit::Rate;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const HEADER: u64 = DATA - 0x1000;
const STATUS: u64 = DATA - 0x800;
const SECTORS: u64 = 256;

/// Image content. Each sector begins with its own number.
fn pattern() -> Vec<u8> {
    (0..SECTORS)
        .flat_map(|sector| {
            let mut bytes = [0x5a; 512];
            bytes[..8].copy_from_slice(&sector.to_le_bytes());
            bytes
        })
        .collect()
}

fn image() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern()).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Opens the same file again, with a file position of its own.
fn reopen(file: &File) -> File {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn disk(file: File, access: Access) -> Block {
    Block::new(BlockOptions {
        file,
        access,
        id: "ferry-disk-0".into(),
        rate_limit: RateLimit::default(),
    })
    .unwrap()
}

const FLUSH: u64 = 1 << 9;

fn started(file: &File, access: Access) -> Driver {
    let file = reopen(file);
    let mut driver = Driver::new(|_| Box::new(disk(file, access)));
    driver.start(FLUSH);
    driver
}

impl Driver {
    fn header(&self, kind: u32, sector: u64) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.write_memory(HEADER, &header);
        self.write_memory(STATUS, &[0xee]);
    }

    /// Sends a request with `parts` as data, and returns its status.
    fn block(&mut self, kind: u32, sector: u64, parts: &[Part]) -> u8 {
        self.header(kind, sector);
        let mut all = vec![Part::Out(HEADER, 16)];
        all.extend(parts);
        all.push(Part::In(STATUS, 1));
        self.request(0, &all);
        self.read_memory(STATUS, 1)[0]
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.write_memory(DATA, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.block(kind, 0, &[Part::Out(DATA, len)])
    }
}

#[test]
fn what_is_written_is_in_the_file_and_read_back() {
    let file = image();
    let mut driver = started(&file, Access::ReadWrite);
    driver.write_memory(DATA, &[0xa1; 1024]);
    driver.write_memory(DATA + 0x1000, &[0xb2; 512]);
    // The sizes of the three buffers are no multiples of a sector.
    let parts = [
        Part::Out(DATA, 700),
        Part::Out(DATA + 700, 324),
        Part::Out(DATA + 0x1000, 512),
    ];
    assert_eq!(driver.block(1, 10, &parts), OK);
    assert_eq!(driver.block(4, 0, &[]), OK);
    let mut expected = pattern();
    expected[5120..6144].fill(0xa1);
    expected[6144..6656].fill(0xb2);
    assert_eq!(content(&file), expected);
    let parts = [Part::In(DATA + 0x2000, 1), Part::In(DATA + 0x3000, 2047)];
    assert_eq!(driver.block(0, 9, &parts), OK);
    let mut read = driver.read_memory(DATA + 0x2000, 1);
    read.extend(driver.read_memory(DATA + 0x3000, 2047));
    assert_eq!(read, expected[4608..6656]);
    let counters = driver.device.counters();
    assert!(counters.contains(&("write_bytes", 1536)) && counters.contains(&("read_ops", 1)));
}

#[test]
fn headers_and_status_may_be_anywhere() {
    let file = image();
    let mut driver = started(&file, Access::ReadWrite);
    driver.header(1, 3);
    driver.write_memory(DATA, &driver.read_memory(HEADER + 7, 9));
    driver.write_memory(DATA + 9, &[0xc3; 512]);
    // Header and data share a descriptor.
    driver.request(
        0,
        &[
            Part::Out(HEADER, 7),
            Part::Out(DATA, 521),
            Part::In(STATUS, 1),
        ],
    );
    assert_eq!(driver.read_memory(STATUS, 1), [OK]);
    assert_eq!(content(&file)[1536..2048], [0xc3; 512]);
    driver.header(0, 3);
    // Data and status share a descriptor.
    driver.write_memory(DATA, &[0; 513]);
    assert_eq!(
        driver.request(0, &[Part::Out(HEADER, 16), Part::In(DATA, 513)]),
        513
    );
    assert_eq!(
        driver.read_memory(DATA, 513),
        [[0xc3; 512].as_slice(), &[OK]].concat()
    );
}

#[test]
fn what_is_read_is_marked_in_the_bitmap_and_what_is_written_is_not() {
    let file = image();
    let mut driver = started(&file, Access::ReadWrite);
    let dirty = |driver: &Driver, at: u64| {
        let region = driver.memory.find_region(GuestAddress(at)).unwrap();
        region
            .bitmap()
            .dirty_at(usize::try_from(at - HIGH).unwrap())
    };
    assert_eq!(driver.block(1, 0, &[Part::Out(HIGH, 4096)]), OK);
    assert!(!dirty(&driver, HIGH));
    assert_eq!(driver.block(0, 0, &[Part::In(HIGH + 0x1800, 4096)]), OK);
    let marked = [0, 0x1000, 0x2000, 0x3000].map(|page| dirty(&driver, HIGH + page));
    assert_eq!(marked, [false, true, true, false]);
}

#[test]
fn impossible_requests_are_errors_and_the_disk_lives_on() {
    let file = image();
    let mut driver = started(&file, Access::ReadWrite);
    for (sector, bytes) in [
        // The sector number fits 64 bits, but the byte offset does not.
        (u64::MAX / 2, 512),
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 100),
        (0, 513),
    ] {
        for part in [Part::In(DATA, bytes), Part::Out(DATA, bytes)] {
            let kind = u32::from(matches!(part, Part::Out(..)));
            assert_eq!(
                driver.block(kind, sector, &[part]),
                IO_ERROR,
                "{sector} {bytes}"
            );
        }
    }
    // Requests without data, and with buffers of the wrong direction.
    assert_eq!(driver.block(0, 0, &[]), IO_ERROR);
    assert_eq!(driver.block(1, 0, &[Part::In(DATA, 512)]), IO_ERROR);
    assert_eq!(driver.block(0, 0, &[Part::Out(DATA, 512)]), IO_ERROR);
    assert_eq!(driver.block(99, 0, &[Part::In(DATA, 512)]), UNSUPPORTED);
    assert_eq!(content(&file), pattern());
    assert_eq!(driver.block(0, SECTORS - 1, &[Part::In(DATA, 512)]), OK);
    assert_eq!(driver.read_memory(DATA, 1), [255]);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let file = image();
    let mut driver = started(&file, Access::ReadOnly);
    let offered = driver.offered();
    assert_eq!(offered & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    driver.start(FLUSH | 1 << 5);
    assert_eq!(driver.block(1, 0, &[Part::Out(DATA, 512)]), IO_ERROR);
    for kind in [11, 13] {
        assert_eq!(driver.ranges(kind, &[(0, 8, 0)]), IO_ERROR);
    }
    assert_eq!(content(&file), pattern());
    assert_eq!(driver.block(0, 7, &[Part::In(DATA, 512)]), OK);
    assert_eq!(driver.read_memory(DATA, 1), [7]);
}

#[test]
fn a_file_that_becomes_too_short_is_an_error_until_it_is_long_again() {
    let file = image();
    let mut driver = started(&file, Access::ReadWrite);
    file.set_len(1024).unwrap();
    assert_eq!(driver.block(0, 1, &[Part::In(DATA, 1024)]), IO_ERROR);
    assert_eq!(driver.block(0, 8, &[Part::In(DATA, 512)]), IO_ERROR);
    assert_eq!(driver.block(0, 1, &[Part::In(DATA, 512)]), OK);
    file.set_len(SECTORS * 512).unwrap();
    assert_eq!(driver.block(0, 8, &[Part::In(DATA, 512)]), OK);
    assert!(driver.device.counters().contains(&("errors", 2)));
}

#[test]
fn a_file_that_refuses_writes_is_an_error() {
    // The kernel refuses writes to a sealed file, as it would on a full file system.
    let sealed = memfd_create("image", MemfdFlags::ALLOW_SEALING).unwrap();
    let mut file = File::from(sealed);
    file.write_all(&pattern()).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    let mut driver = started(&file, Access::ReadWrite);
    assert_eq!(driver.block(1, 0, &[Part::Out(DATA, 512)]), IO_ERROR);
    assert_eq!(driver.ranges(11, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(driver.ranges(13, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(driver.block(0, 5, &[Part::In(DATA, 512)]), OK);
    assert_eq!(driver.read_memory(DATA, 1), [5]);
}

#[test]
fn the_last_part_of_a_sector_is_not_seen() {
    let mut file = image();
    file.seek(SeekFrom::End(0)).unwrap();
    file.write_all(&[1; 511]).unwrap();
    let mut driver = started(&file, Access::ReadWrite);
    assert_eq!(driver.config::<8>(0), SECTORS.to_le_bytes());
    assert_eq!(driver.block(1, SECTORS, &[Part::Out(DATA, 512)]), IO_ERROR);
    assert_eq!(driver.block(1, SECTORS - 1, &[Part::Out(DATA, 512)]), OK);
    assert_eq!(
        content(&file)[usize::try_from(SECTORS).unwrap() * 512..],
        [1; 511]
    );
    let empty = disk(tempfile::tempfile().unwrap(), Access::ReadWrite);
    assert_eq!(empty.sectors(), 0);
}

#[test]
fn the_identification_is_padded_and_cut() {
    let file = image();
    let mut driver = started(&file, Access::ReadWrite);
    assert_eq!(driver.block(8, 0, &[Part::In(DATA, 20)]), OK);
    assert_eq!(
        driver.read_memory(DATA, 20),
        b"ferry-disk-0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(driver.block(8, 0, &[Part::In(DATA, 19)]), IO_ERROR);
    let long = Block::new(BlockOptions {
        file: image(),
        access: Access::ReadOnly,
        id: "x".repeat(30),
        rate_limit: RateLimit::default(),
    });
    assert_eq!(long.unwrap().id.len(), 20);
}

#[test]
fn requests_without_header_or_status_need_a_reset() {
    let file = image();
    for parts in [
        vec![Part::Out(HEADER, 15), Part::In(STATUS, 1)],
        vec![Part::In(STATUS, 1)],
        vec![Part::Out(HEADER, 16)],
        vec![Part::Out(HEADER, 16), Part::Out(DATA, 512)],
    ] {
        let mut driver = started(&file, Access::ReadWrite);
        driver.header(1, 0);
        driver.add(0, &parts);
        driver.notify(0);
        driver.wait_needs_reset();
        driver.start(FLUSH);
        assert_eq!(driver.block(0, 1, &[Part::In(DATA, 512)]), OK);
    }
    assert_eq!(content(&file), pattern());
}

#[test]
fn a_batch_is_served_in_order_with_and_without_a_limit() {
    for operations in [
        None,
        Some(Rate {
            per_second: 2000,
            burst: 2,
        }),
    ] {
        let bytes = operations.map(|_| Rate {
            per_second: 10 << 20,
            burst: 1,
        });
        let config = BlockOptions {
            file: reopen(&image()),
            access: Access::ReadWrite,
            id: String::new(),
            rate_limit: RateLimit { bytes, operations },
        };
        let mut driver = Driver::new(|_| Box::new(Block::new(config).unwrap()));
        driver.start(EVENT_INDEX);
        for round in 0..20 {
            driver.header(0, round);
            let heads: Vec<u16> = (0..5)
                .map(|place| {
                    let data = Part::In(DATA + 0x1000 * place, 512);
                    driver.add(0, &[Part::Out(HEADER, 16), data, Part::In(STATUS, 1)])
                })
                .collect();
            driver.notify(0);
            for head in heads {
                assert_eq!(driver.wait_used(0), (head, 513));
            }
            for place in 0..5 {
                let first = driver.read_memory(DATA + 0x1000 * place, 8);
                assert_eq!(first, round.to_le_bytes());
            }
        }
    }
}

#[test]
fn a_guest_moves_with_its_disk() {
    let file = image();
    let mut driver = started(&file, Access::ReadWrite);
    driver.write_memory(DATA, &[9; 512]);
    assert_eq!(driver.block(1, 0, &[Part::Out(DATA, 512)]), OK);
    driver.device.pause();
    // This request is made after the pause, so only the restored device handles it.
    driver.header(0, 0);
    let parts = [
        Part::Out(HEADER, 16),
        Part::In(DATA + 0x1000, 512),
        Part::In(STATUS, 1),
    ];
    let head = driver.add(0, &parts);
    driver.notify(0);
    let saved = driver.device.save().unwrap();
    let mut other = disk(reopen(&file), Access::ReadWrite);
    other.id = b"another".to_vec();
    let mut driver = driver.moved(&saved, |_| Box::new(other));
    driver.device.resume();
    assert_eq!(driver.wait_used(0), (head, 513));
    assert_eq!(driver.read_memory(DATA + 0x1000, 512), [9; 512]);
    assert_eq!(driver.block(8, 0, &[Part::In(DATA, 20)]), OK);
    assert_eq!(driver.read_memory(DATA, 6), b"ferry-");

    let state: BlockSnapshot = saved.device.decode("block").unwrap();
    let mut long = state.clone();
    long.id = vec![0; 21];
    let mut large = state;
    large.sectors += 1;
    for (state, word) in [(long, "21 bytes"), (large, "257 sectors")] {
        let mut saved = saved.clone();
        saved.device = DeviceState::new(&state);
        let model = Box::new(disk(reopen(&file), Access::ReadWrite));
        let (interrupt, _line) = interrupt();
        let result = MmioTransport::restore("_disk0", model, memory(), interrupt, &saved);
        let error = result.err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
    // The guest uses a feature of writable disks, so a read-only disk cannot take its place.
    let mut writer = saved.clone();
    writer.transport.driver_features |= 1 << 13;
    let model = Box::new(disk(reopen(&file), Access::ReadOnly));
    let (interrupt, _line) = interrupt();
    let result = MmioTransport::restore("_disk0", model, memory(), interrupt, &writer);
    assert!(result.err().unwrap().to_string().contains("features"));
}

#[test]
fn a_reset_in_the_middle_leaves_the_memory_alone() {
    let mut file = image();
    let mut driver = started(&file, Access::ReadWrite);
    for _ in 0..50 {
        driver.header(0, 0);
        for place in 0..5 {
            let data = Part::In(DATA + 0x1000 * place, 512);
            driver.add(0, &[Part::Out(HEADER, 16), data, Part::In(STATUS, 1)]);
        }
        driver.notify(0);
        driver.set(0x70, 0);
        driver.write_memory(DATA, &[0x77; 0x5000]);
        driver.start(FLUSH);
        assert_eq!(driver.block(4, 0, &[]), OK);
        assert_eq!(driver.read_memory(DATA, 0x5000), [0x77; 0x5000]);
    }
    let mut all = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut all).unwrap();
    assert_eq!(all, pattern());
}
