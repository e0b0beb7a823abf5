//! Bytes to frames and back, the only language between callers (proxies, handles) and replicas.
//!
//! Everything here is pure: no socket, no clock. ARCHITECTURE.md, "Wire format", is the table that these files implement;
//! hostile bytes give a [`WireError`], never a panic and never an allocation beyond the limit that the reader has set.

pub mod batch;
pub mod call;
pub mod frame;
pub mod head;
pub mod hello;
pub mod models;
pub mod params;
pub mod payload;
pub mod spool;

pub use call::CallView;
pub use frame::{Decoder, Frame, HEADER_LEN, Header, Kind, flag, put};
pub use head::{RequestHeadView, ResponseHeadView};
pub use payload::Payload;
pub use spool::Spool;

/// Bytes of a response or of items that may be under way on one stream: what a slow client costs its proxy.
pub const WINDOW: u32 = 256 * 1024;
/// Bytes of a request's body that may be: fewer stops on the way, as a replica has few requests at a time.
pub const BODY_WINDOW: u32 = 512 * 1024;
/// Largest payload of a CHUNK frame: streams take turns, a large one never blocks a small one.
pub const MAX_CHUNK: usize = 32 * 1024;
/// Largest body that travels inside a REQUEST.
pub const MAX_INLINE: usize = 64 * 1024;
/// From here on a payload of values gets memory of its own, which its receiver hands on without a copy.
pub const LARGE: usize = 64 * 1024;
/// Largest value that travels in one frame; a larger one goes in pieces, between which those of other streams go. A MiB is
/// through in half a millisecond, and costs no more than it did.
pub const MAX_WHOLE: usize = 2 * 1024 * 1024;
/// One piece of a value, and the largest payload of a BODY frame: what is read with one call to where it stays.
pub const PIECE: usize = 256 * 1024;
/// Largest payload that a reader accepts when nothing else is configured; values of handle calls are the largest frames.
pub const MAX_PAYLOAD: usize = 2 * 1024 * 1024 * 1024 - 1;
/// Requests that a replica holds unstarted, over all callers, while it is FAST.
pub const BACKLOG: u32 = 32;

/// Largest batch that a caller sends, and requests of batches that a replica parks for one caller: a BATCH is a small frame.
pub const MAX_BATCH: usize = 16 * 1024;

/// What a peer sent cannot be read; the link closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The kind byte stands for nothing.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// The announced payload is above the reader's limit.
    #[error("frame of {len} bytes is above the limit of {limit}")]
    TooLarge {
        /// Announced bytes.
        len: usize,
        /// Accepted bytes.
        limit: usize,
    },
    /// Lengths inside a payload do not add up.
    #[error("malformed {0}")]
    Malformed(&'static str),
}

/// Why a stream ended in an ERROR frame; the `aux` field of that frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Fault {
    /// The replica failed, not the user's code.
    Internal = 1,
    /// The user's code raised; a call's payload is the encoded exception.
    User = 2,
    /// The user's code raised after its response had begun.
    Aborted = 3,
    /// The request was cancelled.
    Cancelled = 4,
    /// The deadline passed.
    Deadline = 5,
    /// There is no such method; the payload says which there are.
    NoMethod = 6,
    /// A generator was called as a plain method, or the reverse.
    WrongKind = 7,
    /// Arguments or result cannot be decoded or encoded.
    Unpicklable = 8,
}

impl Fault {
    /// Reads an ERROR frame's `aux`; what a newer peer may send counts as [`Fault::Internal`].
    pub fn from_aux(aux: u32) -> Self {
        match aux {
            2 => Self::User,
            3 => Self::Aborted,
            4 => Self::Cancelled,
            5 => Self::Deadline,
            6 => Self::NoMethod,
            7 => Self::WrongKind,
            8 => Self::Unpicklable,
            _ => Self::Internal,
        }
    }
}

/// Reads little-endian integers and slices off the front of a payload.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    what: &'static str,
}

impl<'a> Cursor<'a> {
    fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, at: 0, what }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let end = self.at.checked_add(len).ok_or(WireError::Malformed(self.what))?;
        let slice = self.bytes.get(self.at..end).ok_or(WireError::Malformed(self.what))?;
        self.at = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        self.take(N)?.try_into().map_err(|_| WireError::Malformed(self.what))
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
}
