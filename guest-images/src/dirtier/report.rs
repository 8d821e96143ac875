//! Reports of the dirtier: lines that the guest prints and the host parses.

use core::fmt;

use super::Pattern;

/// Totals over all vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Number of passes that every vCPU has completed, including the populating one.
    pub passes: u64,
    /// Number of page writes.
    pub pages: u64,
    /// Number of pages with an older stamp than was written.
    pub lost: u64,
    /// Number of pages whose stamps differ from each other.
    pub torn: u64,
}

/// A page that does not hold the stamp that was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Index of the vCPU that wrote the page.
    pub cpu: u32,
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// Iteration that the page must hold.
    pub expected: u64,
}

/// A report of the dirtier, which is one line on the serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestReport {
    /// Every vCPU has populated its share.
    Ready {
        /// Number of vCPUs that work.
        cpus: u32,
        /// Size of the area in MiB, rounded down.
        area_mib: u64,
        /// Order in which pages are written.
        pattern: Pattern,
    },
    /// Answer to the command `s`.
    Status(Totals),
    /// Verdict: every page holds the stamp that was written.
    AuditPassed(Totals),
    /// Verdict: at least one page does not.
    AuditFailed(Totals),
    /// A page holds an intact stamp of another iteration, which is given. A page of zeros has
    /// iteration 0.
    LostWrite(Fault, u64),
    /// The stamps of a page differ or are damaged. The values are the iterations at its head, middle
    /// and tail.
    TornWrite(Fault, [u64; 3]),
}

impl fmt::Display for Totals {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passes,
            pages,
            lost,
            torn,
        } = self;
        write!(out, "passes={passes} pages={pages} lost={lost} torn={torn}")
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, gpa, expected } = self;
        write!(out, "cpu={cpu} gpa={gpa:#x} expected iteration={expected}")
    }
}

impl fmt::Display for GuestReport {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(PREFIX)?;
        match self {
            Self::Ready {
                cpus,
                area_mib,
                pattern,
            } => {
                write!(
                    out,
                    "ready cpus={cpus} area={area_mib} MiB pattern={pattern}"
                )
            }
            Self::Status(totals) => write!(out, "status {totals}"),
            Self::AuditPassed(totals) => write!(out, "audit passed {totals}"),
            Self::AuditFailed(totals) => write!(out, "audit FAILED {totals}"),
            Self::LostWrite(fault, found) => write!(out, "LOST WRITE {fault} found={found}"),
            Self::TornWrite(fault, [head, middle, tail]) => {
                write!(
                    out,
                    "TORN WRITE {fault} head={head} middle={middle} tail={tail}"
                )
            }
        }
    }
}

/// Prefix of every line.
const PREFIX: &str = "dirtier: ";

impl GuestReport {
    /// Parses a line. Returns `None` if it is not a report.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let line = line.trim_end().strip_prefix(PREFIX)?;
        let (kind, fields) = KINDS
            .iter()
            .find_map(|(words, kind)| Some((kind, line.strip_prefix(words)?.strip_prefix(' ')?)))?;
        kind(Fields(fields))
    }
}

/// Parser of the fields of one kind of report.
type Reader = fn(Fields<'_>) -> Option<GuestReport>;

/// First words of each kind of report, and the parser of its fields.
const KINDS: [(&str, Reader); 6] = [
    ("ready", |fields| {
        Some(GuestReport::Ready {
            cpus: fields.number("cpus")?.try_into().ok()?,
            area_mib: fields.number("area")?,
            pattern: fields.text("pattern")?.parse().ok()?,
        })
    }),
    ("status", |fields| fields.totals().map(GuestReport::Status)),
    ("audit passed", |fields| {
        fields.totals().map(GuestReport::AuditPassed)
    }),
    ("audit FAILED", |fields| {
        fields.totals().map(GuestReport::AuditFailed)
    }),
    ("LOST WRITE", |fields| {
        Some(GuestReport::LostWrite(
            fields.fault()?,
            fields.number("found")?,
        ))
    }),
    ("TORN WRITE", |fields| {
        let places = [
            fields.number("head")?,
            fields.number("middle")?,
            fields.number("tail")?,
        ];
        Some(GuestReport::TornWrite(fields.fault()?, places))
    }),
];

/// The `key=value` fields of a line.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn text(self, key: &str) -> Option<&'a str> {
        self.0
            .split(' ')
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    fn number(self, key: &str) -> Option<u64> {
        let text = self.text(key)?;
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        }
    }

    fn totals(self) -> Option<Totals> {
        Some(Totals {
            passes: self.number("passes")?,
            pages: self.number("pages")?,
            lost: self.number("lost")?,
            torn: self.number("torn")?,
        })
    }

    fn fault(self) -> Option<Fault> {
        let cpu = self.number("cpu")?.try_into().ok()?;
        Some(Fault {
            cpu,
            gpa: self.number("gpa")?,
            expected: self.number("iteration")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn totals() -> impl Strategy<Value = Totals> {
        any::<[u64; 4]>().prop_map(|[passes, pages, lost, torn]| Totals {
            passes,
            pages,
            lost,
            torn,
        })
    }

    fn faults() -> impl Strategy<Value = Fault> {
        any::<(u32, u64, u64)>().prop_map(|(cpu, gpa, expected)| Fault { cpu, gpa, expected })
    }

    fn reports() -> impl Strategy<Value = GuestReport> {
        prop_oneof![
            any::<(u32, u64)>().prop_map(|(cpus, area_mib)| GuestReport::Ready {
                cpus,
                area_mib,
                pattern: Pattern::Hot
            }),
            totals().prop_map(GuestReport::Status),
            totals().prop_map(GuestReport::AuditPassed),
            totals().prop_map(GuestReport::AuditFailed),
            (faults(), any::<u64>())
                .prop_map(|(fault, found)| GuestReport::LostWrite(fault, found)),
            (faults(), any::<[u64; 3]>())
                .prop_map(|(fault, places)| GuestReport::TornWrite(fault, places)),
        ]
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(report in reports()) {
            let line = format!("{report}\r\n");
            prop_assert_eq!(GuestReport::parse(&line), Some(report));
        }

        #[test]
        fn anything_is_read_without_a_panic(line in "(dirtier: )?\\PC*") {
            let _ = GuestReport::parse(&line);
        }
    }

    #[test]
    fn the_wording_is_settled() {
        let fault = Fault {
            cpu: 1,
            gpa: 0x20_0000,
            expected: 5,
        };
        assert_eq!(
            GuestReport::LostWrite(fault, 4).to_string(),
            "dirtier: LOST WRITE cpu=1 gpa=0x200000 expected iteration=5 found=4"
        );
        assert_eq!(
            GuestReport::TornWrite(fault, [5, 5, 4]).to_string(),
            "dirtier: TORN WRITE cpu=1 gpa=0x200000 expected iteration=5 head=5 middle=5 tail=4"
        );
    }
}
