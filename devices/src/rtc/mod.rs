//! Real-time clock of a PC: an MC146818 with 128 bytes of CMOS memory, at ports 0x70 and 0x71.
//!
//! The clock is the host's clock plus an offset that the guest sets. The time is computed when the guest reads it, so
//! an idle clock costs nothing. There is no alarm and no interrupt: their enable bits read as 0, and the ACPI tables
//! name no interrupt line for the clock.
//!
//! Specification: Motorola MC146818A data sheet. The bytes for memory sizes are those of the IBM AT, and beyond it
//! those of Bochs.

mod calendar;
#[cfg(test)]
mod tests;

use std::time::{SystemTime, UNIX_EPOCH};

use minicbor::{Decode, Encode};

use crate::{BusDevice, PortSpace, SavedState};
use calendar::{civil, days};

/// Index port. The data port follows it.
pub const RTC_PORT: u16 = 0x70;
/// Number of ports of the clock: index and data.
pub const RTC_PORTS: u16 = 2;
/// Index of the CMOS byte that holds the century, which is `CENTURY` in the FADT.
pub const RTC_CENTURY: u8 = 0x32;

/// Size of the CMOS memory in bytes, including the clock's registers.
const BYTES: usize = 128;
/// Bits of the index port that are the index. On a PC, bit 7 masks NMIs.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: usize = 0;
const MINUTES: usize = 2;
const HOURS: usize = 4;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const CENTURY: usize = RTC_CENTURY as usize;
/// Registers that hold the time.
const TIME: [usize; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

const REGISTER_A: usize = 0xa;
/// Read-only. Set while the next update of the time begins within 244 µs.
const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Divider for 32,768 Hz and a periodic rate of 1,024 Hz, as a PC's firmware sets them.
const A_RESET: u8 = 0x26;

const REGISTER_B: usize = 0xb;
/// SET: the guest sets the time, and the clock stands still.
const B_SET: u8 = 1 << 7;
/// PIE, AIE, UIE and SQWE. No interrupt or square wave is connected.
const B_INTERRUPTS: u8 = 0x78;
/// DM: values are binary instead of BCD.
const B_BINARY: u8 = 1 << 2;
/// 24/12: hours are 0 to 23.
const B_24_HOURS: u8 = 1 << 1;

const REGISTER_C: usize = 0xc;
/// Set if an update has ended since the last read of this register.
const C_UPDATE_ENDED: u8 = 1 << 4;

const REGISTER_D: usize = 0xd;
/// The battery is good.
const D_VALID: u8 = 1 << 7;

/// Bit 7 of the hours in 12-hour mode.
const PM: u8 = 1 << 7;

const MICROSECONDS: i64 = 1_000_000;
/// Time before an update for which the clock announces it, in microseconds.
const UPDATE_WARNING: i64 = 244;
const DAY_SECONDS: i64 = 86_400;

/// Source of the host's time.
pub type HostClock = Box<dyn Fn() -> SystemTime + Send>;

/// Reason for which a clock could not be restored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RtcError {
    /// The saved CMOS memory has the wrong size.
    #[error("RTC state: cmos has {0} bytes instead of {BYTES}")]
    Cmos(usize),
    /// The saved index does not fit the index port.
    #[error("RTC state: index is {0}, but the maximum is {INDEX_MASK}")]
    Index(u8),
    /// The saved offset is outside of the range of the clock's calendar.
    #[error(
        "RTC state: offset_us is {0}, but the maximum distance from the host's clock is {OFFSET_LIMIT}"
    )]
    Offset(i64),
}

/// Maximum distance from the host's clock, in microseconds. It is more than the four digits of a year can express.
const OFFSET_LIMIT: i64 = 20_000 * 366 * DAY_SECONDS * MICROSECONDS;

/// Saved state of a real-time clock.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RtcSnapshot {
    /// Index of the byte that the data port accesses, 0 to 127.
    #[n(0)]
    pub index: u8,
    /// CMOS memory, 128 bytes. Its time registers are valid only while the guest sets the clock.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub cmos: Vec<u8>,
    /// Offset of the guest's clock from UTC, in microseconds.
    #[n(2)]
    pub offset_us: i64,
    /// Time of the last update that the guest has seen in register C, in seconds since 1970 by the guest's clock.
    #[n(3)]
    pub update_seen_s: i64,
}

impl SavedState for RtcSnapshot {
    const VERSION: u16 = 1;
}

/// Sizes of RAM that firmware finds in the CMOS memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct RtcMemory {
    /// RAM below the hole below 4 GiB.
    pub low: u64,
    /// RAM from 4 GiB on.
    pub high: u64,
}

/// Real-time clock with CMOS memory.
pub struct Rtc {
    host: HostClock,
    index: u8,
    cmos: [u8; BYTES],
    offset_us: i64,
    update_seen_s: i64,
}

impl Rtc {
    /// Creates a clock that shows the time of `host` in UTC, in BCD and 24-hour mode, as a PC's firmware leaves it.
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

    /// Creates a clock from its saved state, with the clock of this host. The guest's time goes on while it is saved.
    ///
    /// # Errors
    /// Returns [`RtcError`] if a field has an invalid value.
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

    /// Returns the state of the clock.
    #[must_use]
    pub fn save(&self) -> RtcSnapshot {
        RtcSnapshot {
            index: self.index,
            cmos: self.cmos.to_vec(),
            offset_us: self.offset_us,
            update_seen_s: self.update_seen_s,
        }
    }

    /// Returns the time of the guest's clock, in microseconds since 1970.
    fn now_us(&self) -> i64 {
        self.host_us().saturating_add(self.offset_us)
    }

    /// Returns the time of the guest's clock, in seconds since 1970.
    fn second(&self) -> i64 {
        self.now_us().div_euclid(MICROSECONDS)
    }

    /// Returns the time of the host's clock, in microseconds since 1970.
    fn host_us(&self) -> i64 {
        // A host clock before 1970 counts as 1970.
        let since = (self.host)().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
    }

    /// Returns whether a bit of register B is set.
    fn is_set(&self, bit_of_b: u8) -> bool {
        self.cmos[REGISTER_B] & bit_of_b != 0
    }

    /// Handles a read of the data port.
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

    /// Handles a write to the data port.
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

    /// Handles a write to register B. While SET is 1, the clock stops at the time at which SET became 1.
    fn write_b(&mut self, value: u8) {
        self.latch();
        let stood = self.is_set(B_SET);
        self.cmos[REGISTER_B] = value & !B_INTERRUPTS;
        if stood && !self.is_set(B_SET) {
            self.start();
        }
    }

    /// Returns the bit of register A for an update that is about to begin.
    fn update_in_progress(&self) -> u8 {
        let into_second = self.now_us().rem_euclid(MICROSECONDS);
        match !self.is_set(B_SET) && into_second >= MICROSECONDS - UPDATE_WARNING {
            true => A_UPDATE_IN_PROGRESS,
            false => 0,
        }
    }

    /// Returns the bit of register C for an update since the last call.
    fn take_update_ended(&mut self) -> u8 {
        let second = self.second();
        if self.is_set(B_SET) || second == self.update_seen_s {
            return 0;
        }
        self.update_seen_s = second;
        C_UPDATE_ENDED
    }

    /// Writes the current time to the time registers, unless the guest is setting the clock.
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
        // 1 January 1970 was a Thursday, and Sunday is 1.
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

    /// Starts the clock at the time in the time registers. Values that are out of range carry over: day 32 of a month
    /// is the first day of the next month.
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

    /// Encodes `value`, which is 0 to 99, in BCD or binary as register B says.
    fn encode(&self, value: i64) -> u8 {
        let value = u8::try_from(value.clamp(0, 99)).unwrap_or(0);
        match self.is_set(B_BINARY) {
            true => value,
            false => ((value / 10) << 4) | (value % 10),
        }
    }

    /// Decodes a register from BCD or binary as register B says.
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
            // On a PC, the index port cannot be read.
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

/// Writes the memory sizes to where firmware and boot loaders look for them: KiB below 1 MiB (0x15), KiB from 1 MiB on
/// (0x17 and 0x30), and units of 64 KiB from 16 MiB on (0x34) and from 4 GiB on (0x5b).
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
