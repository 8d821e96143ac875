//! The real-time clock of a PC, an MC146818 with 128 bytes of CMOS memory, at ports 0x70 and 0x71.
//!
//! It follows a host clock at a distance that the guest sets. Time is worked out when it is read, so a clock
//! that nobody asks costs nothing. There is no alarm and no interrupt: their enable bits read as zero, and the
//! tables that describe the clock to the guest name no interrupt line.
//!
//! Specification: Motorola MC146818A data sheet; memory-size bytes: IBM AT, and Bochs' memory map beyond it.

use std::time::{SystemTime, UNIX_EPOCH};

use minicbor::{Decode, Encode};

use crate::{BusDevice, PortSpace, SavedState};

/// The index port; the data port is the next.
pub const RTC_PORT: u16 = 0x70;
/// Index and data.
pub const RTC_PORTS: u16 = 2;
/// The CMOS byte that holds the century: `CENTURY` of the FADT.
pub const RTC_CENTURY: u8 = 0x32;

/// Bytes of CMOS memory, clock registers included.
const BYTES: usize = 128;
/// Bit 7 of the index port masks NMIs on a PC, and is no part of the index.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: usize = 0;
const MINUTES: usize = 2;
const HOURS: usize = 4;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const CENTURY: usize = RTC_CENTURY as usize;
const TIME: [usize; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

const REGISTER_A: usize = 0xa;
/// An update begins within 244 µs. Read-only.
const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Divider for 32,768 Hz, periodic rate 1,024 Hz: what a PC's firmware leaves.
const A_RESET: u8 = 0x26;

const REGISTER_B: usize = 0xb;
const B_SET: u8 = 1 << 7;
/// PIE, AIE, UIE and SQWE: nothing is wired to them.
const B_INTERRUPTS: u8 = 0x78;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;

const REGISTER_C: usize = 0xc;
/// An update has ended since this register was read last.
const C_UPDATE_ENDED: u8 = 1 << 4;

const REGISTER_D: usize = 0xd;
/// The battery is good.
const D_VALID: u8 = 1 << 7;

/// Bit 7 of the hours in 12-hour mode.
const PM: u8 = 1 << 7;

const MICROSECONDS: i64 = 1_000_000;
/// How long before an update the clock says so, in microseconds.
const UPDATE_WARNING: i64 = 244;
const DAY_SECONDS: i64 = 86_400;

/// A clock of the host.
pub type HostClock = Box<dyn Fn() -> SystemTime + Send>;

/// A saved state that no clock can have been in.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RtcError {
    /// The CMOS memory has another size.
    #[error("RTC state: cmos has {0} bytes, not {BYTES}")]
    Cmos(usize),
    /// An index that the index port cannot hold.
    #[error("RTC state: index is {0}, at most {INDEX_MASK} is possible")]
    Index(u8),
    /// A time beyond all calendars.
    #[error("RTC state: offset_us is {0}, more than {OFFSET_LIMIT} from the host's clock")]
    Offset(i64),
}

/// Further from the host's clock than the four digits of a year reach, in microseconds.
const OFFSET_LIMIT: i64 = 20_000 * 366 * DAY_SECONDS * MICROSECONDS;

/// The state of a clock.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RtcSnapshot {
    /// Which byte the data port shows, 0 to 127.
    #[n(0)]
    pub index: u8,
    /// The CMOS memory, 128 bytes. The time in it counts only while the guest sets it.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub cmos: Vec<u8>,
    /// How far the guest's clock is ahead of UTC, in microseconds.
    #[n(2)]
    pub offset_us: i64,
    /// The second, since 1970 by the guest's clock, of the last update that the guest was told of.
    #[n(3)]
    pub update_seen_s: i64,
}

impl SavedState for RtcSnapshot {
    const VERSION: u16 = 1;
}

/// How much RAM the CMOS memory says there is, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct RtcMemory {
    /// Below the hole below 4 GiB.
    pub low: u64,
    /// From 4 GiB on.
    pub high: u64,
}

/// A real-time clock.
pub struct Rtc {
    host: HostClock,
    index: u8,
    cmos: [u8; BYTES],
    offset_us: i64,
    update_seen_s: i64,
}

impl Rtc {
    /// A clock that shows the time of `host` (UTC), in BCD and 24 hours, as a PC's firmware leaves it.
    #[must_use]
    pub fn new(memory: RtcMemory, host: HostClock) -> Self {
        let mut cmos = [0; BYTES];
        cmos[REGISTER_A] = A_RESET;
        cmos[REGISTER_B] = B_24_HOURS;
        write_memory_sizes(&mut cmos, memory);
        let mut rtc = Self {
            host,
            index: 0,
            cmos,
            offset_us: 0,
            update_seen_s: 0,
        };
        rtc.update_seen_s = rtc.second();
        rtc
    }

    /// A clock as it was saved, on another host's clock: while it was away, time went on.
    ///
    /// # Errors
    /// A state that no clock can have been in.
    pub fn restore(saved: &RtcSnapshot, host: HostClock) -> Result<Self, RtcError> {
        let cmos = <[u8; BYTES]>::try_from(saved.cmos.as_slice())
            .map_err(|_| RtcError::Cmos(saved.cmos.len()))?;
        if saved.index > INDEX_MASK {
            return Err(RtcError::Index(saved.index));
        }
        if saved.offset_us.unsigned_abs() > OFFSET_LIMIT.unsigned_abs() {
            return Err(RtcError::Offset(saved.offset_us));
        }
        Ok(Self {
            host,
            index: saved.index,
            cmos,
            offset_us: saved.offset_us,
            update_seen_s: saved.update_seen_s,
        })
    }

    /// Its state.
    #[must_use]
    pub fn save(&self) -> RtcSnapshot {
        RtcSnapshot {
            index: self.index,
            cmos: self.cmos.to_vec(),
            offset_us: self.offset_us,
            update_seen_s: self.update_seen_s,
        }
    }

    /// Microseconds since 1970 by the guest's clock.
    fn now_us(&self) -> i64 {
        self.host_us().saturating_add(self.offset_us)
    }

    fn second(&self) -> i64 {
        self.now_us().div_euclid(MICROSECONDS)
    }

    fn host_us(&self) -> i64 {
        // A host whose clock stands before 1970 has none.
        let since = (self.host)().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
    }

    fn is_set(&self, bit_of_b: u8) -> bool {
        self.cmos[REGISTER_B] & bit_of_b != 0
    }

    fn read_byte(&mut self) -> u8 {
        let index = usize::from(self.index);
        match index {
            REGISTER_A => self.cmos[REGISTER_A] | self.update_in_progress(),
            REGISTER_C => self.take_update_ended(),
            REGISTER_D => D_VALID,
            _ => {
                if TIME.contains(&index) {
                    self.latch();
                }
                self.cmos[index]
            }
        }
    }

    fn write_byte(&mut self, value: u8) {
        let index = usize::from(self.index);
        match index {
            REGISTER_A => self.cmos[REGISTER_A] = value & !A_UPDATE_IN_PROGRESS,
            REGISTER_B => self.write_b(value),
            REGISTER_C | REGISTER_D => {}
            _ if TIME.contains(&index) => {
                self.latch();
                self.cmos[index] = value;
                if !self.is_set(B_SET) {
                    self.start();
                }
            }
            _ => self.cmos[index] = value,
        }
    }

    /// The clock stands while SET is one, at the time that it showed when SET became one.
    fn write_b(&mut self, value: u8) {
        self.latch();
        let stood = self.is_set(B_SET);
        self.cmos[REGISTER_B] = value & !B_INTERRUPTS;
        if stood && !self.is_set(B_SET) {
            self.start();
        }
    }

    fn update_in_progress(&self) -> u8 {
        let into_second = self.now_us().rem_euclid(MICROSECONDS);
        match !self.is_set(B_SET) && into_second >= MICROSECONDS - UPDATE_WARNING {
            true => A_UPDATE_IN_PROGRESS,
            false => 0,
        }
    }

    fn take_update_ended(&mut self) -> u8 {
        let second = self.second();
        if self.is_set(B_SET) || second == self.update_seen_s {
            return 0;
        }
        self.update_seen_s = second;
        C_UPDATE_ENDED
    }

    /// Writes the time into its registers, unless the guest is setting it.
    fn latch(&mut self) {
        if self.is_set(B_SET) {
            return;
        }
        let second = self.second();
        let (days, of_day) = (
            second.div_euclid(DAY_SECONDS),
            second.rem_euclid(DAY_SECONDS),
        );
        let (year, month, day) = civil(days);
        let century = year.div_euclid(100);
        // 1 January 1970 was a Thursday; Sunday is 1.
        let weekday = (days + 4).rem_euclid(7) + 1;
        self.cmos[SECONDS] = self.encode(of_day % 60);
        self.cmos[MINUTES] = self.encode(of_day / 60 % 60);
        self.cmos[HOURS] = self.encode_hour(of_day / 3600);
        self.cmos[WEEKDAY] = self.encode(weekday);
        self.cmos[DAY] = self.encode(day);
        self.cmos[MONTH] = self.encode(month);
        self.cmos[YEAR] = self.encode(year.rem_euclid(100));
        self.cmos[CENTURY] = self.encode(century);
    }

    /// Lets the clock run from the time in its registers. Values that no clock shows count on: a 32nd of a
    /// month is the first of the next.
    fn start(&mut self) {
        let field = |register: usize| self.decode(self.cmos[register]);
        let year = field(CENTURY) * 100 + field(YEAR);
        let days = days(year, field(MONTH).clamp(1, 12), field(DAY));
        let of_day = self.decode_hour(self.cmos[HOURS]) * 3600 + field(MINUTES) * 60;
        let second = days * DAY_SECONDS + of_day + field(SECONDS);
        self.offset_us = (second * MICROSECONDS)
            .saturating_sub(self.host_us())
            .clamp(-OFFSET_LIMIT, OFFSET_LIMIT);
        self.update_seen_s = second;
    }

    /// `value` is 0 to 99.
    fn encode(&self, value: i64) -> u8 {
        let value = u8::try_from(value.clamp(0, 99)).unwrap_or(0);
        match self.is_set(B_BINARY) {
            true => value,
            false => ((value / 10) << 4) | (value % 10),
        }
    }

    fn decode(&self, value: u8) -> i64 {
        let value = i64::from(value);
        match self.is_set(B_BINARY) {
            true => value,
            false => (value >> 4) * 10 + (value & 0xf),
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.is_set(B_24_HOURS) {
            return self.encode(hour);
        }
        let of_half = match hour % 12 {
            0 => 12,
            hour => hour,
        };
        self.encode(of_half) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.is_set(B_24_HOURS) {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }
}

impl BusDevice<PortSpace> for Rtc {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            // The index port cannot be read on a PC.
            *first = if offset == 1 { self.read_byte() } else { 0xff };
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        match (offset, data.first()) {
            (0, Some(index)) => self.index = index & INDEX_MASK,
            (1, Some(value)) => self.write_byte(*value),
            _ => {}
        }
    }
}

/// Where firmware and boot loaders look: KiB below 1 MiB (0x15), KiB from 1 MiB on (0x17, again 0x30), units of
/// 64 KiB from 16 MiB on (0x34) and from 4 GiB on (0x5b).
fn write_memory_sizes(cmos: &mut [u8; BYTES], memory: RtcMemory) {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    let mut put = |index: usize, bytes: usize, value: u64, most: u64| {
        cmos[index..index + bytes].copy_from_slice(&value.min(most).to_le_bytes()[..bytes]);
    };
    put(0x15, 2, 640, 640);
    for index in [0x17, 0x30] {
        put(index, 2, memory.low.saturating_sub(MIB) / KIB, 0xffff);
    }
    let units = memory.low.saturating_sub(16 * MIB) / (64 * KIB);
    put(0x34, 2, units, 0xffff);
    put(0x5b, 3, memory.high / (64 * KIB), 0xff_ffff);
}

/// Days from 1 January 1970 to a day of the Gregorian calendar. Years begin in March here, so that a leap day
/// is a year's last: then months have a linear number of days, as in H. Hinnant, "chrono-Compatible Low-Level
/// Date Algorithms".
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let of_year = (153 * month + 2) / 5 + day - 1;
    // 1 March of the year 0 is that many days before 1970.
    year * 365 + leap_days + of_year - 719_468
}

/// The year, month and day that are `days` after 1 January 1970: the inverse of [`days`].
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year_of_era;
    match month {
        0..10 => (year, month + 3, day),
        _ => (year + 1, month - 9, day),
    }
}

#[cfg(test)]
mod tests {
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

    /// A host's clock that stands until it is moved.
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

    /// Century, year, month, day, hours, minutes, seconds, day of the week.
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
        // Midnight and noon are twelve.
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
        assert_eq!(time(&mut rtc)[..7], wanted, "it stands while it is set");
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
        assert_eq!(get(&mut rtc, 0), 0x58, "not over yet");
        hand.advance(244);
        assert_eq!((get(&mut rtc, 0xa), get(&mut rtc, 0)), (A_RESET, 0x59));
        assert_eq!(get(&mut rtc, 0xc), C_UPDATE_ENDED);
        assert_eq!(get(&mut rtc, 0xc), 0, "told once");
    }

    #[test]
    fn registers_keep_what_a_guest_may_write_and_nothing_else() {
        let mut rtc = Rtc::new(MEMORY, Hand::at(LEAP_DAY_US).clock());
        set(&mut rtc, 0xa, 0xff);
        assert_eq!(get(&mut rtc, 0xa), 0x7f);
        set(&mut rtc, 0xb, 0x7f);
        assert_eq!(get(&mut rtc, 0xb), 0x07, "no interrupts");
        set(&mut rtc, 0xc, 0xff);
        set(&mut rtc, 0xd, 0);
        assert_eq!((get(&mut rtc, 0xc), get(&mut rtc, 0xd)), (0, D_VALID));
        // The NMI mask is no part of the index, and CMOS memory is memory.
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

    #[test]
    fn the_calendar_is_its_own_inverse_for_ten_thousand_years() {
        let mut last = civil(-719_528);
        assert_eq!(last, (0, 1, 1));
        for day in -719_527..2_932_897 {
            let date = civil(day);
            assert_eq!(days(date.0, date.1, date.2), day);
            assert!(date > last, "{date:?} after {last:?}");
            last = date;
        }
        assert_eq!(last, (9999, 12, 31));
    }
}
