//! What fuzzed bytes say.

use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::{Arbitrary, Result, Unstructured};
use ept::format::{HardwareFormat, MemoryType, Permissions, Tables};
use ept::stage2::{Attributes, Stage2};
use ept::{GpaRange, Hpa, Level};

use crate::decode::permissions;
use crate::formats::{Choice, Hardware, Job};
use crate::mmu::Mmu;
use crate::pages::pages;
use crate::stage2::guest::Guest;
use crate::steps::Steps;

const BASE: Hpa = Hpa(0x10_0000_0000);
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
    steps: Steps<Step>,
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
#[derive(Clone, Copy, Debug)]
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

impl<'a> Arbitrary<'a> for Step {
    /// Changes are what there is most to be said of.
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match bytes.arbitrary::<u8>()? % 16 {
            0..=2 => Self::Map(bytes.arbitrary()?, bytes.arbitrary()?, bytes.arbitrary()?),
            3 | 4 => Self::Touch {
                at: bytes.arbitrary()?,
                write: bytes.arbitrary()?,
                stride: bytes.arbitrary()?,
            },
            5 | 6 => Self::Apply(bytes.arbitrary()?, bytes.arbitrary()?, bytes.arbitrary()?),
            7 => Self::Lookup(bytes.arbitrary()?),
            8 => Self::Dump(bytes.arbitrary()?),
            9 => Self::Flush,
            _ => Self::Change(
                bytes.arbitrary()?,
                bytes.arbitrary()?,
                bytes.arbitrary()?,
                bytes.arbitrary()?,
            ),
        })
    }
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

/// The notifier range that is open: all of the space or just what is changed, and at times too little.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Open(u8);

impl Open {
    pub(crate) const ALL: Self = Self(0);

    pub(crate) fn range(self, changed: GpaRange) -> GpaRange {
        let (first, end) = (changed.first_page(), changed.end_page());
        match self.0 % 16 {
            0..=7 => GpaRange::ALL,
            8..=14 => changed,
            // All but the last page; a range of one page is missed altogether.
            _ if changed.pages() == 1 => pages(end, end + 1),
            _ => pages(first, end - 1),
        }
    }
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

/// Pages: some entries of a level, and at times a little more or less at either end.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Span {
    unit: u8,
    first: u16,
    count: u8,
    edges: Option<(i8, i8)>,
}

/// Where a map leads to.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Lead {
    how: u8,
    number: u64,
}

/// Attributes of a map.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Looks {
    /// All, most of the time.
    permissions: Option<u8>,
    /// Write-back, most of the time.
    memory: Option<Memory>,
    largest: Height,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Memory {
    WriteCombining,
    Uncached,
    Other(u8),
}

impl Looks {
    pub(crate) fn attributes(self) -> Attributes {
        Attributes {
            permissions: self.permissions.map_or(Permissions::ALL, permissions),
            memory: match self.memory {
                None => MemoryType::WriteBack,
                Some(Memory::WriteCombining) => MemoryType::WriteCombining,
                Some(Memory::Uncached) => MemoryType::Uncached,
                Some(Memory::Other(bits)) => MemoryType::Other(bits),
            },
            largest: self.largest.level(),
        }
    }
}

impl Lead {
    /// Mostly the same distance for all, so that huge leaves fit and collapse.
    pub(crate) fn hpa(self, range: GpaRange, hpa_bits: u32) -> Hpa {
        let along = (range.first_page() << 12) % (1 << 40);
        let some_pages = (self.number & 0xff) << 12;
        Hpa(match self.how % 8 {
            0..=4 => along,
            5 => along + some_pages,
            // To the end of what an entry can hold, or beyond it.
            6 => u64::saturating_sub((1 << hpa_bits) + some_pages, range.pages() << 12),
            _ => self.number,
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
        let last = self.span.end_page();
        let (unit, most) = match span.unit % 16 {
            0..=4 => (1, 512),
            5..=9 => (512, 4),
            10 | 11 => (1 << 18, 2),
            12 | 13 => (self.root, 2),
            14 => return self.span,
            _ => {
                return pages(
                    last - u64::from(span.count),
                    last + 1 + u64::from(span.first),
                );
            }
        };
        let (before, after) = span.edges.unwrap_or_default();
        let first = self.base / unit * unit + u64::from(span.first) * unit % WINDOW;
        let end = first + (u64::from(span.count) % most + 1) * unit;
        let first = first.saturating_add_signed(before.into());
        let end = end.saturating_add_signed(after.into());
        pages(first, end.clamp(first + 1, last.max(first + 1)))
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
        for step in self.steps.0 {
            guest.step(step);
        }
        guest.audit();
        guest.end(tables);
    }
}
