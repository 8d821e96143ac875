//! `aarch64-paging` 0.12: an `IdMap` of its stage-2 regime with four levels; `map_range_with_constraints` without
//! blocks, `walk_range`, and `modify_range`, which also splits: a block is asked to change one page of it, which
//! stays as it is. Unmapping is mapping as invalid, and drops whole subtables. It takes tables from the heap.
//!
//! An entry is changed by an exchange, but not read and changed in one: a flag that hardware sets between the two
//! is lost. Marked active it also checks beforehand that nothing breaks the rule of break-before-make.

use aarch64_paging::descriptor::{Descriptor, Stage2Attributes, UpdatableDescriptor};
use aarch64_paging::idmap::IdMap;
use aarch64_paging::paging::{Constraints, LEAF_LEVEL, MemoryRegion, Stage2};

use super::{BLOCK, BLOCKS, FIRST, LEN, PAGE, PageTable, Protects, Splits, Unmaps};

const WRITE: Stage2Attributes = Stage2Attributes::S2AP_ACCESS_WO;
const FLAGS: Stage2Attributes = Stage2Attributes::VALID
    .union(Stage2Attributes::MEMATTR_NORMAL_OUTER_WB)
    .union(Stage2Attributes::MEMATTR_NORMAL_INNER_WB)
    .union(Stage2Attributes::S2AP_ACCESS_RW)
    .union(Stage2Attributes::SH_INNER)
    .union(Stage2Attributes::ACCESS_FLAG);

pub(crate) struct AArch64(IdMap<Stage2>);

fn region(from: u64, len: u64) -> MemoryRegion {
    let address = |address: u64| usize::try_from(address).expect("64 bits");
    MemoryRegion::new(address(from), address(from + len))
}

impl AArch64 {
    fn put(&mut self, len: u64, flags: Stage2Attributes, constraints: Constraints) {
        let region = region(FIRST, len);
        let put = self
            .0
            .map_range_with_constraints(&region, flags, constraints);
        put.expect("a range of the table");
    }

    fn allow(&mut self, set: Stage2Attributes, clear: Stage2Attributes) {
        let change = |_: &MemoryRegion, entry: &mut UpdatableDescriptor<'_, Stage2Attributes>| {
            if entry.is_table() {
                return Ok(());
            }
            entry.modify_flags(set, clear)
        };
        let changed = self.0.modify_range(&region(FIRST, LEN), &change);
        changed.expect("all of it may be changed");
    }

    fn each_page(&self, mut visit: impl FnMut(&Descriptor<Stage2Attributes>)) {
        let mut each = |_: &MemoryRegion, entry: &Descriptor<Stage2Attributes>, level: usize| {
            if level == LEAF_LEVEL && entry.is_valid() {
                visit(entry);
            }
            Ok(())
        };
        let walked = self.0.walk_range(&region(FIRST, LEN), &mut each);
        walked.expect("a range of the table");
    }
}

impl PageTable for AArch64 {
    const NAME: &'static str = "aarch64-paging";

    fn new() -> Self {
        Self(IdMap::new(0, Stage2))
    }

    fn map(&mut self) {
        self.put(LEN, FLAGS, Constraints::NO_BLOCK_MAPPINGS);
    }

    fn sum(&self) -> u64 {
        let mut sum = 0_u64;
        self.each_page(|entry| {
            sum = sum.wrapping_add(entry.output_address().0 as u64);
        });
        sum
    }
}

impl Unmaps for AArch64 {
    fn unmap(&mut self) {
        self.put(LEN, Stage2Attributes::empty(), Constraints::empty());
    }
}

impl Protects for AArch64 {
    fn protect(&mut self) {
        self.allow(Stage2Attributes::empty(), WRITE);
    }

    fn release(&mut self) {
        self.allow(WRITE, Stage2Attributes::empty());
    }

    fn writable(&self) -> u64 {
        let mut writable = 0;
        self.each_page(|entry| writable += u64::from(entry.flags().contains(WRITE)));
        writable
    }
}

impl Splits for AArch64 {
    fn fill(&mut self) {
        self.unmap();
        self.put(BLOCKS * BLOCK, FLAGS, Constraints::empty());
    }

    fn split(&mut self, block: u64) {
        let page = region(FIRST + block * BLOCK, PAGE);
        let as_it_is = |_: &MemoryRegion, _: &mut UpdatableDescriptor<'_, Stage2Attributes>| Ok(());
        let split = self.0.modify_range(&page, &as_it_is);
        split.expect("it is not active");
    }
}

/// Marked active, as a table must be that is changed while hardware walks it.
pub(crate) struct AArch64Active(AArch64);

impl PageTable for AArch64Active {
    const NAME: &'static str = "aarch64-paging, active";

    fn new() -> Self {
        Self(AArch64::new())
    }

    fn map(&mut self) {
        self.0.map();
        self.0.0.mark_active();
    }

    fn sum(&self) -> u64 {
        self.0.sum()
    }
}

impl Protects for AArch64Active {
    fn protect(&mut self) {
        self.0.protect();
    }

    fn release(&mut self) {
        self.0.release();
    }

    fn writable(&self) -> u64 {
        self.0.writable()
    }
}

impl Drop for AArch64Active {
    fn drop(&mut self) {
        self.0.0.mark_inactive();
    }
}
