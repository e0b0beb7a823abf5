//! The models that a replica holds or loads: the payload of MODELS, names of `len u16, name` one after the other.

use bytes::{BufMut, BytesMut};

use super::{Cursor, WireError};

/// Appends the names; one of more than 65,535 bytes is left out.
pub fn put_models<'n>(out: &mut BytesMut, names: impl Iterator<Item = &'n [u8]>) {
    for name in names {
        if let Ok(len) = u16::try_from(name.len()) {
            out.put_u16_le(len);
            out.put_slice(name);
        }
    }
}

/// Reads the names.
///
/// # Errors
/// [`WireError::Malformed`] when lengths do not add up.
pub fn models(payload: &[u8]) -> Result<Vec<&[u8]>, WireError> {
    let mut at = Cursor::new(payload, "models");
    let mut names = Vec::new();
    while at.at < payload.len() {
        let len = usize::from(at.u16()?);
        names.push(at.take(len)?);
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn names_read_back(names in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..8)) {
            let mut out = BytesMut::new();
            put_models(&mut out, names.iter().map(Vec::as_slice));
            prop_assert_eq!(models(&out)?, names);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = models(&bytes);
        }
    }
}
