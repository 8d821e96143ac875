//! Driver side of a split virtqueue (2.7), with access to the parts that attacks change.

use crate::dma::{barrier, fill, load, store};
use crate::spec::descriptor;

/// Maximum size of a queue. Its descriptor table is then one page.
const SIZE_MOST: u16 = 256;
const PAGE: u64 = 4096;
/// Size of the descriptor table and the two rings of a queue, one page each.
pub(crate) const QUEUE_BYTES: u64 = 3 * PAGE;

/// A descriptor of a request.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    pub(crate) address: u64,
    pub(crate) bytes: u32,
    pub(crate) flags: u16,
}

impl Part {
    /// Returns a descriptor of memory that the device reads.
    pub(crate) fn out(address: u64, bytes: u32) -> Self {
        Self {
            address,
            bytes,
            flags: 0,
        }
    }

    /// Returns a descriptor of memory that the device writes.
    pub(crate) fn into(address: u64, bytes: u32) -> Self {
        Self {
            address,
            bytes,
            flags: descriptor::WRITE,
        }
    }

    /// Returns a descriptor of an indirect table.
    pub(crate) fn table(address: u64, bytes: u32) -> Self {
        Self {
            address,
            bytes,
            flags: descriptor::INDIRECT,
        }
    }
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Queue {
    area: u64,
    pub(crate) size: u16,
    /// Index of the next available entry to write.
    available: u16,
    /// Index of the next used entry to read.
    used: u16,
}

impl Queue {
    pub(crate) fn new(area: u64, most: u32) -> Self {
        let size = u16::try_from(most).map_or(SIZE_MOST, |most| most.min(SIZE_MOST));
        Self {
            area,
            size,
            available: 0,
            used: 0,
        }
    }

    /// Clears the rings and the indexes, as after a reset.
    pub(crate) fn clear(&mut self) {
        fill(self.area, 0, QUEUE_BYTES);
        (self.available, self.used) = (0, 0);
    }

    /// Returns the addresses of the descriptor table, the available ring and the used ring.
    pub(crate) fn addresses(&self) -> [u64; 3] {
        [self.area, self.area + PAGE, self.used_ring()]
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.area + 2 * PAGE
    }

    /// Returns the address of `used_event` in the available ring (2.7.7).
    pub(crate) fn used_event(&self) -> u64 {
        self.area + PAGE + 4 + 2 * u64::from(self.size)
    }

    pub(crate) fn describe(&self, index: u16, part: Part, next: Option<u16>) {
        describe(self.area, index, part, next);
    }

    /// Writes a chain from descriptor `first` on.
    pub(crate) fn chain(&self, first: u16, parts: &[Part]) {
        let last = parts.len() - 1;
        for (number, part) in parts.iter().enumerate() {
            let index = first + number as u16;
            self.describe(index, *part, (number < last).then_some(index + 1));
        }
    }

    /// Makes the chain of `head` available.
    pub(crate) fn publish(&mut self, head: u16) {
        let ring = self.area + PAGE;
        store(ring + 4 + 2 * u64::from(self.available % self.size), head);
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    /// Sets the index of the available ring, which may be wrong.
    pub(crate) fn set_available_index(&self, index: u16) {
        barrier();
        store(self.area + PAGE + 2, index);
        barrier();
    }

    /// Returns the next used chain: its head and the number of bytes that the device wrote.
    pub(crate) fn take_used(&mut self) -> Option<(u32, u32)> {
        barrier();
        let ring = self.used_ring();
        if load::<u16>(ring + 2) == self.used {
            return None;
        }
        barrier();
        let entry = ring + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        Some((load(entry), load(entry + 4)))
    }
}

/// Writes a descriptor to the table at `table`.
pub(crate) fn describe(table: u64, index: u16, part: Part, next: Option<u16>) {
    let at = table + u64::from(index) * u64::from(descriptor::BYTES);
    let flag = if next.is_some() { descriptor::NEXT } else { 0 };
    store(at, part.address);
    store(at + 8, part.bytes);
    store(at + 12, part.flags | flag);
    store(at + 14, next.unwrap_or(0));
}
