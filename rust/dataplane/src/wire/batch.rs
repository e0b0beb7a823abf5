//! Which streams run as one batch: the payload of BATCH, their ids one after the other.
//!
//! Each has come before, as a REQUEST or CALL with [`flag::BATCHED`].

use bytes::{BufMut, BytesMut};

use super::{Header, Kind, MAX_BATCH, WireError, flag, frame::put_with};

/// Appends the BATCH of these streams; `granted`: it uses a credit.
pub fn put_batch(out: &mut BytesMut, streams: &[u32], granted: bool) {
    debug_assert!((1..=MAX_BATCH).contains(&streams.len()), "a batch has requests, and not too many");
    let header = Header::new(Kind::Batch, 0).with(if granted { flag::GRANTED } else { 0 });
    put_with(out, header, |out| {
        for stream in streams {
            out.put_u32_le(*stream);
        }
    });
}

/// Reads the streams of a BATCH.
///
/// # Errors
/// [`WireError::Malformed`] if there are none, too many, or half of one.
pub fn batch(payload: &[u8]) -> Result<impl ExactSizeIterator<Item = u32>, WireError> {
    let (ids, rest) = payload.as_chunks::<4>();
    if !rest.is_empty() || ids.is_empty() || ids.len() > MAX_BATCH {
        return Err(WireError::Malformed("batch"));
    }
    Ok(ids.iter().map(|id| u32::from_le_bytes(*id)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::Decoder;

    proptest! {
        #[test]
        fn streams_read_back(streams in prop::collection::vec(any::<u32>(), 1..200), granted in any::<bool>()) {
            let mut out = BytesMut::new();
            put_batch(&mut out, &streams, granted);
            let frame = Decoder::new(1 << 20).next(&mut out)?.expect("a whole frame");
            prop_assert_eq!((frame.header.kind, frame.header.stream), (Kind::Batch, 0));
            prop_assert_eq!(frame.header.has(flag::GRANTED), granted);
            prop_assert_eq!(batch(&frame.payload)?.collect::<Vec<_>>(), streams);
            prop_assert!(out.is_empty());
        }

        #[test]
        fn what_is_no_list_of_streams_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(batch(&bytes).is_ok(), !bytes.is_empty() && bytes.len() % 4 == 0);
        }
    }

    #[test]
    fn more_than_a_batch_may_have_is_refused() {
        assert!(batch(&vec![1; 4 * MAX_BATCH]).is_ok());
        assert!(batch(&vec![1; 4 * MAX_BATCH + 4]).is_err());
    }
}
