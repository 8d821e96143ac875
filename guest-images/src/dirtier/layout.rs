//! Division of the area into the working set and cold pages, and into the shares of the vCPUs.

use super::{Config, ConfigError, Pattern, Selftest, Size};

/// Sizes of the parts of the area in pages. The working set comes first, the cold pages follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Pages of the working set, which are rewritten.
    pub work: u64,
    /// Pages of the working set that are rewritten in every pass: all of them, except with
    /// [`Pattern::Hot`].
    pub hot: u64,
    /// Cold pages, which are stamped once.
    pub cold: u64,
}

/// Share of one vCPU, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// First page of its part of the working set, counted from the start of the area.
    pub work_first: u64,
    /// Length of that part.
    pub work: u64,
    /// Number of hot pages at the start of that part.
    pub hot: u64,
    /// First page of its part of the cold pages, counted from the start of the area.
    pub cold_first: u64,
    /// Length of that part.
    pub cold: u64,
}

impl Layout {
    /// Divides `usable` pages of RAM according to `config`.
    ///
    /// # Errors
    /// Returns [`ConfigError`] if a key asks for more than the usable memory, or if a vCPU would have
    /// no page to write.
    pub fn new(config: &Config, usable: u64) -> Result<Self, ConfigError<'static>> {
        let total = at_most("memory", config.memory, usable)?.unwrap_or(usable);
        let cold = at_most("cold", config.cold, total)?.unwrap_or(0);
        let limit = at_most("hot", config.hot, total - cold)?;
        let least = u64::from(config.cpus);
        let layout = match config.pattern {
            Pattern::Hot => {
                let work = total - cold;
                Self {
                    work,
                    hot: limit.unwrap_or((work / 8).max(least)),
                    cold,
                }
            }
            Pattern::Sequential | Pattern::Random | Pattern::Rate => {
                let work = limit.unwrap_or(total - cold);
                Self {
                    work,
                    hot: work,
                    cold: total - work,
                }
            }
        };
        if layout.hot < least || layout.work < layout.hot {
            let key = if config.hot.is_some() {
                "hot"
            } else {
                "memory"
            };
            return Err(ConfigError::Unsuitable {
                key,
                needed: "a page or more for each vCPU",
            });
        }
        // The self-test zeroes a cold page of vCPU 0, which has one if there are any.
        if config.selftest == Some(Selftest::Cold) && layout.cold == 0 {
            return Err(ConfigError::Unsuitable {
                key: "selftest",
                needed: "given with cold",
            });
        }
        Ok(layout)
    }

    /// Returns the number of pages of the area.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.work + self.cold
    }

    /// Returns the share of vCPU `cpu` out of `cpus`.
    #[must_use]
    pub fn share(&self, cpu: u32, cpus: u32) -> Share {
        let (work_first, work) = part(self.work, cpu, cpus);
        let (cold_first, cold) = part(self.cold, cpu, cpus);
        // Rounding can give a vCPU one more hot page than it has pages.
        let hot = part(self.hot, cpu, cpus).1.min(work);
        Share {
            work_first,
            work,
            hot,
            cold_first: self.work + cold_first,
            cold,
        }
    }
}

/// Returns the requested size in pages, or an error if it exceeds `pages`.
fn at_most(
    key: &'static str,
    asked: Option<Size>,
    pages: u64,
) -> Result<Option<u64>, ConfigError<'static>> {
    match asked.map(Size::pages) {
        Some(asked) if asked > pages => {
            let usable = Size::from_pages(pages).unwrap_or_default();
            Err(ConfigError::TooLarge { key, usable })
        }
        asked => Ok(asked),
    }
}

/// Returns the first page and the length of part `cpu` if `pages` pages are split as evenly as
/// possible.
fn part(pages: u64, cpu: u32, cpus: u32) -> (u64, u64) {
    let (cpu, cpus) = (u64::from(cpu), u64::from(cpus));
    let (each, more) = (pages / cpus, pages % cpus);
    let first = cpu * each + cpu.min(more);
    (first, each + u64::from(cpu < more))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(line: &str, usable: u64) -> Result<Layout, String> {
        let config = Config::parse(line).map_err(|error| error.to_string())?;
        Layout::new(&config, usable).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_divide_the_memory() {
        for (line, work, hot, cold) in [
            ("", 1000, 1000, 0),
            ("memory=400K", 100, 100, 0),
            ("memory=400K cold=40K", 90, 90, 10),
            ("memory=400K cold=40K hot=80K", 20, 20, 80),
            ("memory=400K pattern=hot", 100, 12, 0),
            ("memory=400K pattern=hot cold=40K hot=80K", 90, 20, 10),
        ] {
            assert_eq!(
                layout(line, 1000),
                Ok(Layout { work, hot, cold }),
                "for {line}"
            );
        }
    }

    #[test]
    fn keys_that_do_not_fit_are_named() {
        for (line, message) in [
            ("memory=8M", "memory: more than the 4000K that there is"),
            (
                "memory=4M cold=8M",
                "memory: more than the 4000K that there is",
            ),
            ("memory=1M cold=2M", "cold: more than the 1M that there is"),
            (
                "memory=1M cold=512K hot=1M",
                "hot: more than the 512K that there is",
            ),
            (
                "memory=1M cold=1M",
                "memory: must be a page or more for each vCPU",
            ),
            (
                "cpus=4 memory=12K",
                "memory: must be a page or more for each vCPU",
            ),
            ("selftest=cold", "selftest: must be given with cold"),
            (
                "cpus=4 hot=12K",
                "hot: must be a page or more for each vCPU",
            ),
        ] {
            assert_eq!(layout(line, 1000), Err(message.to_owned()), "for {line}");
        }
    }

    proptest! {
        #[test]
        fn shares_cover_the_area_without_overlap(
            cpus in 1u32..=16, work in 16u64..500, hot in 16u64..500, cold in 0u64..500
        ) {
            let layout = Layout { work, hot: hot.min(work), cold };
            let (mut work_at, mut cold_at) = (0, work);
            for cpu in 0..cpus {
                let share = layout.share(cpu, cpus);
                prop_assert_eq!((share.work_first, share.cold_first), (work_at, cold_at));
                prop_assert!(share.hot >= 1 && share.hot <= share.work);
                work_at += share.work;
                cold_at += share.cold;
            }
            prop_assert_eq!((work_at, cold_at), (work, layout.pages()));
        }
    }
}
