//! The frame: a 16-byte header and a payload.
//!
//! [`put`] appends one to an output buffer, so that many frames share a system call; [`Decoder`] takes them off an input
//! buffer, however the bytes were split. A payload is a slice of what was read, not a copy. Body frames are handed out in
//! the pieces in which they arrive, as where one ends means nothing.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{LARGE, WireError};

/// Bytes before the payload.
pub const HEADER_LEN: usize = 16;

/// Bits of [`Header::flags`].
pub mod flag {
    /// The last frame of this direction of the stream.
    pub const FIN: u8 = 1;
    /// In answers: the mean service time is below 200 µs, so a short backlog is welcome.
    pub const FAST: u8 = 2;
    /// In requests and BATCH: this one uses a credit.
    pub const GRANTED: u8 = 4;
    /// In CALL: the method is a generator, and its items come as ITEM frames.
    pub const STREAM: u8 = 8;
    /// In REQUEST and CALL: the stream is part of a batch, and begins with its BATCH.
    pub const BATCHED: u8 = 16;
    /// In WINDOW, to the replica: the client has left, and its request goes on as it wished. A replica that does not know
    /// the flag sees window, or none, being given back.
    pub const LEFT: u8 = 32;
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the table in ARCHITECTURE.md says what each is")]
pub enum Kind {
    Hello = 1,
    Challenge = 2,
    Proof = 3,
    Welcome = 4,
    Request = 10,
    Body = 11,
    Response = 20,
    Chunk = 21,
    Call = 30,
    Result = 31,
    Error = 32,
    Item = 33,
    Piece = 34,
    Cancel = 40,
    Window = 41,
    Busy = 42,
    Returned = 43,
    Drain = 44,
    Ping = 45,
    Pong = 46,
    Credit = 47,
    Unused = 48,
    Models = 49,
    Batch = 50,
    Upgrade = 60,
}

impl Kind {
    /// Bytes that may be taken as they come.
    fn is_body(self) -> bool {
        matches!(self, Self::Body | Self::Chunk | Self::Piece)
    }
}

impl TryFrom<u8> for Kind {
    type Error = WireError;

    fn try_from(byte: u8) -> Result<Self, WireError> {
        Ok(match byte {
            1 => Self::Hello,
            2 => Self::Challenge,
            3 => Self::Proof,
            4 => Self::Welcome,
            10 => Self::Request,
            11 => Self::Body,
            20 => Self::Response,
            21 => Self::Chunk,
            30 => Self::Call,
            31 => Self::Result,
            32 => Self::Error,
            33 => Self::Item,
            34 => Self::Piece,
            40 => Self::Cancel,
            41 => Self::Window,
            42 => Self::Busy,
            43 => Self::Returned,
            44 => Self::Drain,
            45 => Self::Ping,
            46 => Self::Pong,
            47 => Self::Credit,
            48 => Self::Unused,
            49 => Self::Models,
            50 => Self::Batch,
            60 => Self::Upgrade,
            other => return Err(WireError::UnknownKind(other)),
        })
    }
}

/// All of a frame but its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Bits of [`flag`].
    pub flags: u8,
    /// In answers: requests in flight at the replica over all callers, after this frame.
    pub load: u16,
    /// The stream, chosen by the caller; 0 in link frames.
    pub stream: u32,
    /// Per kind: status, milliseconds, bytes, count or fault.
    pub aux: u32,
}

impl Header {
    /// A header without flags, load and `aux`.
    pub fn new(kind: Kind, stream: u32) -> Self {
        Self { kind, flags: 0, load: 0, stream, aux: 0 }
    }

    /// The same with `aux`.
    #[must_use]
    pub fn aux(self, aux: u32) -> Self {
        Self { aux, ..self }
    }

    /// The same with these bits of [`flag`] added.
    #[must_use]
    pub fn with(self, flags: u8) -> Self {
        Self { flags: self.flags | flags, ..self }
    }

    fn without(self, flags: u8) -> Self {
        Self { flags: self.flags & !flags, ..self }
    }

    /// Whether all these bits of [`flag`] are set.
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// The header's bytes in front of a payload of `len` bytes.
    pub fn encode(self, len: usize) -> [u8; HEADER_LEN] {
        let len = u32::try_from(len).expect("payloads are at most MAX_PAYLOAD");
        let mut out = [0; HEADER_LEN];
        out[0..4].copy_from_slice(&len.to_le_bytes());
        out[4] = self.kind as u8;
        out[5] = self.flags;
        out[6..8].copy_from_slice(&self.load.to_le_bytes());
        out[8..12].copy_from_slice(&self.stream.to_le_bytes());
        out[12..16].copy_from_slice(&self.aux.to_le_bytes());
        out
    }
}

/// One frame as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Everything but the payload.
    pub header: Header,
    /// A slice of the input buffer.
    pub payload: Bytes,
}

/// Appends one frame whose payload is the parts, one after the other.
pub fn put(out: &mut BytesMut, header: Header, parts: &[&[u8]]) {
    let len = parts.iter().map(|part| part.len()).sum();
    out.reserve(HEADER_LEN + len);
    out.put_slice(&header.encode(len));
    for part in parts {
        out.put_slice(part);
    }
}

/// Appends one frame whose payload `fill` writes in place.
pub fn put_with(out: &mut BytesMut, header: Header, fill: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_slice(&header.encode(0));
    fill(out);
    let len = out.len() - start - HEADER_LEN;
    let len = u32::try_from(len).expect("payloads are at most MAX_PAYLOAD");
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
}

/// Takes frames off an input buffer.
#[derive(Debug)]
pub struct Decoder {
    max_payload: usize,
    header: Option<(Header, usize)>,
}

impl Decoder {
    /// Refuses frames whose payload is above `max_payload` bytes.
    pub fn new(max_payload: usize) -> Self {
        Self { max_payload, header: None }
    }

    /// The next frame, or `None` until more bytes have come; room for those of a whole frame is then reserved. Of a body
    /// frame also what has come of it, with FIN only on its last piece.
    ///
    /// # Errors
    /// The bytes cannot be a frame; the link is of no further use.
    pub fn next(&mut self, buf: &mut BytesMut) -> Result<Option<Frame>, WireError> {
        let (header, len) = match self.header.take() {
            Some(known) => known,
            None if buf.len() < HEADER_LEN => return Ok(None),
            None => self.read_header(buf)?,
        };
        if buf.len() < len {
            if header.kind.is_body() && !buf.is_empty() {
                let payload = buf.split().freeze();
                self.header = Some((header, len - payload.len()));
                return Ok(Some(Frame { header: header.without(flag::FIN), payload }));
            }
            if header.kind.is_body() {
                self.header = Some((header, len));
                return Ok(None);
            }
            // A large frame arrives in one piece of memory: the reserve is what the peer announced, bounded by the limit.
            if len < LARGE {
                buf.reserve(len - buf.len());
            } else if buf.capacity() < len + LARGE {
                let mut own = BytesMut::with_capacity(len + LARGE);
                own.extend_from_slice(buf);
                *buf = own;
            }
            self.header = Some((header, len));
            return Ok(None);
        }
        let payload = if len < LARGE || header.kind.is_body() {
            buf.split_to(len)
        } else {
            // What follows moves away, so that the payload is the memory's only user.
            let rest = BytesMut::from(&buf[len..]);
            buf.truncate(len);
            std::mem::replace(buf, rest)
        };
        Ok(Some(Frame { header, payload: payload.freeze() }))
    }

    /// The PIECE or BODY of which more bytes are to come, and how many; with an empty input somebody may read them to where
    /// they stay and say so by [`Self::took`]. One with FIN comes whole from [`Self::next`], which tells of the end.
    pub fn piece(&self) -> Option<(Header, usize)> {
        let is_piece = |header: &Header| matches!(header.kind, Kind::Piece | Kind::Body) && !header.has(flag::FIN);
        self.header.filter(|(header, _)| is_piece(header))
    }

    /// So many bytes of the frame in progress were read past the input.
    pub fn took(&mut self, count: usize) {
        self.header = self.header.and_then(|(header, left)| (left > count).then(|| (header, left - count)));
    }

    fn read_header(&self, buf: &mut BytesMut) -> Result<(Header, usize), WireError> {
        let len = buf.get_u32_le() as usize;
        let kind = buf.get_u8();
        let flags = buf.get_u8();
        let load = buf.get_u16_le();
        let stream = buf.get_u32_le();
        let aux = buf.get_u32_le();
        if len > self.max_payload {
            return Err(WireError::TooLarge { len, limit: self.max_payload });
        }
        Ok((Header { kind: Kind::try_from(kind)?, flags, load, stream, aux }, len))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_header() -> impl Strategy<Value = Header> {
        let kind = any::<u8>().prop_filter_map("a kind", |byte| Kind::try_from(byte).ok());
        (kind, any::<u8>(), any::<u16>(), any::<u32>(), any::<u32>())
            .prop_map(|(kind, flags, load, stream, aux)| Header { kind, flags, load, stream, aux })
    }

    fn any_frames() -> impl Strategy<Value = Vec<(Header, Vec<u8>)>> {
        prop::collection::vec((any_header(), prop::collection::vec(any::<u8>(), 0..200)), 0..8)
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(frames in any_frames(), cuts in prop::collection::vec(1usize..64, 1..64)) {
            let mut bytes = BytesMut::new();
            for (header, payload) in &frames {
                let (front, back) = payload.split_at(payload.len() / 2);
                put(&mut bytes, *header, &[front, back]);
            }
            let (mut decoder, mut buf, mut read) = (Decoder::new(1024), BytesMut::new(), Vec::new());
            let mut part = Vec::new();
            let mut cuts = cuts.into_iter().cycle();
            while !bytes.is_empty() {
                let cut = cuts.next().unwrap_or(1).min(bytes.len());
                buf.extend_from_slice(&bytes.split_to(cut));
                while let Some(frame) = decoder.next(&mut buf)? {
                    let (header, whole) = &frames[read.len()];
                    part.extend_from_slice(&frame.payload);
                    let last = part.len() == whole.len();
                    prop_assert!(last || header.kind.is_body());
                    prop_assert_eq!(frame.header, if last { *header } else { header.without(flag::FIN) });
                    if last {
                        read.push((frame.header, std::mem::take(&mut part)));
                    }
                }
            }
            prop_assert_eq!(read, frames);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut buf = BytesMut::from(&bytes[..]);
            let mut decoder = Decoder::new(256);
            while let Ok(Some(_)) = decoder.next(&mut buf) {}
        }

        #[test]
        fn put_with_writes_what_put_writes(header in any_header(), payload in prop::collection::vec(any::<u8>(), 0..64)) {
            let (mut a, mut b) = (BytesMut::new(), BytesMut::new());
            put(&mut a, header, &[&payload]);
            put_with(&mut b, header, |out| out.extend_from_slice(&payload));
            prop_assert_eq!(a, b);
        }
    }

    #[test]
    fn a_large_payload_has_its_memory_to_itself() {
        let (mut bytes, mut decoder, mut buf) = (BytesMut::new(), Decoder::new(1 << 30), BytesMut::new());
        for _ in 0..2 {
            put(&mut bytes, Header::new(Kind::Result, 1), &[b"small"]);
            put(&mut bytes, Header::new(Kind::Result, 2), &[&vec![9; 3 * LARGE]]);
        }
        let mut large = Vec::new();
        while !bytes.is_empty() {
            buf.extend_from_slice(&bytes.split_to(bytes.len().min(10_000)));
            while let Some(frame) = decoder.next(&mut buf).expect("frames") {
                large.extend((frame.header.stream == 2).then_some(frame.payload));
            }
        }
        assert_eq!(large.len(), 2);
        for payload in large {
            assert_eq!(payload.len(), 3 * LARGE);
            assert_eq!(payload.as_ptr().addr() % 16, 0);
            assert!(payload.try_into_mut().is_ok());
        }
    }

    #[test]
    fn the_rest_of_a_piece_may_be_read_by_somebody_else() {
        let (mut bytes, mut decoder) = (BytesMut::new(), Decoder::new(1 << 30));
        put(&mut bytes, Header::new(Kind::Piece, 3), &[&[7; 100]]);
        put(&mut bytes, Header::new(Kind::Result, 4), &[b"next"]);
        let mut behind = bytes.split_off(HEADER_LEN + 10);
        let frame = decoder.next(&mut bytes).expect("a frame").expect("its beginning");
        assert_eq!((frame.header.stream, frame.payload.len()), (3, 10));
        assert_eq!(decoder.piece().map(|(header, left)| (header.stream, left)), Some((3, 90)));
        decoder.took(40);
        decoder.took(50);
        assert_eq!(decoder.piece(), None);
        behind.advance(90);
        let frame = decoder.next(&mut behind).expect("a frame").expect("all of it");
        assert_eq!((frame.header.stream, &frame.payload[..]), (4, &b"next"[..]));
    }

    #[test]
    fn a_frame_above_the_limit_is_refused_before_memory_is_reserved() {
        let mut buf = BytesMut::from(&Header::new(Kind::Chunk, 1).encode(1025)[..]);
        let capacity = buf.capacity();
        assert_eq!(Decoder::new(1024).next(&mut buf), Err(WireError::TooLarge { len: 1025, limit: 1024 }));
        assert!(buf.capacity() <= capacity);
    }
}
