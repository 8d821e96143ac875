//! Changes fields in the header of a migration stream.
//!
//! Like [`frames`](crate::frames), this is a second implementation of the format, checksum included.

use serde_json::Value;

use crate::frames::{HEADER_CHECKSUM, HEADER_FIXED, MAGIC};

/// Change to a header. Its length and its checksum are updated to match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets the version of the stream.
    Version(u32),
    /// Sets a field of the description, named by a JSON pointer (RFC 6901).
    Field(&'static str, Value),
}

/// Why a header could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The header has no description.
    #[error("the header's description is no JSON")]
    Description(#[from] serde_json::Error),
    /// The description lacks the field.
    #[error("the header's description has no field {0}")]
    NoField(&'static str),
    /// The new description is longer than its length field allows.
    #[error("the header's description would have {0} bytes")]
    TooLong(usize),
}

/// Returns the size of the header at the beginning of `bytes`, or `None` if it is incomplete or not a Ferry header.
pub fn complete_length(bytes: &[u8]) -> Option<usize> {
    let fixed = bytes.get(..HEADER_FIXED)?;
    if !fixed.starts_with(MAGIC) {
        return None;
    }
    let length = HEADER_FIXED + word(fixed, 12) as usize + HEADER_CHECKSUM;
    (bytes.len() >= length).then_some(length)
}

/// Applies `change` to a whole header and returns the result.
///
/// # Errors
/// Returns [`HeaderError`] if the header lacks the field, or the new description is too long.
pub fn changed(header: &[u8], change: &Change) -> Result<Vec<u8>, HeaderError> {
    let mut version = word(header, 8);
    let end = header.len().saturating_sub(HEADER_CHECKSUM);
    let text = header.get(HEADER_FIXED..end).unwrap_or_default();
    let mut description: Value = serde_json::from_slice(text)?;
    match change {
        Change::Version(other) => version = *other,
        Change::Field(pointer, value) => {
            let field = description.pointer_mut(pointer);
            *field.ok_or(HeaderError::NoField(pointer))? = value.clone();
        }
    }
    let text = description.to_string();
    let length = u32::try_from(text.len()).map_err(|_| HeaderError::TooLong(text.len()))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.extend(crc32(&bytes).to_le_bytes());
    Ok(bytes)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    u32::from_le_bytes(found.unwrap_or_default())
}

/// Computes the CRC-32 of IEEE 802.3 (reflected). It goes bit by bit, because headers are short.
fn crc32(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0xedb8_8320;
    let step = |sum: u32, _| (sum >> 1) ^ (POLYNOMIAL * (sum & 1));
    !bytes
        .iter()
        .fold(!0, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn header() -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(1_u32.to_le_bytes());
        let text = json!({"page_size": 4096, "memory": [{"start": 0}]}).to_string();
        bytes.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(crc32(&bytes).to_le_bytes());
        bytes
    }

    #[test]
    fn the_checksum_is_the_common_one() {
        // The standard check value of CRC-32.
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_header_is_complete_with_its_last_byte_and_not_before() {
        let mut bytes = header();
        let length = bytes.len();
        assert_eq!(complete_length(&bytes[..length - 1]), None);
        bytes.extend(b"a frame");
        assert_eq!(complete_length(&bytes), Some(length));
        bytes[0] ^= 1;
        assert_eq!(complete_length(&bytes), None);
    }

    #[test]
    fn only_what_was_meant_is_changed() {
        let version = changed(&header(), &Change::Version(9)).unwrap();
        assert_eq!((version.len(), word(&version, 8)), (header().len(), 9));
        let field = Change::Field("/memory/0/start", json!("elsewhere"));
        let other = changed(&header(), &field).unwrap();
        assert_eq!(complete_length(&other), Some(other.len()));
        assert!(String::from_utf8_lossy(&other).contains("\"start\":\"elsewhere\""));
        assert_eq!(word(&other, 8), 1);
        let (sum, end) = (word(&other, other.len() - 4), other.len() - 4);
        assert_eq!(sum, crc32(&other[..end]));
    }

    #[test]
    fn a_field_that_is_not_there_is_named() {
        let error = changed(&header(), &Change::Field("/disks", json!(0))).unwrap_err();
        assert!(error.to_string().contains("/disks"), "{error}");
    }
}
