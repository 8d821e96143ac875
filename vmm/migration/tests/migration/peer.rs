//! A destination that speaks the protocol by hand, to say what no honest one says.

use std::io::{Read, Write};

use migration::{Halves, Stream, Tag};

/// Answers a source as a destination does, but says ALIVE for ever instead of `kept_back`.
pub(crate) fn alive_instead_of(kept_back: Tag, stream: impl Stream) {
    let Halves {
        mut reader,
        mut writer,
        end: _open,
    } = stream.split().unwrap();
    // The source ends the connection at some point, which is how this ends.
    let _ended = answer(kept_back, &mut reader, &mut writer);
}

fn answer(kept_back: Tag, reader: &mut dyn Read, writer: &mut dyn Write) -> std::io::Result<()> {
    let mut fixed = [0; 16];
    reader.read_exact(&mut fixed)?;
    skip(reader, word(&fixed, 12) + 4)?;
    let (mut sequence, mut due) = (0, Some(Tag::Accept));
    loop {
        if let Some(reply) = due {
            if reply == kept_back {
                loop {
                    writer.write_all(&frame(Tag::Alive, sequence))?;
                    sequence += 1;
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
            writer.write_all(&frame(reply, sequence))?;
            sequence += 1;
        }
        reader.read_exact(&mut fixed)?;
        skip(reader, word(&fixed, 4))?;
        due = match word(&fixed, 0) {
            tag if tag == Tag::RoundEnd as u32 => Some(Tag::RoundAck),
            tag if tag == Tag::Finish as u32 => Some(Tag::Ready),
            tag if tag == Tag::Commit as u32 => Some(Tag::Done),
            _ => None,
        };
    }
}

/// A frame without payload.
fn frame(tag: Tag, sequence: u32) -> Vec<u8> {
    let words = [tag as u32, 0, sequence];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn skip(reader: &mut dyn Read, count: u32) -> std::io::Result<()> {
    let mut bytes = vec![0; count as usize];
    reader.read_exact(&mut bytes)
}
