//! What fuzzed bytes say.

use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::Arbitrary;
use ept::format::{HardwareFormat, MemoryType, Permissions, Tables};
use ept::stage2::{Attributes, Stage2};
use ept::{GpaRange, Hpa, Level};

use crate::decode::permissions;
use crate::formats::{Choice, Hardware, Job};
use crate::mmu::Mmu;
use crate::pages::pages;
use crate::stage2::guest::Guest;

const BASE: Hpa = Hpa(0x10_0000_0000);
const MOST_STEPS: usize = 48;
/// Pages of the window in which operations on small pages take place.
const WINDOW: u64 = 4096;

/// A table and what happens to it.
#[derive(Arbitrary, Debug)]
pub struct Script {
    format: Choice,
    tables: Supply,
    place: Base,
    /// What the lent memory holds, the root apart.
    rubbish: u64,
    steps: Vec<Step>,
}

/// How many tables there are beside the root.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Supply {
    Few(u8),
    Many,
}

/// Where in the space the window lies.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Base {
    Zero,
    AcrossGib,
    End,
}

/// One thing that happens.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Step {
    Map(Span, Lead, Looks),
    Change(Change, Span, Open, Fate),
    Apply(Apply, Span, Open),
    /// A guest reads or writes pages, so far apart.
    Touch {
        at: Span,
        write: bool,
        stride: u8,
    },
    Lookup(u64),
    Dump(Span),
    /// All flushes that were put off are done now.
    Flush,
}

/// A change that owes a flush.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Change {
    Unmap,
    Protect(u8),
    Split(Height),
    Collapse(Height),
    Clean,
    Age,
}

/// A function of the 2019 thread, with the call at which its callback fails.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Apply {
    pub(crate) function: Function,
    pub(crate) fails_at: Option<u8>,
    /// The callback takes the right to write away.
    pub(crate) protects: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Function {
    Refusing,
    Skipping,
    FillingRefusing,
    FillingSplitting,
    PageRange,
}

/// What becomes of a flush.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Fate {
    Done,
    Later,
    Never,
}

/// The notifier range that is open.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Open {
    All,
    Exact,
    /// All of the range but its last page.
    Short,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Height {
    Page,
    Mib2,
    Gib,
    Gib512,
    Tib256,
}

impl Height {
    pub(crate) fn level(self) -> Level {
        Level::new(self as u8).expect("five of six")
    }
}

/// Pages: some entries of a level, and a little more or less at either end.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Span {
    unit: Unit,
    first: u16,
    count: u8,
    before: i8,
    after: i8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Unit {
    Page,
    Mib2,
    Gib,
    /// Entries of the level under the root's.
    Root,
    /// All that the table describes.
    Whole,
    /// More than that.
    Beyond,
}

/// Where a map leads to.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Lead {
    /// The same distance for all, so that huge leaves fit and collapse.
    Along,
    /// The same, so many pages on.
    Shifted(u8),
    /// So many bytes before the end of what an entry can hold.
    ToTheEnd(u8),
    Anywhere(u64),
}

/// Attributes of a map.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Looks {
    /// All, most of the time.
    permissions: Option<u8>,
    memory: Memory,
    largest: Height,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Memory {
    WriteBack,
    WriteCombining,
    Uncached,
    Other(u8),
}

impl Looks {
    pub(crate) fn attributes(self) -> Attributes {
        Attributes {
            permissions: self.permissions.map_or(Permissions::ALL, permissions),
            memory: match self.memory {
                Memory::WriteBack => MemoryType::WriteBack,
                Memory::WriteCombining => MemoryType::WriteCombining,
                Memory::Uncached => MemoryType::Uncached,
                Memory::Other(bits) => MemoryType::Other(bits),
            },
            largest: self.largest.level(),
        }
    }
}

impl Lead {
    pub(crate) fn hpa(self, range: GpaRange, hpa_bits: u32) -> Hpa {
        let along = (range.first_page() << 12) % (1 << 40);
        Hpa(match self {
            Self::Along => along,
            Self::Shifted(pages) => along + (u64::from(pages) << 12),
            Self::ToTheEnd(pages) => {
                let end = (1 << hpa_bits) + (u64::from(pages) << 12);
                u64::saturating_sub(end, range.pages() << 12)
            }
            Self::Anywhere(hpa) => hpa,
        })
    }
}

/// What the fuzzed numbers are relative to.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    base: u64,
    /// All that the table describes.
    pub(crate) span: GpaRange,
    /// Pages of a root entry.
    root: u64,
}

impl Window {
    fn new<F: HardwareFormat>(format: F, place: Base) -> Self {
        let span = format.geometry().span();
        let base = match place {
            Base::Zero => 0,
            Base::AcrossGib => (1 << 18) - WINDOW / 2,
            Base::End => span.end_page() - WINDOW,
        };
        Self {
            base,
            span,
            root: format.geometry().root_level().pages(),
        }
    }

    pub(crate) fn range(&self, span: Span) -> GpaRange {
        let (unit, most) = match span.unit {
            Unit::Page => (1, 512),
            Unit::Mib2 => (512, 4),
            Unit::Gib => (1 << 18, 2),
            Unit::Root => (self.root, 2),
            Unit::Whole => return self.span,
            Unit::Beyond => {
                let end = self.span.end_page();
                return pages(end - u64::from(span.count), end + 1 + u64::from(span.first));
            }
        };
        let first = self.base / unit * unit + u64::from(span.first) * unit % WINDOW;
        let end = first + (u64::from(span.count) % most + 1) * unit;
        let first = first.saturating_add_signed(span.before.into());
        let end = end.saturating_add_signed(span.after.into());
        pages(
            first,
            end.clamp(first + 1, self.span.end_page().max(first + 1)),
        )
    }
}

impl Script {
    /// Does it all.
    pub fn run(self) {
        self.format.with(self);
    }
}

impl Job for Script {
    fn run<F: HardwareFormat>(self, format: F, hardware: Hardware) {
        let root = format.geometry().root_entries().div_ceil(512);
        let tables = match self.tables {
            Supply::Few(tables) => usize::from(tables % 16),
            Supply::Many => 40,
        };
        // Only the root is promised to be looked at before it is written.
        let words: Vec<AtomicU64> = (0..(root + tables) * 512)
            .map(|_| AtomicU64::new(self.rubbish))
            .collect();
        words[..root * 512]
            .iter()
            .for_each(|word| word.store(0, Ordering::SeqCst));
        let stage2 = Stage2::new(format, &words, BASE).expect("room for the root");
        assert_eq!(stage2.available(), tables);
        assert_eq!(
            stage2.geometry().span().pages(),
            1 << (hardware.gpa_bits - 12)
        );
        let window = Window::new(format, self.place);
        let mmu = Mmu::new(hardware.kind, &words, BASE.0);
        let mut guest = Guest::new(&stage2, format, hardware, mmu, window);
        for step in self.steps.into_iter().take(MOST_STEPS) {
            guest.step(step);
        }
        guest.audit();
        guest.end(tables);
    }
}
