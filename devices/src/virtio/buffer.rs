//! Data of a descriptor chain: pieces of guest memory. Every access checks that the memory exists.

use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::queue::QueueError;

/// Contiguous guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    address: u64,
    bytes: u64,
}

/// Guest memory of a chain, in the order of its descriptors. Reading and writing consumes it from the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// No span is empty.
    spans: Vec<Span>,
}

impl Buffer {
    /// Appends the memory of a descriptor. Merges it with the last piece if both are adjacent.
    pub(super) fn push(&mut self, address: u64, bytes: u64) {
        match self.spans.last_mut() {
            Some(last) if last.address.checked_add(last.bytes) == Some(address) => {
                last.bytes += bytes;
            }
            _ if bytes > 0 => self.spans.push(Span { address, bytes }),
            _ => {}
        }
    }

    /// Returns the number of bytes left. A chain has at most 2^32 bytes (virtio 1.2, 2.7.5.2).
    #[must_use]
    pub fn len(&self) -> u64 {
        self.spans.iter().map(|span| span.bytes).sum()
    }

    /// Returns whether no bytes are left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Returns the pieces, each as guest-physical address and length in bytes.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.spans.iter().map(|span| (span.address, span.bytes))
    }

    /// Splits off the first `bytes` bytes, or all if there are fewer.
    pub fn take(&mut self, bytes: u64) -> Self {
        let mut first = Self::default();
        let mut wanted = bytes;
        let mut whole = 0;
        for span in &mut self.spans {
            if span.bytes > wanted {
                first.push(span.address, wanted);
                span.address += wanted;
                span.bytes -= wanted;
                break;
            }
            wanted -= span.bytes;
            first.push(span.address, span.bytes);
            whole += 1;
        }
        self.spans.drain(..whole);
        first
    }

    /// Splits off the last `bytes` bytes, or all if there are fewer.
    pub fn take_last(&mut self, bytes: u64) -> Self {
        let first = self.take(self.len().saturating_sub(bytes));
        std::mem::replace(self, first)
    }

    /// Fills `data` from the first bytes, and consumes them. Returns the number of bytes read, which is smaller than
    /// `data` if the buffer is.
    ///
    /// # Errors
    /// Returns [`QueueError::Outside`] if a piece is not in `memory`.
    pub fn read<G: GuestMemory>(
        &mut self,
        memory: &G,
        data: &mut [u8],
    ) -> Result<usize, QueueError> {
        let part = self.take(data.len() as u64);
        let mut done = 0;
        for span in &part.spans {
            let bytes = &mut data[done..done + host_bytes(span.bytes)];
            memory
                .read_slice(bytes, GuestAddress(span.address))
                .map_err(|_| outside(span))?;
            done += bytes.len();
        }
        Ok(done)
    }

    /// Writes `data` to the first bytes, and consumes them. Returns the number of bytes written, which is smaller than
    /// `data` if the buffer is.
    ///
    /// # Errors
    /// Returns [`QueueError::Outside`] if a piece is not in `memory`.
    pub fn write<G: GuestMemory>(&mut self, memory: &G, data: &[u8]) -> Result<usize, QueueError> {
        let part = self.take(data.len() as u64);
        let mut done = 0;
        for span in &part.spans {
            let bytes = &data[done..done + host_bytes(span.bytes)];
            memory
                .write_slice(bytes, GuestAddress(span.address))
                .map_err(|_| outside(span))?;
            done += bytes.len();
        }
        Ok(done)
    }

    /// Calls `each` with the host mapping of every piece, until `each` returns false. Writes through a mapping are
    /// marked in the dirty bitmap of `memory`.
    ///
    /// # Errors
    /// Returns [`QueueError::Outside`] if a piece is not in `memory`, or does not permit `access`.
    pub fn each_slice<'m, G: GuestMemory>(
        &self,
        memory: &'m G,
        access: Permissions,
        mut each: impl FnMut(VolatileSlice<'m, BS<'m, G::Bitmap>>) -> bool,
    ) -> Result<(), QueueError> {
        for span in &self.spans {
            let slices = memory
                .get_slices(GuestAddress(span.address), host_bytes(span.bytes), access)
                .map_err(|_| outside(span))?;
            for slice in slices {
                if !each(slice.map_err(|_| outside(span))?) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// Converts the length of a span. Guest memory is mapped into this process, so the conversion does not saturate.
fn host_bytes(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn outside(span: &Span) -> QueueError {
    QueueError::Outside {
        address: span.address,
        bytes: span.bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn buffer(pieces: &[(u64, u64)]) -> Buffer {
        let mut buffer = Buffer::default();
        for (address, bytes) in pieces {
            buffer.push(*address, *bytes);
        }
        buffer
    }

    #[test]
    fn pieces_that_touch_are_one() {
        let all = buffer(&[(0x1000, 0x10), (0x1010, 0x10), (0x1030, 1), (0x1020, 0x10)]);
        assert_eq!(
            all.pieces().collect::<Vec<_>>(),
            [(0x1000, 0x20), (0x1030, 1), (0x1020, 0x10)]
        );
        assert_eq!(all.len(), 0x31);
    }

    #[test]
    fn parts_are_taken_from_both_ends() {
        let mut all = buffer(&[(0x1000, 0x10), (0x2000, 0x10)]);
        assert_eq!(all.take(0x18), buffer(&[(0x1000, 0x10), (0x2000, 8)]));
        assert_eq!(all, buffer(&[(0x2008, 8)]));
        assert_eq!(all.take_last(3), buffer(&[(0x200d, 3)]));
        assert_eq!(all.take_last(9), buffer(&[(0x2008, 5)]));
        assert!(all.is_empty());
        assert!(all.take(1).is_empty());
    }

    #[test]
    fn reads_and_writes_follow_the_pieces() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let pieces = [(0x3000, 3), (0x1000, 4)];
        assert_eq!(buffer(&pieces).write(&memory, b"ferryman").unwrap(), 7);
        let mut there = [0; 4];
        memory.read_slice(&mut there, GuestAddress(0x1000)).unwrap();
        assert_eq!(&there, b"ryma");
        let mut back = [0; 9];
        assert_eq!(buffer(&pieces).read(&memory, &mut back).unwrap(), 7);
        assert_eq!(&back[..7], b"ferryma");
        buffer(&[(0x3fff, 2)]).write(&memory, b"xy").unwrap_err();
    }
}
