//! The clock, driven through its ports by a host clock that the test moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;

const MEMORY: RtcMemory = RtcMemory {
    low: 3 << 30,
    high: 2 << 30,
};
/// 29 February 2024, 23:59:58.5 UTC, a Thursday: date -u -d '2024-02-29 23:59:58' +%s.
const LEAP_DAY_US: u64 = 1_709_251_198_500_000;

/// Host clock that stands still until the test advances it.
#[derive(Clone, Default)]
struct Hand(Arc<AtomicU64>);

impl Hand {
    fn at(us: u64) -> Self {
        Self(Arc::new(AtomicU64::new(us)))
    }
    fn advance(&self, us: u64) {
        self.0.fetch_add(us, Ordering::Relaxed);
    }
    fn clock(&self) -> HostClock {
        let hand = Arc::clone(&self.0);
        Box::new(move || UNIX_EPOCH + Duration::from_micros(hand.load(Ordering::Relaxed)))
    }
}

fn get(rtc: &mut Rtc, index: u8) -> u8 {
    rtc.write(0, &[index]);
    let mut byte = [0xaa];
    rtc.read(1, &mut byte);
    byte[0]
}

fn set(rtc: &mut Rtc, index: u8, value: u8) {
    rtc.write(0, &[index]);
    rtc.write(1, &[value]);
}

/// Reads the century, year, month, day, hours, minutes, seconds and day of the week.
fn time(rtc: &mut Rtc) -> [u8; 8] {
    [0x32, 9, 8, 7, 4, 2, 0, 6].map(|index| get(rtc, index))
}

#[test]
fn time_is_the_hosts_and_goes_over_a_leap_day() {
    let hand = Hand::at(LEAP_DAY_US);
    let mut rtc = Rtc::new(MEMORY, hand.clock());
    let before = [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58, 5];
    assert_eq!(time(&mut rtc), before);
    hand.advance(1_500_000);
    let after = [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00, 6];
    assert_eq!(time(&mut rtc), after);
}

#[test]
fn every_encoding_says_the_same_time() {
    let mut rtc = Rtc::new(MEMORY, Hand::at(LEAP_DAY_US).clock());
    for (mode, hours, minutes) in [
        (B_24_HOURS, 0x23, 0x59),
        (B_24_HOURS | B_BINARY, 23, 59),
        (0, 0x11 | PM, 0x59),
        (B_BINARY, 11 | PM, 59),
    ] {
        set(&mut rtc, 0xb, mode);
        assert_eq!((get(&mut rtc, 4), get(&mut rtc, 2)), (hours, minutes));
    }
    // Midnight and noon are shown as 12.
    for (hours, shown) in [(0_u64, 12), (12, 12 | PM), (1, 1), (13, 1 | PM)] {
        let us = hours * 3_600_000_000;
        let mut rtc = Rtc::new(MEMORY, Hand::at(us).clock());
        set(&mut rtc, 0xb, B_BINARY);
        assert_eq!(get(&mut rtc, 4), shown);
    }
}

#[test]
fn a_time_that_was_set_runs_on() {
    let hand = Hand::at(LEAP_DAY_US);
    let mut rtc = Rtc::new(MEMORY, hand.clock());
    set(&mut rtc, 0xb, B_SET | B_24_HOURS);
    let wanted = [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59];
    for (index, value) in [0x32, 9, 8, 7, 4, 2, 0].into_iter().zip(wanted) {
        set(&mut rtc, index, value);
    }
    hand.advance(5_000_000);
    assert_eq!(
        time(&mut rtc)[..7],
        wanted,
        "the clock stops while SET is 1"
    );
    set(&mut rtc, 0xb, B_24_HOURS);
    assert_eq!(time(&mut rtc)[..7], wanted);
    hand.advance(1_000_000);
    // 1 January 2000 was a Saturday.
    assert_eq!(time(&mut rtc), [0x20, 0, 1, 1, 0, 0, 0, 7]);
}

#[test]
fn an_update_is_announced_and_told() {
    let hand = Hand::at(LEAP_DAY_US);
    let mut rtc = Rtc::new(MEMORY, hand.clock());
    assert_eq!(get(&mut rtc, 0xa), A_RESET);
    hand.advance(500_000 - 245);
    assert_eq!(get(&mut rtc, 0xa), A_RESET);
    assert_eq!(get(&mut rtc, 0xc), 0);
    hand.advance(1);
    assert_eq!(get(&mut rtc, 0xa), A_RESET | A_UPDATE_IN_PROGRESS);
    assert_eq!(get(&mut rtc, 0), 0x58, "the second has not ended");
    hand.advance(244);
    assert_eq!((get(&mut rtc, 0xa), get(&mut rtc, 0)), (A_RESET, 0x59));
    assert_eq!(get(&mut rtc, 0xc), C_UPDATE_ENDED);
    assert_eq!(get(&mut rtc, 0xc), 0, "the flag is cleared by a read");
}

#[test]
fn registers_keep_what_a_guest_may_write_and_nothing_else() {
    let mut rtc = Rtc::new(MEMORY, Hand::at(LEAP_DAY_US).clock());
    set(&mut rtc, 0xa, 0xff);
    assert_eq!(get(&mut rtc, 0xa), 0x7f);
    set(&mut rtc, 0xb, 0x7f);
    assert_eq!(
        get(&mut rtc, 0xb),
        0x07,
        "the interrupt enable bits read as 0"
    );
    set(&mut rtc, 0xc, 0xff);
    set(&mut rtc, 0xd, 0);
    assert_eq!((get(&mut rtc, 0xc), get(&mut rtc, 0xd)), (0, D_VALID));
    // The NMI mask is not part of the index, and the rest of the CMOS memory keeps what is written to it.
    set(&mut rtc, 0x80 | 0x40, 0x5a);
    assert_eq!(get(&mut rtc, 0x40), 0x5a);
    let mut wide = [0xaa; 4];
    rtc.read(1, &mut wide);
    assert_eq!(wide, [0x5a, 0, 0, 0]);
    rtc.read(0, &mut wide);
    assert_eq!(wide, [0xff, 0, 0, 0]);
}

#[test]
fn any_bytes_make_some_time() {
    let hand = Hand::at(LEAP_DAY_US);
    for value in [0, 0x7f, 0x99, 0xff] {
        for mode in [0, B_BINARY, B_24_HOURS, B_BINARY | B_24_HOURS] {
            let mut rtc = Rtc::new(MEMORY, hand.clock());
            set(&mut rtc, 0xb, B_SET | mode);
            TIME.iter()
                .for_each(|index| set(&mut rtc, u8::try_from(*index).unwrap(), value));
            set(&mut rtc, 0xb, mode);
            let shown = time(&mut rtc);
            let other = Rtc::restore(&rtc.save(), hand.clock());
            assert_eq!(time(&mut other.unwrap()), shown);
        }
    }
}

#[test]
fn memory_sizes_are_where_loaders_look() {
    let mut rtc = Rtc::new(MEMORY, Hand::default().clock());
    let mut word = |index| u16::from_le_bytes([get(&mut rtc, index), get(&mut rtc, index + 1)]);
    assert_eq!(word(0x15), 640);
    assert_eq!((word(0x17), word(0x30)), (0xffff, 0xffff));
    assert_eq!(u64::from(word(0x34)) << 16, (3 << 30) - (16 << 20));
    assert_eq!(u64::from(word(0x5b)) << 16, 2 << 30);
    let small = RtcMemory {
        low: 8 << 20,
        high: 0,
    };
    let mut rtc = Rtc::new(small, Hand::default().clock());
    let mut word = |index| u16::from_le_bytes([get(&mut rtc, index), get(&mut rtc, index + 1)]);
    assert_eq!((word(0x17), word(0x34), word(0x5b)), (7 << 10, 0, 0));
}

#[test]
fn a_saved_clock_keeps_its_distance() {
    let hand = Hand::at(LEAP_DAY_US);
    let mut rtc = Rtc::new(MEMORY, hand.clock());
    set(&mut rtc, 4, 0x11);
    set(&mut rtc, 0x40, 7);
    let saved = rtc.save();
    hand.advance(3_600_000_000);
    let mut other = Rtc::restore(&saved, hand.clock()).unwrap();
    assert_eq!((get(&mut other, 4), get(&mut other, 0x40)), (0x12, 7));
}

#[test]
fn impossible_states_are_refused_by_field() {
    let hand = Hand::default();
    let saved = Rtc::new(MEMORY, hand.clock()).save();
    let mut broken = [saved.clone(), saved.clone(), saved];
    broken[0].cmos.pop();
    broken[1].index = 128;
    broken[2].offset_us = i64::MIN;
    for (state, field) in broken.iter().zip(["cmos", "index", "offset_us"]) {
        let error = Rtc::restore(state, hand.clock()).err().unwrap();
        assert!(error.to_string().contains(field), "{error}");
    }
}
