//! Bytes on their way out: small ones share a buffer, large ones stay where they are and are never copied.
//!
//! A [`Spool`] is a queue of both in the order of their coming. It is a [`Buf`], so that one vectored write takes from
//! many parts; what is left of a part that was written in part stays at the front.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{Header, Payload};

/// From this size on a part is listed, as listing costs as much as copying some KiB.
pub const LISTED: usize = 8 * 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct Spool {
    parts: VecDeque<Bytes>,
    /// Bytes in `parts`.
    listed: usize,
    tail: BytesMut,
}

impl Spool {
    /// Where small frames are appended.
    pub fn tail(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// Appends one part.
    pub fn push(&mut self, part: Bytes) {
        if part.len() < LISTED {
            self.tail.put_slice(&part);
            return;
        }
        if !self.tail.is_empty() {
            let copied = self.tail.split().freeze();
            self.list(copied);
        }
        self.list(part);
    }

    /// Appends a frame whose payload is the next `len` bytes of `from`.
    pub fn put(&mut self, header: Header, from: &mut Self, len: usize) {
        self.tail.put_slice(&header.encode(len));
        let mut left = len;
        while left > 0 {
            let Some(part) = from.parts.front_mut() else {
                self.tail.put_slice(&from.tail[..left]);
                from.tail.advance(left);
                return;
            };
            let piece = part.split_to(left.min(part.len()));
            from.listed -= piece.len();
            left -= piece.len();
            from.drop_empty();
            self.push(piece);
        }
    }

    /// Appends a frame with the whole of `payload`.
    pub fn put_payload(&mut self, header: Header, payload: &Payload) {
        self.tail.put_slice(&header.encode(payload.len()));
        for part in payload.parts() {
            self.push(part.clone());
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn list(&mut self, part: Bytes) {
        self.listed += part.len();
        self.parts.push_back(part);
    }

    fn drop_empty(&mut self) {
        if self.parts.front().is_some_and(Bytes::is_empty) {
            self.parts.pop_front();
        }
    }
}

impl Buf for Spool {
    fn remaining(&self) -> usize {
        self.listed + self.tail.len()
    }

    fn chunk(&self) -> &[u8] {
        self.parts.front().map_or(&self.tail, |part| part)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let all = self.parts.iter().map(|part| &**part).chain((!self.tail.is_empty()).then_some(&*self.tail));
        slices.iter_mut().zip(all).map(|(slice, part)| *slice = IoSlice::new(part)).count()
    }

    fn advance(&mut self, count: usize) {
        let mut left = count;
        while let Some(part) = self.parts.front_mut()
            && left > 0
        {
            let here = left.min(part.len());
            part.advance(here);
            (self.listed, left) = (self.listed - here, left - here);
            self.drop_empty();
        }
        self.tail.advance(left);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{Decoder, Kind};

    fn any_parts() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let len = prop_oneof![0usize..50, LISTED - 2..LISTED + 2, LISTED..4 * LISTED];
        let part = (len, any::<u8>()).prop_map(|(len, seed)| (0..len).map(|i| (i % 251) as u8 ^ seed).collect());
        prop::collection::vec(part, 0..12)
    }

    fn spool(parts: &[Vec<u8>]) -> Spool {
        let mut spool = Spool::default();
        for (number, part) in parts.iter().enumerate() {
            if number % 3 == 0 {
                spool.tail().put_slice(part);
            } else {
                spool.push(Bytes::from(part.clone()));
            }
        }
        spool
    }

    /// Writes it out in steps of `taken` bytes, as a socket takes them.
    fn drain(mut spool: Spool, taken: &[usize]) -> Vec<u8> {
        let (mut out, mut taken) = (Vec::new(), taken.iter().copied().cycle());
        while spool.has_remaining() {
            let mut slices = [IoSlice::new(&[]); 4];
            let count = spool.chunks_vectored(&mut slices);
            let offered: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
            let step = taken.next().unwrap_or(1).min(offered.len());
            assert!(step > 0, "a spool that is not empty offers something");
            out.extend_from_slice(&offered[..step]);
            spool.advance(step);
        }
        assert_eq!(spool.remaining(), 0);
        out
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order_however_it_is_written(
            parts in any_parts(),
            taken in prop::collection::vec(1usize..60_000, 1..12),
        ) {
            let spool = spool(&parts);
            prop_assert_eq!(spool.remaining(), parts.concat().len());
            prop_assert!(drain(spool, &taken) == parts.concat());
        }

        #[test]
        fn frames_take_their_payload_from_another_spool(
            parts in any_parts(),
            lens in prop::collection::vec(1usize..40_000, 1..6),
        ) {
            let (mut from, mut to, mut lens) = (spool(&parts), Spool::default(), lens.into_iter().cycle());
            while from.has_remaining() {
                let len = lens.next().unwrap_or(1).min(from.remaining());
                to.put(Header::new(Kind::Chunk, 7), &mut from, len);
            }
            let (mut buf, mut decoder, mut body) = (BytesMut::from(&drain(to, &[1 << 20])[..]), Decoder::new(1 << 20), Vec::new());
            while let Some(frame) = decoder.next(&mut buf)? {
                prop_assert_eq!(frame.header.kind, Kind::Chunk);
                body.extend_from_slice(&frame.payload);
            }
            prop_assert!(body == parts.concat() && buf.is_empty());
        }
    }

    #[test]
    fn a_large_part_is_not_copied() {
        let mut spool = Spool::default();
        let large = Bytes::from(vec![1; LISTED]);
        let place = large.as_ptr();
        spool.tail().put_slice(b"head");
        spool.push(large);
        spool.advance(4);
        assert_eq!(spool.chunk().as_ptr(), place);
    }
}
