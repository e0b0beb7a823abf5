//! Handle calls: the head of a CALL, and how values travel in CALL, RESULT and ITEM.
//!
//! Values are opaque here: a pickle and its out-of-band buffers. The head names the method and the request context that
//! child calls inherit. An argument that is the answer to another call travels as the encoded value that its RESULT
//! brought, whole: whoever passes it on never decodes it, so values stand at multiples of [`ALIGN`], and their buffers too.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use bytes::{BufMut, Bytes, BytesMut};

use super::{Cursor, LARGE, Payload, WireError};

/// Where values begin in a payload and buffers in a value; the strictest alignment that an array's elements have.
pub const ALIGN: usize = 16;

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

/// Appends what precedes a value's bytes: the number of buffers (u32), the pickle's length and each buffer's (u64). The
/// pickle follows, then each buffer after [`Payload::align`].
pub fn put_value_head(out: &mut BytesMut, pickle: usize, buffers: impl ExactSizeIterator<Item = usize>) {
    out.put_u32_le(buffers.len() as u32);
    out.put_u64_le(pickle as u64);
    for len in buffers {
        out.put_u64_le(len as u64);
    }
}

/// Appends an argument of another call's making: its place among positional and then keyword arguments (u32), and the
/// encoded value.
pub fn put_relayed(out: &mut Payload, slot: u32, value: Bytes) {
    out.open().put_u32_le(slot);
    out.align(ALIGN);
    out.push(value);
}

/// Where a value's parts stand in its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Protocol 5.
    pub pickle: Range<usize>,
    /// In the order of the pickle.
    pub buffers: Vec<Range<usize>>,
}

impl Span {
    /// Reads the value that begins at `start`; the second result is its end.
    fn read(payload: &[u8], start: usize) -> Result<(Self, usize), WireError> {
        let malformed = WireError::Malformed("value");
        let mut at = Cursor::new(payload.get(start..).ok_or(malformed)?, "value");
        let count = at.u32()? as usize;
        let pickle = u64::from_le_bytes(at.array()?);
        // Checked before anything is allocated: a count that the payload cannot hold is a lie.
        let lens = at.take(count.checked_mul(8).ok_or(malformed)?)?;
        let part = |from: usize, len: u64| {
            let end = usize::try_from(len).ok().and_then(|len| from.checked_add(len));
            end.filter(|end| *end <= payload.len()).map(|end| from..end).ok_or(malformed)
        };
        let pickle = part(start + at.at, pickle)?;
        let (mut last, mut buffers) = (pickle.end, Vec::with_capacity(count));
        for len in lens.chunks_exact(8) {
            let from = start + (last - start).next_multiple_of(ALIGN);
            let buffer = part(from, u64::from_le_bytes(len.try_into().unwrap_or_default()))?;
            last = buffer.end;
            buffers.push(buffer);
        }
        Ok((Self { pickle, buffers }, last))
    }
}

/// A RESULT's or an ITEM's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// What is relayed when another call gets the value for an argument.
    pub payload: Bytes,
    /// Its parts.
    pub span: Span,
}

impl Value {
    /// Reads a value that takes up all of `payload`.
    ///
    /// # Errors
    /// [`WireError::Malformed`] when lengths do not add up.
    pub fn parse(payload: Bytes) -> Result<Self, WireError> {
        let (span, end) = Span::read(&payload, 0)?;
        if end == payload.len() { Ok(Self { payload, span }) } else { Err(WireError::Malformed("value")) }
    }
}

/// The values of a CALL, all in one payload and in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// The CALL's.
    pub payload: Bytes,
    /// Positional and keyword arguments, as the two sides agree: a pair of tuple and dict. Relayed ones are None in it.
    pub own: Span,
    /// Values that stand in for those, with their places.
    pub relayed: Vec<(u32, Span)>,
}

impl Arguments {
    fn read(payload: Bytes, start: usize) -> Result<Self, WireError> {
        let (own, mut end) = Span::read(&payload, start.next_multiple_of(ALIGN))?;
        let mut relayed = Vec::new();
        while end < payload.len() {
            let mut at = Cursor::new(&payload[end..], "relayed argument");
            let slot = at.u32()?;
            let (span, next) = Span::read(&payload, (end + at.at).next_multiple_of(ALIGN))?;
            relayed.push((slot, span));
            end = next;
        }
        Ok(Self { payload, own, relayed })
    }
}

/// A CALL as the replica sees it.
#[derive(Debug)]
pub struct CallView {
    texts: Bytes,
    ends: [usize; 6],
    arguments: Mutex<Option<Arguments>>,
}

impl CallView {
    /// Checks every length and the texts' encoding once.
    ///
    /// # Errors
    /// [`WireError::Malformed`] when lengths do not add up or a text is not UTF-8.
    pub fn parse(payload: Bytes) -> Result<Self, WireError> {
        let mut at = Cursor::new(&payload, "call head");
        let mut lens = [0; 6];
        for len in &mut lens {
            *len = usize::from(at.u16()?);
        }
        let mut ends = [0; 6];
        let (start, mut end) = (at.at, 0);
        for (slot, len) in ends.iter_mut().zip(lens) {
            let text = at.take(len)?;
            std::str::from_utf8(text).map_err(|_| WireError::Malformed("call head"))?;
            end += len;
            *slot = end;
        }
        let texts = start..at.at;
        let at = at.at;
        // A copy lets the arguments be the only ones who use a large payload, and so own it.
        let texts = if payload.len() < LARGE { payload.slice(texts) } else { Bytes::copy_from_slice(&payload[texts]) };
        Ok(Self { texts, ends, arguments: Mutex::new(Some(Arguments::read(payload, at)?)) })
    }

    /// The arguments; nothing the second time.
    pub fn take_arguments(&self) -> Option<Arguments> {
        self.arguments.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Puts back what was taken, for somebody else to take.
    pub fn restore_arguments(&self, arguments: Arguments) {
        *self.arguments.lock().unwrap_or_else(PoisonError::into_inner) = Some(arguments);
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

    type Parts = (Vec<u8>, Vec<Vec<u8>>);

    fn any_value() -> impl Strategy<Value = Parts> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..40);
        (bytes(), prop::collection::vec(bytes(), 0..5))
    }

    fn put_value(out: &mut Payload, (pickle, buffers): &Parts) {
        out.align(ALIGN);
        put_value_head(out.open(), pickle.len(), buffers.iter().map(Vec::len));
        out.open().put_slice(pickle);
        for buffer in buffers {
            out.align(ALIGN);
            out.push(Bytes::copy_from_slice(buffer));
        }
    }

    fn encoded(parts: &Parts) -> Bytes {
        let mut out = Payload::default();
        put_value(&mut out, parts);
        out.concat()
    }

    fn read(payload: &[u8], span: &Span) -> Parts {
        let buffers = span.buffers.iter().map(|buffer| {
            assert_eq!(buffer.start % ALIGN, 0);
            payload[buffer.clone()].to_vec()
        });
        (payload[span.pickle.clone()].to_vec(), buffers.collect())
    }

    proptest! {
        #[test]
        fn a_call_reads_back_with_what_it_relays(
            texts in prop::collection::vec(".{0,20}", 6),
            own in any_value(),
            relayed in prop::collection::vec((any::<u32>(), any_value()), 0..4),
        ) {
            let head = CallHead {
                method: &texts[0], request_id: &texts[1], route: &texts[2], app: &texts[3],
                multiplexed_model_id: &texts[4], session_id: &texts[5],
            };
            let mut out = Payload::default();
            put_call_head(out.open(), &head);
            put_value(&mut out, &own);
            for (slot, value) in &relayed {
                put_relayed(&mut out, *slot, encoded(value));
            }
            let len = out.len();
            let view = CallView::parse(out.concat())?;
            prop_assert_eq!(view.head(), head);
            let arguments = view.take_arguments().expect("nobody has taken them");
            prop_assert_eq!(arguments.payload.len(), len);
            prop_assert_eq!(read(&arguments.payload, &arguments.own), own);
            let back: Vec<_> =
                arguments.relayed.iter().map(|(slot, span)| (*slot, read(&arguments.payload, span))).collect();
            prop_assert_eq!(back, relayed);
            prop_assert_eq!(view.take_arguments(), None);
        }

        #[test]
        fn a_value_reads_back(parts in any_value()) {
            let value = Value::parse(encoded(&parts))?;
            prop_assert_eq!(read(&value.payload, &value.span), parts);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = CallView::parse(Bytes::from(bytes.clone())).map(|view| view.head().method.len());
            let _ = Value::parse(Bytes::from(bytes));
        }
    }
}
