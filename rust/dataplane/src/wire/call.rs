//! Handle calls: the head of a CALL, and how a value travels in CALL, RESULT and ERROR.
//!
//! Values are opaque here: a pickle and its out-of-band buffers, which a receiver hands to Python without a copy. The head
//! names the method and the request context that child calls inherit.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Cursor, WireError};

/// The texts of a call head; all UTF-8.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallHead<'a> {
    /// The method, `__call__` if the user named none.
    pub method: &'a str,
    /// Of the request that this call belongs to.
    pub request_id: &'a str,
    /// The route by which that request came in.
    pub route: &'a str,
    /// The application of the caller.
    pub app: &'a str,
    /// Empty: none.
    pub multiplexed_model_id: &'a str,
    /// Empty: none.
    pub session_id: &'a str,
}

impl CallHead<'_> {
    fn texts(&self) -> [&str; 6] {
        [self.method, self.request_id, self.route, self.app, self.multiplexed_model_id, self.session_id]
    }
}

/// Appends a call head: six lengths (u16), then the texts; a text of more than 65,535 bytes is cut.
pub fn put_call_head(out: &mut BytesMut, head: &CallHead<'_>) {
    let texts = head.texts().map(cut);
    for text in texts {
        out.put_u16_le(text.len() as u16);
    }
    for text in texts {
        out.put_slice(text.as_bytes());
    }
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(usize::from(u16::MAX));
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Appends what precedes a value's bytes: the number of buffers (u32), the pickle's length and each buffer's (u64).
/// The caller then appends pickle and buffers, or writes them from where they are.
pub fn put_value_head(out: &mut BytesMut, pickle: usize, buffers: impl ExactSizeIterator<Item = usize>) {
    out.put_u32_le(buffers.len() as u32);
    out.put_u64_le(pickle as u64);
    for len in buffers {
        out.put_u64_le(len as u64);
    }
}

/// A pickle and its buffers, slices of the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// Protocol 5.
    pub pickle: Bytes,
    /// In the order of the pickle.
    pub buffers: Vec<Bytes>,
}

impl Value {
    /// Reads a value that takes up all of `payload`.
    ///
    /// # Errors
    /// [`WireError::Malformed`] when lengths do not add up.
    pub fn parse(mut payload: Bytes) -> Result<Self, WireError> {
        let malformed = WireError::Malformed("value");
        let mut at = Cursor::new(&payload, "value");
        let count = at.u32()? as usize;
        let pickle = u64::from_le_bytes(at.array()?);
        // Checked before anything is allocated: a count that the payload cannot hold is a lie.
        let lens = at.take(count.checked_mul(8).ok_or(malformed)?)?;
        let start = at.at;
        let lens: Vec<u64> =
            lens.chunks_exact(8).map(|len| u64::from_le_bytes(len.try_into().unwrap_or_default())).collect();
        let total = lens.iter().try_fold(pickle, |sum, len| sum.checked_add(*len)).ok_or(malformed)?;
        if total != (payload.len() - start) as u64 {
            return Err(malformed);
        }
        let mut rest = payload.split_off(start);
        let pickle = rest.split_to(pickle as usize);
        let buffers = lens.into_iter().map(|len| rest.split_to(len as usize)).collect();
        Ok(Self { pickle, buffers })
    }
}

/// A CALL as the replica sees it.
#[derive(Debug, Clone)]
pub struct CallView {
    texts: Bytes,
    ends: [usize; 6],
    /// Positional and keyword arguments, as the two sides agree: a pair of tuple and dict.
    pub arguments: Value,
}

impl CallView {
    /// Checks every length and the texts' encoding once.
    ///
    /// # Errors
    /// [`WireError::Malformed`] when lengths do not add up or a text is not UTF-8.
    pub fn parse(mut payload: Bytes) -> Result<Self, WireError> {
        let mut at = Cursor::new(&payload, "call head");
        let mut lens = [0; 6];
        for len in &mut lens {
            *len = usize::from(at.u16()?);
        }
        let mut ends = [0; 6];
        let mut end = 0;
        for (slot, len) in ends.iter_mut().zip(lens) {
            let text = at.take(len)?;
            std::str::from_utf8(text).map_err(|_| WireError::Malformed("call head"))?;
            end += len;
            *slot = end;
        }
        let split = at.at;
        let texts = payload.split_to(split).slice(split - end..);
        Ok(Self { texts, ends, arguments: Value::parse(payload)? })
    }

    /// The texts of the head.
    pub fn head(&self) -> CallHead<'_> {
        let text = |index: usize| {
            let start = if index == 0 { 0 } else { self.ends[index - 1] };
            std::str::from_utf8(&self.texts[start..self.ends[index]]).unwrap_or_default()
        };
        CallHead {
            method: text(0),
            request_id: text(1),
            route: text(2),
            app: text(3),
            multiplexed_model_id: text(4),
            session_id: text(5),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put_value(out: &mut BytesMut, pickle: &[u8], buffers: &[&[u8]]) {
        put_value_head(out, pickle.len(), buffers.iter().map(|buffer| buffer.len()));
        out.put_slice(pickle);
        for buffer in buffers {
            out.put_slice(buffer);
        }
    }

    proptest! {
        #[test]
        fn a_call_reads_back(
            texts in prop::collection::vec(".{0,20}", 6),
            pickle in prop::collection::vec(any::<u8>(), 0..40),
            buffers in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..5),
        ) {
            let head = CallHead {
                method: &texts[0], request_id: &texts[1], route: &texts[2], app: &texts[3],
                multiplexed_model_id: &texts[4], session_id: &texts[5],
            };
            let mut out = BytesMut::new();
            put_call_head(&mut out, &head);
            put_value(&mut out, &pickle, &buffers.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let view = CallView::parse(out.freeze())?;
            prop_assert_eq!(view.head(), head);
            prop_assert_eq!(&view.arguments.pickle[..], &pickle[..]);
            prop_assert!(view.arguments.buffers.iter().map(|b| &b[..]).eq(buffers.iter().map(|b| &b[..])));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = CallView::parse(Bytes::from(bytes.clone())).map(|view| view.head().method.len());
            let _ = Value::parse(Bytes::from(bytes));
        }
    }
}
