//! Requests on ranges of sectors: discard and write zeroes.

use super::*;

/// Images on the file systems that every test host has: that of the temporary directory, and tmpfs.
fn files() -> [File; 2] {
    let mut memory = File::from(memfd_create("image", MemfdFlags::empty()).unwrap());
    memory.write_all(&pattern()).unwrap();
    [image(), memory]
}

#[test]
fn discarded_ranges_go_back_to_the_host() {
    for file in files() {
        let mut driver = started(&file, Access::ReadWrite);
        rustix::fs::fsync(&file).unwrap();
        let before = file.metadata().unwrap().blocks();
        assert_eq!(driver.ranges(11, &[(8, 64, 0), (128, 64, 0)]), OK);
        assert!(file.metadata().unwrap().blocks() <= before - 128);
        let mut expected = pattern();
        expected[8 * 512..72 * 512].fill(0);
        expected[128 * 512..192 * 512].fill(0);
        assert_eq!(content(&file), expected);
    }
}

#[test]
fn zeroes_are_written_and_stay_allocated_unless_they_need_not() {
    for file in files() {
        let mut driver = started(&file, Access::ReadWrite);
        rustix::fs::fsync(&file).unwrap();
        let before = file.metadata().unwrap().blocks();
        assert_eq!(driver.ranges(13, &[(8, 64, 0)]), OK);
        let mut expected = pattern();
        expected[8 * 512..72 * 512].fill(0);
        assert_eq!(content(&file), expected);
        assert_eq!(file.metadata().unwrap().blocks(), before);
        assert_eq!(driver.ranges(13, &[(8, 64, 1)]), OK);
        assert_eq!(content(&file), expected);
        assert!(file.metadata().unwrap().blocks() <= before - 64);
    }
}

#[test]
fn ranges_are_checked_before_any_is_touched() {
    let file = image();
    let mut driver = started(&file, Access::ReadWrite);
    let good = (0, 8, 0);
    for (kind, second, status) in [
        (11, (SECTORS - 1, 2, 0), IO_ERROR),
        (11, (u64::MAX, 1, 0), IO_ERROR),
        (11, (0, 0, 0), IO_ERROR),
        (11, (0, u32::MAX, 0), IO_ERROR),
        (11, (0, 8, 1), UNSUPPORTED),
        (13, (SECTORS, 1, 1), IO_ERROR),
        (13, (0, 8, 2), UNSUPPORTED),
    ] {
        assert_eq!(driver.ranges(kind, &[good, second]), status, "{second:?}");
    }
    assert_eq!(driver.ranges(11, &[good; 33]), IO_ERROR);
    assert_eq!(driver.block(11, 0, &[Part::Out(DATA, 17)]), IO_ERROR);
    assert_eq!(driver.block(11, 0, &[]), IO_ERROR);
    assert_eq!(content(&file), pattern());
}
