//! The dirtier's configuration. The host formats it as a kernel command line and the guest parses it.

use core::fmt;
use core::str::FromStr;

use super::Size;
use crate::interface::MAX_CPUS;

/// Maximum of `rate` and `tsc_khz`, so that their product cannot overflow.
const RATE_MOST: u64 = 1 << 32;

/// Configuration of the dirtier.
///
/// Set the fields that matter and take the rest from the default:
///
/// ```
/// use guest_images::dirtier::{Config, Pattern, Size};
///
/// let config = Config {
///     cpus: 2,
///     pattern: Pattern::Random,
///     memory: Some(Size::from_mib(64)),
///     ..Config::default()
/// };
/// assert_eq!(config.command_line().unwrap(), "cpus=2 pattern=random memory=64M");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `cpus=`: number of vCPUs that work, 1 to 16. More than one requires a monitor that supports the
    /// direct start.
    pub cpus: u32,
    /// `pattern=`: order in which pages are written.
    pub pattern: Pattern,
    /// `memory=`: size of the area over all vCPUs. Default: all usable RAM.
    pub memory: Option<Size>,
    /// `hot=`: size of the hot set of [`Pattern::Hot`] (default: an eighth of the working set). With
    /// other patterns, size of the working set; all other pages are cold.
    pub hot: Option<Size>,
    /// `cold=`: part of `memory` that is stamped once, with iteration 1, and then only audited.
    pub cold: Option<Size>,
    /// `rate=`: pages written per second over all vCPUs, with any pattern. Requires `tsc_khz`.
    pub rate: Option<u64>,
    /// `tsc_khz=`: frequency of the time-stamp counter in kHz.
    pub tsc_khz: Option<u64>,
    /// `passes=`: number of passes before the audit, including the first one, which populates.
    pub passes: Option<u64>,
    /// `seed=`: seed of the pseudo-random orders.
    pub seed: u64,
    /// `serial=`: whether commands are read from the serial port.
    pub serial: bool,
    /// `quiet`: print only faults, the verdict and answers to commands.
    pub quiet: bool,
    /// `selftest=`: corruption of the guest's own memory that the guest must detect.
    pub selftest: Option<Selftest>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cpus: 1,
            pattern: Pattern::Sequential,
            memory: None,
            hot: None,
            cold: None,
            rate: None,
            tsc_khz: None,
            passes: None,
            seed: 0,
            serial: true,
            quiet: false,
            selftest: None,
        }
    }
}

/// Order in which pages are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pattern {
    /// Every page once per pass, in ascending order.
    #[default]
    Sequential,
    /// Every page once per pass, in a pseudo-random order that differs between passes.
    Random,
    /// The hot set once per pass, and one sixteenth of the other pages per pass, in turn.
    Hot,
    /// Like `Sequential`, but `rate=` is required.
    Rate,
}

/// Corruption of memory that the guest causes once, to test that the dirtier detects it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selftest {
    /// After pass 3, one page gets its contents of pass 2 back.
    Lost,
    /// After pass 3, the tail of one page gets its contents of pass 2 back.
    Torn,
    /// After pass 3, one cold page is zeroed. Only the audit can detect it.
    Cold,
    /// After pass 3, the recorded state of the loop gets an older value back.
    State,
    /// After pass 3, the guest executes an undefined instruction.
    Crash,
}

/// An enumeration whose values are words on the command line.
trait Words: Sized + Copy + PartialEq + 'static {
    /// The words and their values.
    const WORDS: &'static [(&'static str, Self)];
    /// List of the words for error messages.
    const CHOICE: &'static str;

    /// Returns the word of a value.
    fn word(self) -> &'static str {
        Self::WORDS
            .iter()
            .find(|(_, value)| *value == self)
            .map_or("", |(word, _)| word)
    }

    /// Returns the value of a word.
    fn find(word: &str) -> Option<Self> {
        Self::WORDS
            .iter()
            .find(|(known, _)| *known == word)
            .map(|(_, value)| *value)
    }
}

impl Words for Pattern {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("sequential", Self::Sequential),
        ("random", Self::Random),
        ("hot", Self::Hot),
        ("rate", Self::Rate),
    ];
    const CHOICE: &'static str = "sequential, random, hot or rate";
}

impl Words for Selftest {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("lost", Self::Lost),
        ("torn", Self::Torn),
        ("cold", Self::Cold),
        ("state", Self::State),
        ("crash", Self::Crash),
    ];
    const CHOICE: &'static str = "lost, torn, cold, state or crash";
}

impl Words for bool {
    const WORDS: &'static [(&'static str, Self)] = &[("on", true), ("off", false)];
    const CHOICE: &'static str = "on or off";
}

impl fmt::Display for Pattern {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.word())
    }
}

impl FromStr for Pattern {
    type Err = ConfigError<'static>;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::find(word).ok_or(ConfigError::Unsuitable {
            key: "pattern",
            needed: Self::CHOICE,
        })
    }
}

impl fmt::Display for Selftest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.word())
    }
}

/// Errors of a command line or a [`Config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigError<'a> {
    /// The key is unknown.
    UnknownKey(&'a str),
    /// The key is given twice.
    Repeated(&'a str),
    /// The value of the key cannot be parsed.
    BadValue {
        /// The key.
        key: &'a str,
        /// Its value.
        value: &'a str,
        /// Description of valid values.
        needed: &'static str,
    },
    /// The value of the key is out of range or contradicts another key.
    Unsuitable {
        /// The key.
        key: &'static str,
        /// Description of valid values.
        needed: &'static str,
    },
    /// The key asks for more memory than is usable.
    TooLarge {
        /// The key.
        key: &'static str,
        /// Usable memory.
        usable: Size,
    },
}

impl fmt::Display for ConfigError<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey(key) => write!(out, "{key}: unknown key"),
            Self::Repeated(key) => write!(out, "{key}: given twice"),
            Self::BadValue { key, value, needed } => {
                write!(out, "{key}: must be {needed}, found \"{value}\"")
            }
            Self::Unsuitable { key, needed } => write!(out, "{key}: must be {needed}"),
            Self::TooLarge { key, usable } => {
                write!(out, "{key}: more than the {usable} that there is")
            }
        }
    }
}

impl core::error::Error for ConfigError<'_> {}

impl fmt::Display for Config {
    /// Writes the shortest command line for this configuration.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "cpus={} pattern={}", self.cpus, self.pattern)?;
        write_optional(out, "memory", self.memory)?;
        write_optional(out, "hot", self.hot)?;
        write_optional(out, "cold", self.cold)?;
        write_optional(out, "rate", self.rate)?;
        write_optional(out, "tsc_khz", self.tsc_khz)?;
        write_optional(out, "passes", self.passes)?;
        write_optional(out, "seed", (self.seed != 0).then_some(self.seed))?;
        write_optional(out, "serial", (!self.serial).then_some(self.serial.word()))?;
        write_optional(out, "selftest", self.selftest)?;
        out.write_str(if self.quiet { " quiet" } else { "" })
    }
}

fn write_optional(
    out: &mut fmt::Formatter<'_>,
    key: &str,
    value: Option<impl fmt::Display>,
) -> fmt::Result {
    value.map_or(Ok(()), |value| write!(out, " {key}={value}"))
}

impl Config {
    /// Parses a command line. Words are separated by white space and may be in any order.
    ///
    /// Keys that contain a dot are ignored, because monitors add such keys for Linux
    /// (`virtio_mmio.device=…`).
    ///
    /// # Errors
    /// Returns [`ConfigError`] for the first invalid word.
    pub fn parse(line: &str) -> Result<Self, ConfigError<'_>> {
        let mut config = Self::default();
        for (index, word) in line.split_ascii_whitespace().enumerate() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            if key.contains('.') {
                continue;
            }
            if line
                .split_ascii_whitespace()
                .take(index)
                .any(|earlier| key_of(earlier) == key)
            {
                return Err(ConfigError::Repeated(key));
            }
            config.set(word, key, value)?;
        }
        config.check()?;
        Ok(config)
    }

    fn set<'a>(
        &mut self,
        word: &'a str,
        key: &'a str,
        value: &'a str,
    ) -> Result<(), ConfigError<'a>> {
        let bad = |needed| ConfigError::BadValue { key, value, needed };
        let number = || decimal(value).ok_or(bad("a decimal number"));
        let size = || {
            value
                .parse::<Size>()
                .map_err(|_| bad("a multiple of 4K such as 64M, 4K or 1G"))
        };
        match key {
            "cpus" => self.cpus = u32::try_from(number()?).unwrap_or(u32::MAX),
            "pattern" => self.pattern = Pattern::find(value).ok_or(bad(Pattern::CHOICE))?,
            "memory" => self.memory = Some(size()?),
            "hot" => self.hot = Some(size()?),
            "cold" => self.cold = Some(size()?),
            "rate" => self.rate = Some(number()?),
            "tsc_khz" => self.tsc_khz = Some(number()?),
            "passes" => self.passes = Some(number()?),
            "seed" => self.seed = number()?,
            "serial" => self.serial = bool::find(value).ok_or(bad(bool::CHOICE))?,
            "selftest" => self.selftest = Some(Selftest::find(value).ok_or(bad(Selftest::CHOICE))?),
            "quiet" if word == "quiet" => self.quiet = true,
            "quiet" => return Err(bad("without a value")),
            _ => return Err(ConfigError::UnknownKey(key)),
        }
        Ok(())
    }

    /// Checks the values that do not depend on the machine.
    ///
    /// # Errors
    /// Returns [`ConfigError::Unsuitable`] for the first invalid value.
    pub fn check(&self) -> Result<(), ConfigError<'static>> {
        let paced = self.rate.is_some();
        let checks = [
            ("cpus", "1 to 16", (1..=MAX_CPUS).contains(&self.cpus)),
            (
                "memory",
                "more than nothing",
                self.memory.is_none_or(|size| size.pages() > 0),
            ),
            (
                "hot",
                "more than nothing",
                self.hot.is_none_or(|size| size.pages() > 0),
            ),
            (
                "rate",
                "1 to 4294967296",
                self.rate.is_none_or(|n| (1..=RATE_MOST).contains(&n)),
            ),
            (
                "rate",
                "given with pattern=rate",
                paced || self.pattern != Pattern::Rate,
            ),
            (
                "tsc_khz",
                "given with rate",
                self.tsc_khz.is_some() || !paced,
            ),
            (
                "tsc_khz",
                "1 to 4294967296",
                self.tsc_khz.is_none_or(|n| (1..=RATE_MOST).contains(&n)),
            ),
            ("passes", "1 or more", self.passes.is_none_or(|n| n > 0)),
        ];
        match checks.into_iter().find(|(_, _, good)| !good) {
            Some((key, needed, _)) => Err(ConfigError::Unsuitable { key, needed }),
            None => Ok(()),
        }
    }
}

fn key_of(word: &str) -> &str {
    word.split_once('=').map_or(word, |(key, _)| key)
}

/// Parses decimal digits. Unlike `u64::from_str`, it refuses a plus sign.
pub(super) fn decimal(digits: &str) -> Option<u64> {
    if digits.bytes().all(|byte| byte.is_ascii_digit()) {
        digits.parse().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::option::of;
    use proptest::prelude::*;

    use super::*;

    fn sizes(least: u64) -> impl Strategy<Value = Option<Size>> {
        of((least..1 << 40).prop_map(|pages| Size::from_pages(pages).unwrap()))
    }

    fn patterns() -> impl Strategy<Value = Pattern> {
        prop::sample::select(vec![
            Pattern::Sequential,
            Pattern::Random,
            Pattern::Hot,
            Pattern::Rate,
        ])
    }

    fn selftests() -> impl Strategy<Value = Option<Selftest>> {
        of(prop::sample::select(
            Selftest::WORDS.iter().map(|(_, v)| *v).collect::<Vec<_>>(),
        ))
    }

    fn configs() -> impl Strategy<Value = Config> {
        (
            (1u32..=16, patterns(), sizes(1), sizes(1), sizes(0)),
            (1..=RATE_MOST, 1..=RATE_MOST, any::<bool>(), of(1u64..)),
            (any::<u64>(), any::<bool>(), any::<bool>(), selftests()),
        )
            .prop_map(|(what, when, how)| {
                let (cpus, pattern, memory, hot, cold) = what;
                let (rate, tsc_khz, paced, passes) = when;
                let (seed, serial, quiet, selftest) = how;
                let paced = paced || pattern == Pattern::Rate;
                let (rate, tsc_khz) = (paced.then_some(rate), paced.then_some(tsc_khz));
                let what = Config {
                    cpus,
                    pattern,
                    memory,
                    hot,
                    cold,
                    ..Config::default()
                };
                Config {
                    rate,
                    tsc_khz,
                    passes,
                    seed,
                    serial,
                    quiet,
                    selftest,
                    ..what
                }
            })
    }

    proptest! {
        #[test]
        fn a_command_line_is_parsed_to_the_same_configuration(config in configs()) {
            let line = config.command_line().unwrap();
            prop_assert_eq!(Config::parse(&line), Ok(config));
        }

        #[test]
        fn the_order_of_words_does_not_matter(config in configs()) {
            let line = config.command_line().unwrap();
            let words: Vec<&str> = line.split(' ').rev().collect();
            let reversed = words.join("  \t");
            prop_assert_eq!(Config::parse(&reversed), Ok(config));
        }

        #[test]
        fn any_line_is_parsed_without_a_panic(line in "\\PC*") {
            let _ = Config::parse(&line);
        }

        #[test]
        fn nearly_valid_lines_are_parsed_without_a_panic(
            line in "((cpus|memory|hot|cold|rate|passes|seed|quiet)=?[0-9]{0,21}[KMGT]? ?){0,5}"
        ) {
            if let Ok(config) = Config::parse(&line) {
                let again = config.command_line().unwrap();
                prop_assert_eq!(Config::parse(&again), Ok(config));
            }
        }
    }

    #[test]
    fn an_empty_line_is_the_default() {
        assert_eq!(Config::parse("  "), Ok(Config::default()));
    }

    #[test]
    fn words_that_monitors_add_for_linux_are_ignored() {
        let line = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=x passes=2";
        assert_eq!(Config::parse(line).map(|config| config.passes), Ok(Some(2)));
    }

    #[test]
    fn messages_name_the_key_and_its_valid_values() {
        for (line, message) in [
            ("speed=9", "speed: unknown key"),
            ("console", "console: unknown key"),
            ("cpus=2 cpus=2", "cpus: given twice"),
            ("cpus=0", "cpus: must be 1 to 16"),
            ("cpus=17", "cpus: must be 1 to 16"),
            ("cpus=99999999999", "cpus: must be 1 to 16"),
            ("cpus", "cpus: must be a decimal number, found \"\""),
            ("cpus=+1", "cpus: must be a decimal number, found \"+1\""),
            (
                "pattern=zigzag",
                "pattern: must be sequential, random, hot or rate, found \"zigzag\"",
            ),
            (
                "memory=64m",
                "memory: must be a multiple of 4K such as 64M, 4K or 1G, found \"64m\"",
            ),
            (
                "memory=4097",
                "memory: must be a multiple of 4K such as 64M, 4K or 1G, found \"4097\"",
            ),
            (
                "memory=16777216T",
                "memory: must be a multiple of 4K such as 64M, 4K or 1G, found \"16777216T\"",
            ),
            ("memory=0", "memory: must be more than nothing"),
            ("hot=0", "hot: must be more than nothing"),
            ("pattern=rate", "rate: must be given with pattern=rate"),
            ("rate=5", "tsc_khz: must be given with rate"),
            ("rate=0 tsc_khz=1", "rate: must be 1 to 4294967296"),
            ("passes=0", "passes: must be 1 or more"),
            ("serial=maybe", "serial: must be on or off, found \"maybe\""),
            ("quiet=yes", "quiet: must be without a value, found \"yes\""),
        ] {
            assert_eq!(
                Config::parse(line).unwrap_err().to_string(),
                message,
                "for {line}"
            );
        }
    }

    #[test]
    fn a_configuration_that_the_guest_would_refuse_gives_no_command_line() {
        let config = Config {
            cpus: 17,
            ..Config::default()
        };
        assert_eq!(
            config.command_line(),
            Err(ConfigError::Unsuitable {
                key: "cpus",
                needed: "1 to 16"
            })
        );
    }
}
