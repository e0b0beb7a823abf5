//! A payload on its way out: what is small in one piece, what is large where it is.
//!
//! A socket writes the parts with one call, so that a large buffer is copied by nobody but the kernel.

use bytes::{BufMut, Bytes, BytesMut};

/// Parts of a payload, in order.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    parts: Vec<Bytes>,
    /// Bytes of `parts`.
    closed: usize,
    open: BytesMut,
}

impl Payload {
    /// With room for so many small bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { open: BytesMut::with_capacity(bytes), ..Self::default() }
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.closed + self.open.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where small bytes are appended.
    pub fn open(&mut self) -> &mut BytesMut {
        &mut self.open
    }

    /// Appends zeroes up to the next multiple of `to`.
    pub fn align(&mut self, to: usize) {
        let len = self.len();
        self.open.put_bytes(0, len.next_multiple_of(to) - len);
    }

    /// Appends bytes that stay where they are.
    pub fn push(&mut self, part: Bytes) {
        self.close();
        self.closed += part.len();
        self.parts.push(part);
    }

    /// Ends the small bytes, so that [`Self::parts`] is everything and cheap to clone.
    pub fn close(&mut self) {
        if !self.open.is_empty() {
            self.closed += self.open.len();
            self.parts.push(self.open.split().freeze());
        }
    }

    /// The parts of a closed payload.
    pub fn parts(&self) -> &[Bytes] {
        debug_assert!(self.open.is_empty(), "a payload is closed before it is sent");
        &self.parts
    }

    /// All of it in one piece.
    pub fn concat(mut self) -> Bytes {
        self.close();
        self.parts.concat().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_their_order_and_large_ones_their_place() {
        let large = Bytes::from(vec![7; 100]);
        let mut payload = Payload::with_capacity(8);
        payload.open().put_slice(b"abc");
        payload.align(4);
        payload.push(large.clone());
        payload.open().put_slice(b"z");
        payload.close();
        assert_eq!(payload.len(), 105);
        assert_eq!(&payload.parts()[0][..], b"abc\0");
        assert_eq!(payload.parts()[1].as_ptr(), large.as_ptr());
        assert_eq!(&payload.parts()[2][..], b"z");
    }
}
