//! The header: the first bytes of every stream, in a form that every later version can read.
//!
//! ```text
//! "FERRYMIG" │ version u32 │ length u32 │ description, `length` bytes of JSON │ crc32 u32 of all before
//! ```

use std::io::{Read, Write};

use crate::description::Description;
use crate::wire::{FrameReader, FrameWriter, WireError};

const MAGIC: &[u8; 8] = b"FERRYMIG";
/// Version of everything behind the header. A destination reads its own version only.
pub const STREAM_VERSION: u32 = 2;
const DESCRIPTION_LIMIT: usize = 1 << 20;
/// Bytes of the checksum at the end of the header.
pub(crate) const CHECKSUM_BYTES: usize = 4;

/// Writes the header.
///
/// # Errors
/// Returns [`WireError`] if the description is too long, or if the stream fails.
pub(crate) fn write<W: Write>(
    writer: &mut FrameWriter<W>,
    description: &Description,
) -> Result<(), WireError> {
    writer.raw("the header", &encode(description, STREAM_VERSION)?)
}

fn encode(description: &Description, version: u32) -> Result<Vec<u8>, WireError> {
    let json = serde_json::to_vec(description).map_err(|e| WireError::Header(e.to_string()))?;
    let length = u32::try_from(json.len())
        .ok()
        .filter(|_| json.len() <= DESCRIPTION_LIMIT)
        .ok_or_else(|| WireError::Header(format!("a description of {} bytes", json.len())))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(json);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    Ok(bytes)
}

/// Reads the header and checks that this version understands what follows.
///
/// # Errors
/// Returns [`WireError`] if the stream fails, or if the header is damaged or of another version.
pub(crate) fn read<R: Read>(reader: &mut FrameReader<R>) -> Result<Description, WireError> {
    reader.message("header", |reader| parse(reader))
}

fn parse<R: Read>(reader: &mut FrameReader<R>) -> Result<Description, WireError> {
    let mut head = [0; 16];
    reader.raw("the header", &mut head)?;
    if &head[..8] != MAGIC {
        return Err(WireError::Header(format!(
            "it begins with {:02x?}; a Ferry stream begins with {MAGIC:02x?}",
            &head[..8]
        )));
    }
    let version = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    let length = u32::from_le_bytes([head[12], head[13], head[14], head[15]]) as usize;
    if length > DESCRIPTION_LIMIT {
        return Err(WireError::Header(format!(
            "its description has {length} bytes, at most {DESCRIPTION_LIMIT} are allowed"
        )));
    }
    let mut rest = vec![0; length + CHECKSUM_BYTES];
    reader.raw("the header", &mut rest)?;
    let (json, checksum) = rest.split_at(length);
    let mut actual = crc32fast::Hasher::new();
    actual.update(&head);
    actual.update(json);
    if actual.finalize().to_le_bytes() != checksum {
        return Err(WireError::Header(
            "its checksum does not fit its contents".into(),
        ));
    }
    if version != STREAM_VERSION {
        return Err(WireError::Header(format!(
            "stream version {version}, this Ferry reads version {STREAM_VERSION}{}",
            writer_of(json)
        )));
    }
    serde_json::from_slice(json)
        .map_err(|error| WireError::Header(format!("its description: {error}")))
}

/// Returns the writer of a stream of another version, if the description has it.
fn writer_of(json: &[u8]) -> String {
    serde_json::from_slice::<serde_json::Value>(json)
        .ok()
        .and_then(|value| Some(format!(" (written by {})", value.get("writer")?.as_str()?)))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::description::tests::description;

    fn read_bytes(bytes: &[u8]) -> Result<Description, WireError> {
        read(&mut FrameReader::new(bytes))
    }

    #[test]
    fn a_description_arrives_as_it_was_written() {
        let bytes = encode(&description(), STREAM_VERSION).unwrap();
        let found = read_bytes(&bytes).unwrap();
        assert_eq!(
            serde_json::to_value(found).unwrap(),
            serde_json::to_value(description()).unwrap()
        );
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_refused() {
        let whole = encode(&description(), STREAM_VERSION).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            read_bytes(&bytes).unwrap_err();
            read_bytes(&whole[..at]).unwrap_err();
        }
    }

    #[test]
    fn another_version_is_named_with_its_writer() {
        let error = read_bytes(&encode(&description(), 9).unwrap())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("version 9, this Ferry reads version 2"),
            "{error}"
        );
        assert!(error.contains("ferry test"), "{error}");
    }
}
