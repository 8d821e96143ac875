//! Empties the processor's caches of what was used before.

use std::fs;
use std::hint::black_box;
use std::sync::OnceLock;

use super::Sizes;

const LINE: usize = 64;
const LEAST: usize = 64 << 20;
const MOST: usize = 1 << 30;

/// Memory of twice the last-level cache, and a walk over it.
#[derive(Clone, Copy)]
pub(super) struct Evict(&'static [u8]);

impl Evict {
    pub(super) fn new(sizes: Sizes) -> Self {
        static MEMORY: OnceLock<Vec<u8>> = OnceLock::new();
        // Ones: memory of zeroes that was never written to may be one page many times.
        let memory = MEMORY.get_or_init(|| vec![1; bytes(sizes)]);
        Self(memory)
    }

    pub(super) fn run(&self) {
        let mut sum = 0_u64;
        for line in self.0.chunks(LINE) {
            sum += u64::from(line[0]);
        }
        black_box(sum);
    }
}

fn bytes(sizes: Sizes) -> usize {
    if sizes.quick {
        return LEAST;
    }
    let last_level = fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size");
    let kib = last_level.ok().and_then(|text| {
        let digits = text.trim().strip_suffix('K')?;
        digits.parse::<usize>().ok()
    });
    (2 * 1024 * kib.unwrap_or(0)).clamp(LEAST, MOST)
}
