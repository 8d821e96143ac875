//! Parsers of option values that are more than a number or a path.

use std::fmt;
use std::path::PathBuf;

use vmm::config::{MemoryConfig, SerialConfig, SerialMode};
use vmm::migrate::check_socket_path;
use vmm::size::parse_size;

/// A file or socket, named by its path or by the number of an inherited descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DescriptorOrPath {
    Path(PathBuf),
    Fd(i32),
}

impl fmt::Display for DescriptorOrPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Fd(number) => write!(f, "fd={number}"),
        }
    }
}

/// Parses `PATH`, `path=PATH` or `fd=N`.
pub(super) fn parse_descriptor_or_path(text: &str) -> Result<DescriptorOrPath, String> {
    match text.strip_prefix("fd=") {
        Some(number) => number
            .parse()
            .map(DescriptorOrPath::Fd)
            .map_err(|_| format!("{number:?} is not the number of a file descriptor")),
        None => match text.strip_prefix("path=").unwrap_or(text) {
            "" => Err("the path is empty: give PATH or fd=N".into()),
            path => Ok(DescriptorOrPath::Path(path.into())),
        },
    }
}

/// Parses `PATH` or `path=PATH` of a Unix socket.
pub(super) fn parse_socket(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("path=").unwrap_or(text) {
        "" => Err("the path of the socket is empty".into()),
        path => check_socket_path(path.as_ref())
            .map(|()| path.into())
            .map_err(|error| error.to_string()),
    }
}

/// Parses `SIZE[,shared=on|off][,hugepages=on|off]`.
pub(super) fn parse_memory(text: &str) -> Result<MemoryConfig, String> {
    let mut parts = text.split(',');
    let first = parts.next().unwrap_or_default();
    let mut memory = MemoryConfig {
        size: parse_size(first.strip_prefix("size=").unwrap_or(first))?,
        ..MemoryConfig::default()
    };
    for part in parts {
        match part.split_once('=') {
            Some(("shared", value)) => memory.shared = parse_switch(part, value)?,
            Some(("hugepages", value)) => memory.hugepages = parse_switch(part, value)?,
            _ => {
                return Err(format!(
                    "{part:?} is unknown: use shared=on|off or hugepages=on|off"
                ));
            }
        }
    }
    Ok(memory)
}

/// Parses the `value` on or off. An error names the whole `part` that it belongs to.
pub(super) fn parse_switch(part: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{part:?}: the value must be on or off")),
    }
}

/// Parses `stdio`, `null` or `file:PATH`.
pub(super) fn parse_serial(text: &str) -> Result<SerialConfig, String> {
    let file = text
        .strip_prefix("file:")
        .or_else(|| text.strip_prefix("file="));
    let (mode, file) = match (text, file) {
        ("stdio" | "tty", _) => (SerialMode::Tty, None),
        ("null" | "off", _) => (SerialMode::Null, None),
        (_, Some(path)) if !path.is_empty() => (SerialMode::File, Some(path.into())),
        _ => return Err(format!("{text:?} is unknown: use stdio, null or file:PATH")),
    };
    Ok(SerialConfig { mode, file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_path_or_a_descriptor() {
        assert_eq!(
            parse_descriptor_or_path("fd=7"),
            Ok(DescriptorOrPath::Fd(7))
        );
        for text in ["/x", "path=/x"] {
            assert_eq!(
                parse_descriptor_or_path(text),
                Ok(DescriptorOrPath::Path("/x".into()))
            );
        }
        for text in ["", "path=", "fd=", "fd=x"] {
            parse_descriptor_or_path(text).unwrap_err();
        }
    }

    #[test]
    fn memory_is_read_with_its_options() {
        let memory = parse_memory("1G,hugepages=on").unwrap();
        assert_eq!(
            memory,
            MemoryConfig {
                size: 1 << 30,
                shared: true,
                hugepages: true
            }
        );
        assert!(!parse_memory("size=64M,shared=off").unwrap().shared);
        for text in ["", "1G,", "1G,shared", "1G,shared=yes", "1G,zones=on"] {
            parse_memory(text).unwrap_err();
        }
    }
}
