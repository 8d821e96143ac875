//! What fuzzed bytes say.

use arbitrary::Arbitrary;
use ept::{GpaRange, Region, RegionKind, Source, Start, Tracker, TrackerError};

use crate::pages::pages;
use crate::steps::Steps;
use crate::tracker::checked::Checked;

const MOST_REGIONS: usize = 6;
const MOST_WORDS: usize = 24;
/// Pages in the 64-bit space.
const SPACE: u64 = 1 << 52;
/// Pages that all regions of a script have, at most: a tracker's directories are as long as its regions are.
const MOST_PAGES: u64 = 1 << 22;

/// A tracker and what happens to it.
#[derive(Arbitrary, Debug)]
pub struct Script {
    regions: Vec<Part>,
    at_the_end_of_the_space: bool,
    tables: Tables,
    steps: Steps<Step>,
}

/// A gap and a region behind it.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Part {
    gap: Length,
    pages: Length,
    kind: Kind,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Length {
    Pages(u8),
    Hundreds(u8),
    Mib2(u8),
    Gib(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Ram,
    Rom,
    DeviceRam,
    Trapped,
}

/// How many leaf tables there may be.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Tables {
    Enough,
    Few(u8),
}

/// One thing that happens.
#[derive(Arbitrary, Debug)]
pub(crate) enum Step {
    Mark {
        at: At,
        offset: u16,
        bytes: Bytes,
        source: u8,
    },
    MarkWords {
        first: At,
        words: Vec<Word>,
    },
    MarkEpoch(u8, Span),
    Begin {
        epoch: u8,
        all_dirty: bool,
    },
    End(u8),
    Harvest {
        epoch: u8,
        span: Span,
        most: Option<u16>,
        fate: Fate,
    },
    /// The oldest harvest that is held.
    Settle(Fate),
    Protect(Span),
    Unprotect(Span),
    Fault(At),
    Reserve(Span),
}

/// What becomes of a harvest.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Fate {
    Commit,
    Rollback,
    Drop,
    Hold,
}

/// A page: in one of the regions, or near one.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct At {
    region: u8,
    page: u32,
    before: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Bytes {
    Few(u16),
    Many(u32),
    All,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Word {
    None,
    All,
    Some(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Span {
    From(At, Length),
    /// Whole parts of 2 MiB.
    Mib2(At, u8),
    Region(u8),
    Everything,
}

impl Length {
    fn pages(self) -> u64 {
        match self {
            Self::Pages(count) => count.into(),
            Self::Hundreds(count) => 100 * u64::from(count % 32),
            Self::Mib2(count) => 512 * u64::from(count % 8),
            Self::Gib(count) => (1 << 18) * u64::from(count % 3),
        }
    }
}

impl Bytes {
    pub(crate) fn count(self) -> u64 {
        match self {
            Self::Few(count) => count.into(),
            Self::Many(count) => count.into(),
            Self::All => u64::MAX,
        }
    }
}

impl Word {
    fn bits(self) -> u64 {
        match self {
            Self::None => 0,
            Self::All => u64::MAX,
            Self::Some(bits) => bits,
        }
    }
}

pub(crate) fn words(words: &[Word]) -> Vec<u64> {
    let words = words.iter().take(MOST_WORDS);
    words.map(|word| word.bits()).collect()
}

pub(crate) fn source(number: u8) -> Source {
    Source::ALL[usize::from(number) % Source::ALL.len()]
}

pub(crate) fn start(all_dirty: bool) -> Start {
    if all_dirty {
        Start::AllDirty
    } else {
        Start::Clean
    }
}

impl At {
    pub(crate) fn page(self, regions: &[Region]) -> u64 {
        let region = regions[usize::from(self.region) % regions.len()].range;
        let page = region.first_page() + u64::from(self.page) % (region.pages() + 8);
        page.saturating_sub(self.before.into()).min(SPACE - 1)
    }
}

impl Span {
    pub(crate) fn range(self, regions: &[Region]) -> GpaRange {
        match self {
            Self::From(at, length) => {
                let first = at.page(regions);
                pages(first, (first + length.pages().max(1)).min(SPACE))
            }
            Self::Mib2(at, count) => {
                let first = at.page(regions) & !511;
                pages(first, (first + 512 * (u64::from(count % 4) + 1)).min(SPACE))
            }
            Self::Region(number) => regions[usize::from(number) % regions.len()].range,
            Self::Everything => GpaRange::ALL,
        }
    }
}

impl Script {
    /// Does it all.
    pub fn run(self) {
        let regions = self.regions();
        let (limit, enough) = match self.tables {
            Tables::Enough => (usize::MAX, true),
            Tables::Few(tables) => (usize::from(tables % 8), false),
        };
        let tracker = match Tracker::with_table_limit(&regions, limit) {
            Ok(tracker) => tracker,
            Err(TrackerError::NoRegions) => return assert!(regions.is_empty()),
            Err(error) => panic!("{error}"),
        };
        assert!(!regions.is_empty());
        let mut checked = Checked::new(tracker, enough);
        for step in self.steps.0 {
            checked.step(step);
        }
        checked.end();
    }

    /// Last first, which is any order.
    fn regions(&self) -> Vec<Region> {
        let (mut regions, mut next) = (Vec::new(), 0);
        for part in self.regions.iter().take(MOST_REGIONS) {
            let first = next + part.gap.pages();
            let end = first + part.pages.pages().max(1);
            if end > MOST_PAGES {
                break;
            }
            next = end;
            let kind = match part.kind {
                Kind::Ram => RegionKind::Ram,
                Kind::Rom => RegionKind::Rom,
                Kind::DeviceRam => RegionKind::DeviceRam,
                Kind::Trapped => RegionKind::Trapped,
            };
            let range = pages(first, end);
            regions.push(Region { range, kind });
        }
        if self.at_the_end_of_the_space {
            for Region { range, .. } in &mut regions {
                let by = SPACE - next;
                *range = pages(range.first_page() + by, range.end_page() + by);
            }
        }
        regions.reverse();
        regions
    }
}
