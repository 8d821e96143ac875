//! Parses and prints sizes in bytes, as users write them.

/// Parses a number of bytes with an optional suffix K, M, G or T (powers of 1024).
///
/// # Errors
/// Returns a message for the user if `text` is not such a number, or does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| {
        format!("{text:?} is not a size: write a number, followed by K, M, G or T if needed")
    })?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}

/// Formats a size with the largest suffix of [`parse_size`] that leaves a whole number, or as `N bytes` if none does.
#[must_use]
pub fn size_text(bytes: u64) -> String {
    let suffixes = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let whole = |(shift, _): &&(u32, &str)| bytes != 0 && bytes.trailing_zeros() >= *shift;
    match suffixes.iter().find(whole) {
        Some((shift, suffix)) => format!("{}{suffix}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_they_are_read() {
        for text in ["1K", "4K", "127M", "1536M", "3G", "16384T"] {
            assert_eq!(size_text(parse_size(text).unwrap()), text);
        }
        assert_eq!(size_text(0), "0 bytes");
        assert_eq!(size_text(4097), "4097 bytes");
    }

    #[test]
    fn sizes_are_read_with_their_suffix() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        for text in ["", "M", "-1", "1.5G", "12 M", "99999999T", "64MiB"] {
            parse_size(text).unwrap_err();
        }
    }
}
