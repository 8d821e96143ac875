//! How the state of a device is saved: numbered fields in a CBOR map, and the version of the set of fields.
//!
//! # Compatibility
//!
//! Saved state is read by other builds than the one that wrote it: a guest migrates between hosts that are upgraded one
//! after the other, and a snapshot file may be read years later. These rules hold for every type that implements
//! [`SavedState`]:
//!
//! - The version rises when a field is added that an older reader must not ignore.
//! - A reader refuses a newer version.
//! - A field number that a reader does not know is ignored.
//! - A missing field is an error unless its type is `Option` or the field is marked `#[cbor(default)]`.
//! - A number is never reused, not even after its field has been removed.

use minicbor::{Decode, Decoder, Encode};

/// A struct whose fields are saved by number, so that builds with other fields can read it.
///
/// Derive `Encode` and `Decode` with `#[cbor(map)]` and give each field its number with `#[n(…)]`. An implementation of
/// `Encode` must not return an error of its own.
///
/// The [module documentation](self) lists the rules for changes.
pub trait SavedState: Encode<()> + for<'b> Decode<'b, ()> {
    /// Version of the set of fields, from 1 on.
    const VERSION: u16;
}

/// Reason for which saved state cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A newer build wrote the state.
    #[error(
        "version {found} is too new: this build reads versions up to {supported} (use a newer build)"
    )]
    NewerVersion {
        /// Version of the saved state.
        found: u16,
        /// Newest version that this build reads.
        supported: u16,
    },
    /// The bytes are not CBOR, or a field is missing or has the wrong type.
    #[error("undecodable: {0}")]
    Undecodable(#[from] minicbor::decode::Error),
    /// Bytes follow the end of the state.
    #[error("{0} bytes follow the end of the state")]
    TrailingBytes(usize),
}

/// Encodes `state`. The caller stores [`SavedState::VERSION`] with the bytes.
#[must_use]
pub fn encode_state<T: SavedState>(state: &T) -> Vec<u8> {
    match minicbor::to_vec(state) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("SavedState forbids encoders that fail: {error}"),
    }
}

/// Decodes state that was saved as `version`.
///
/// # Errors
/// Returns [`StateError`] if the version is newer than [`SavedState::VERSION`], a field is missing or has the wrong
/// type, or bytes follow the state.
pub fn decode_state<T: SavedState>(version: u16, bytes: &[u8]) -> Result<T, StateError> {
    if version > T::VERSION {
        return Err(StateError::NewerVersion {
            found: version,
            supported: T::VERSION,
        });
    }
    let mut decoder = Decoder::new(bytes);
    let state = decoder.decode()?;
    match bytes.len() - decoder.position() {
        0 => Ok(state),
        left => Err(StateError::TrailingBytes(left)),
    }
}

#[cfg(test)]
mod tests {
    use minicbor::Encoder;

    use super::*;

    #[derive(Debug, PartialEq, Encode, Decode)]
    #[cbor(map)]
    struct Sample {
        #[n(0)]
        number: u32,
        #[n(1)]
        #[cbor(with = "minicbor::bytes")]
        bytes: Vec<u8>,
        #[n(2)]
        later: Option<bool>,
        #[n(4)]
        #[cbor(default)]
        defaulted: u8,
    }

    impl SavedState for Sample {
        const VERSION: u16 = 3;
    }

    fn sample() -> Sample {
        Sample {
            number: 70_000,
            bytes: vec![1, 2, 3],
            later: Some(true),
            defaulted: 9,
        }
    }

    /// A CBOR map of `fields` pairs, of which `write` writes keys and values.
    fn map(fields: u64, write: impl FnOnce(&mut Encoder<Vec<u8>>)) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new());
        encoder.map(fields).unwrap();
        write(&mut encoder);
        encoder.into_writer()
    }

    #[test]
    fn a_round_trip_returns_the_state() {
        let bytes = encode_state(&sample());
        for version in 1..=3 {
            assert_eq!(decode_state::<Sample>(version, &bytes).unwrap(), sample());
        }
    }

    #[test]
    fn an_unknown_field_is_ignored_and_an_optional_one_may_be_missing() {
        let bytes = map(3, |encoder| {
            encoder.u8(7).unwrap().str("from a newer build").unwrap();
            encoder.u8(1).unwrap().bytes(&[4]).unwrap();
            encoder.u8(0).unwrap().u8(5).unwrap();
        });
        let decoded: Sample = decode_state(1, &bytes).unwrap();
        let expected = Sample {
            number: 5,
            bytes: vec![4],
            later: None,
            defaulted: 0,
        };
        assert_eq!(decoded, expected);
    }

    #[test]
    fn a_missing_field_is_named() {
        let bytes = map(1, |encoder| {
            encoder.u8(0).unwrap().u8(5).unwrap();
        });
        let error = decode_state::<Sample>(1, &bytes).unwrap_err().to_string();
        assert!(
            error.contains("index 1") && error.contains("bytes"),
            "{error}"
        );
    }

    #[test]
    fn a_newer_version_is_refused() {
        let error = decode_state::<Sample>(4, &encode_state(&sample())).unwrap_err();
        assert!(matches!(
            error,
            StateError::NewerVersion {
                found: 4,
                supported: 3
            }
        ));
        assert!(error.to_string().contains("version 4 is too new"));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = encode_state(&sample());
        bytes.extend([0, 0]);
        let error = decode_state::<Sample>(3, &bytes).unwrap_err();
        assert!(matches!(error, StateError::TrailingBytes(2)), "{error}");
    }

    #[test]
    fn truncated_and_foreign_bytes_are_refused() {
        let bytes = encode_state(&sample());
        for end in 0..bytes.len() {
            decode_state::<Sample>(3, &bytes[..end]).unwrap_err();
        }
        for foreign in [&b"text"[..], &[0x80], &[0xa1, 0x00, 0x61, b'x'], &[0xff]] {
            let error = decode_state::<Sample>(3, foreign).unwrap_err();
            assert!(matches!(error, StateError::Undecodable(_)), "{error}");
        }
        // Lengths far beyond the input must not be allocated.
        for huge in [
            &[0xbb, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff][..],
            &[
                0xa1, 0x01, 0x5b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            ],
        ] {
            decode_state::<Sample>(3, huge).unwrap_err();
        }
    }
}
