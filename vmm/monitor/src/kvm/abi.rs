//! Encodes the structs of KVM in saved state, as the bytes of the kernel's ABI (include/uapi/linux/kvm.h, asm/kvm.h).
//!
//! The kernel only appends fields to these structs, and a zero in an appended field means "as before". A shorter struct
//! of an older build is therefore extended with zeros. A longer struct of a newer build is accepted if the bytes that
//! are unknown here are zero.

use minicbor::decode::{Decoder, Error as DecodeError};
use minicbor::encode::{Encoder, Error as EncodeError, Write};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Encodes one struct, for `#[cbor(with = "abi")]`.
pub(super) fn encode<C, T: IntoBytes + Immutable, W: Write>(
    value: &T,
    encoder: &mut Encoder<W>,
    _: &mut C,
) -> Result<(), EncodeError<W::Error>> {
    encoder.bytes(value.as_bytes())?.ok()
}

/// Decodes one struct, for `#[cbor(with = "abi")]`.
///
/// # Errors
/// Returns an error if the item is not a byte string, or has nonzero bytes beyond the size of the struct.
pub(super) fn decode<C, T: FromBytes + IntoBytes>(
    decoder: &mut Decoder<'_>,
    _: &mut C,
) -> Result<T, DecodeError> {
    let position = decoder.position();
    let found = decoder.bytes()?;
    let mut value = T::new_zeroed();
    let bytes = value.as_mut_bytes();
    let common = found.len().min(bytes.len());
    if found[common..].iter().any(|byte| *byte != 0) {
        let message = format!(
            "a KVM struct of {} bytes has contents beyond its {} bytes here",
            found.len(),
            bytes.len()
        );
        return Err(DecodeError::message(message).at(position));
    }
    bytes[..common].copy_from_slice(&found[..common]);
    Ok(value)
}

/// Encodes and decodes lists of structs, for `#[cbor(with = "abi::list")]`.
pub(super) mod list {
    use super::{
        DecodeError, Decoder, EncodeError, Encoder, FromBytes, Immutable, IntoBytes, Write,
    };

    /// Encodes a list.
    pub(in super::super) fn encode<C, T: IntoBytes + Immutable, W: Write>(
        values: &[T],
        encoder: &mut Encoder<W>,
        context: &mut C,
    ) -> Result<(), EncodeError<W::Error>> {
        encoder.array(values.len() as u64)?;
        values
            .iter()
            .try_for_each(|value| super::encode(value, encoder, context))
    }

    /// Decodes a list. The vector grows as the items are decoded, so that a false length does not allocate memory.
    ///
    /// # Errors
    /// Returns an error if the list has no length, or an item cannot be decoded.
    pub(in super::super) fn decode<C, T: FromBytes + IntoBytes>(
        decoder: &mut Decoder<'_>,
        context: &mut C,
    ) -> Result<Vec<T>, DecodeError> {
        let position = decoder.position();
        let length = decoder
            .array()?
            .ok_or_else(|| DecodeError::message("a list without a length").at(position))?;
        (0..length)
            .map(|_| super::decode(decoder, context))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_mp_state, kvm_regs};
    use minicbor::{Decode, Encode};

    use super::super::abi;

    #[derive(Debug, PartialEq, Encode, Decode)]
    #[cbor(map)]
    struct Sample {
        #[n(0)]
        #[cbor(with = "abi")]
        regs: kvm_regs,
        #[n(1)]
        #[cbor(with = "abi::list")]
        states: Vec<kvm_mp_state>,
    }

    fn sample() -> Sample {
        Sample {
            regs: kvm_regs {
                rip: 0x1234,
                rflags: 2,
                ..Default::default()
            },
            states: vec![kvm_mp_state { mp_state: 3 }, kvm_mp_state { mp_state: 1 }],
        }
    }

    fn with_regs(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = minicbor::Encoder::new(Vec::new());
        encoder.map(2).unwrap();
        encoder.u8(0).unwrap().bytes(bytes).unwrap();
        encoder.u8(1).unwrap().array(0).unwrap();
        encoder.into_writer()
    }

    #[test]
    fn structs_and_lists_come_back() {
        let bytes = minicbor::to_vec(sample()).unwrap();
        assert_eq!(minicbor::decode::<Sample>(&bytes).unwrap(), sample());
    }

    #[test]
    fn fields_that_an_older_kernel_lacked_are_zero() {
        let shorter: Sample = minicbor::decode(&with_regs(&[7; 8])).unwrap();
        assert_eq!(shorter.regs.rax, 0x0707_0707_0707_0707);
        assert_eq!(shorter.regs.rip, 0);
    }

    #[test]
    fn fields_that_are_not_known_here_must_be_zero() {
        let size = size_of::<kvm_regs>();
        let mut longer = vec![0; size + 8];
        minicbor::decode::<Sample>(&with_regs(&longer)).unwrap();
        longer[size + 3] = 1;
        let error = minicbor::decode::<Sample>(&with_regs(&longer)).unwrap_err();
        assert!(error.to_string().contains("beyond its"), "{error}");
    }

    #[test]
    fn a_false_length_is_an_error_and_no_allocation() {
        let mut encoder = minicbor::Encoder::new(Vec::new());
        encoder.map(2).unwrap();
        encoder.u8(0).unwrap().bytes(&[]).unwrap();
        encoder.u8(1).unwrap().array(u64::MAX).unwrap();
        minicbor::decode::<Sample>(&encoder.into_writer()).unwrap_err();
    }
}
