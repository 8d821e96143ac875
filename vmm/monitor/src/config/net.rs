//! Network interfaces in a guest's configuration.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{ConfigError, RateLimiterConfig};

/// Configuration of a network interface, which is connected to a tap by name or by a passed descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct NetConfig {
    /// Name of the tap, which must exist.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tap: Option<String>,
    /// Number of the descriptor of an open tap. The list has exactly one element.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fds: Option<Vec<i32>>,
    /// MAC address of the guest. The default is a random address.
    #[serde(default = "MacAddress::random")]
    pub mac: MacAddress,
    /// MTU that the device reports to the guest, in bytes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mtu: Option<u16>,
    /// Limits that apply to reception and to transmission separately.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}

impl NetConfig {
    /// Checks the values of the interface. `path` is its path in the JSON, for error messages.
    pub(super) fn check(&self, path: &str) -> Result<(), ConfigError> {
        let descriptors = self.fds.as_deref().unwrap_or_default();
        match (&self.tap, descriptors) {
            (Some(_), []) | (None, [_]) => {}
            (None, []) => {
                return Err(ConfigError::new(
                    format!("{path}.tap"),
                    "an interface needs a tap: its name or a descriptor",
                ));
            }
            (Some(_), _) => {
                let why = "give either the name of the tap or its descriptor, not both";
                return Err(ConfigError::new(format!("{path}.fds"), why));
            }
            (None, _) => {
                return Err(ConfigError::new(
                    format!("{path}.fds"),
                    "exactly one descriptor is needed: an interface has one pair of queues",
                ));
            }
        }
        // RFC 791: every host must accept packets of 68 bytes.
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(ConfigError::new(
                format!("{path}.mtu"),
                "an MTU is 68 bytes or more",
            ));
        }
        let limiter = self.rate_limiter_config.unwrap_or_default();
        limiter.check(&format!("{path}.rate_limiter_config"))
    }
}

/// MAC address of a network interface, written as `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Returns a random MAC address that is unicast and locally administered.
    #[must_use]
    pub fn random() -> Self {
        // The keys of the standard library's hasher are random bytes of the kernel, and differ for each instance.
        let [first, rest @ .., _, _] = RandomState::new().hash_one(()).to_le_bytes();
        let mut bytes = [first & 0xfc | 0x02; 6];
        bytes[1..].copy_from_slice(&rest);
        Self(bytes)
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a MAC address such as 52:54:00:12:34:56");
        let parts: Vec<&str> = text.split(':').collect();
        let parts: [&str; 6] = parts.try_into().map_err(|_| wrong())?;
        let mut bytes = [0; 6];
        for (byte, part) in bytes.iter_mut().zip(parts) {
            let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| digits)
                .ok_or_else(wrong)?;
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!("{text} is not a unicast address"));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_written_as_it_is_read() {
        let text = "52:54:00:ab:cd:ef";
        assert_eq!(text.parse::<MacAddress>().unwrap().to_string(), text);
        for text in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:ef:01",
            "52:54:00:ab:cd:+f",
        ] {
            text.parse::<MacAddress>().unwrap_err();
        }
    }
}
