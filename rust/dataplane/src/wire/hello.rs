//! The handshake that every link begins with: both sides prove that they know the cluster token.
//!
//! HELLO → CHALLENGE → PROOF → WELCOME, the same on Unix and TCP sockets; no other frame is read before it is through, and
//! the drivers give it two seconds. Each mac covers the side that made it, the protocol version, the role, both nonces and
//! the replica's id, so that it can neither be reflected nor used at another replica.

use bytes::BytesMut;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::{Cursor, Frame, Header, Kind, WireError, put};

/// Raised when the wire format changes in a way that an older peer would misread.
pub const VERSION: u16 = 1;
/// Largest payload before a link is trusted.
pub const MAX_HELLO: usize = 1024;
const MAGIC: [u8; 4] = *b"RSF1";
const NONCE: usize = 32;
const MAC: usize = 32;

/// What a caller is; covered by the macs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// An HTTP proxy.
    Proxy = 1,
    /// A handle.
    Handle = 2,
}

impl Role {
    fn read(byte: u8) -> Result<Self, HelloError> {
        match byte {
            1 => Ok(Self::Proxy),
            2 => Ok(Self::Handle),
            _ => Err(HelloError::Wire(WireError::Malformed("role"))),
        }
    }
}

/// Why a link was not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Lengths, magic or role make no sense.
    #[error("handshake cannot be read")]
    Wire(#[from] WireError),
    /// Another frame came where the handshake's next one was due.
    #[error("{0:?} came instead of the handshake's next frame")]
    Unexpected(Kind),
    /// The peer speaks another version of the wire format.
    #[error("peer speaks wire version {0}, this side {VERSION}")]
    Version(u16),
    /// The caller meant another replica, so this address was reused.
    #[error("peer wants replica {0}")]
    OtherReplica(String),
    /// The peer does not know the cluster token.
    #[error("peer does not know the cluster token")]
    Untrusted,
}

fn mac(token: &[u8], side: u8, role: Role, caller: &[u8; NONCE], replica: &[u8; NONCE], id: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(token).expect("HMAC takes keys of any length");
    mac.update(&MAGIC);
    mac.update(&VERSION.to_le_bytes());
    mac.update(&[side, role as u8]);
    mac.update(caller);
    mac.update(replica);
    mac.update(id);
    mac
}

fn nonce() -> [u8; NONCE] {
    let mut nonce = [0; NONCE];
    getrandom::fill(&mut nonce).expect("the operating system has random bytes");
    nonce
}

fn expect(frame: &Frame, kind: Kind) -> Result<(), HelloError> {
    if frame.header.kind == kind { Ok(()) } else { Err(HelloError::Unexpected(frame.header.kind)) }
}

/// What a side has to do after it was fed a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Send what was appended to `out` and wait for the peer's next frame.
    Continue,
    /// Send what was appended to `out`; the link is trusted. For a caller: the replica's `max_ongoing_requests`.
    Done(u32),
}

/// The side that opened the link. `T` is the token, borrowed or shared: a link that a poller drives outlives its caller's frame.
#[derive(Debug)]
pub struct Caller<T> {
    token: T,
    role: Role,
    replica_id: Vec<u8>,
    nonce: [u8; NONCE],
    proven: bool,
}

impl<T: AsRef<[u8]>> Caller<T> {
    /// Appends HELLO to `out`.
    pub fn start(token: T, role: Role, replica_id: &str, out: &mut BytesMut) -> Self {
        let nonce = nonce();
        let version = VERSION.to_le_bytes();
        put(out, Header::new(Kind::Hello, 0), &[&MAGIC, &version, &[role as u8], &nonce, replica_id.as_bytes()]);
        Self { token, role, replica_id: replica_id.as_bytes().to_vec(), nonce, proven: false }
    }

    /// Takes the replica's next frame.
    ///
    /// # Errors
    /// The link must be closed.
    pub fn feed(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<Step, HelloError> {
        let mut at = Cursor::new(&frame.payload, "handshake");
        if self.proven {
            expect(frame, Kind::Welcome)?;
            return Ok(Step::Done(at.u32()?));
        }
        expect(frame, Kind::Challenge)?;
        let theirs = at.array::<NONCE>()?;
        mac(self.token.as_ref(), b'R', self.role, &self.nonce, &theirs, &self.replica_id)
            .verify_slice(at.take(MAC)?)
            .map_err(|_| HelloError::Untrusted)?;
        let ours =
            mac(self.token.as_ref(), b'C', self.role, &self.nonce, &theirs, &self.replica_id).finalize().into_bytes();
        put(out, Header::new(Kind::Proof, 0), &[&ours]);
        self.proven = true;
        Ok(Step::Continue)
    }
}

/// The side that accepted the link.
#[derive(Debug)]
pub struct Callee {
    nonce: [u8; NONCE],
    caller: Option<(Role, [u8; NONCE])>,
}

impl Default for Callee {
    fn default() -> Self {
        Self { nonce: nonce(), caller: None }
    }
}

impl Callee {
    /// Takes the caller's next frame.
    ///
    /// # Errors
    /// The link must be closed.
    pub fn feed(
        &mut self,
        frame: &Frame,
        token: &[u8],
        replica_id: &str,
        max_ongoing_requests: u32,
        out: &mut BytesMut,
    ) -> Result<Step, HelloError> {
        let mut at = Cursor::new(&frame.payload, "handshake");
        let id = replica_id.as_bytes();
        let Some((role, theirs)) = self.caller else {
            expect(frame, Kind::Hello)?;
            if at.array::<4>()? != MAGIC {
                return Err(WireError::Malformed("magic").into());
            }
            let version = at.u16()?;
            if version != VERSION {
                return Err(HelloError::Version(version));
            }
            let (role, theirs) = (Role::read(at.u8()?)?, at.array::<NONCE>()?);
            let wanted = at.take(frame.payload.len() - at.at)?;
            if wanted != id {
                return Err(HelloError::OtherReplica(String::from_utf8_lossy(wanted).into_owned()));
            }
            let ours = mac(token, b'R', role, &theirs, &self.nonce, id).finalize().into_bytes();
            put(out, Header::new(Kind::Challenge, 0), &[&self.nonce, &ours]);
            self.caller = Some((role, theirs));
            return Ok(Step::Continue);
        };
        expect(frame, Kind::Proof)?;
        mac(token, b'C', role, &theirs, &self.nonce, id)
            .verify_slice(at.take(MAC)?)
            .map_err(|_| HelloError::Untrusted)?;
        put(out, Header::new(Kind::Welcome, 0), &[&max_ongoing_requests.to_le_bytes()]);
        Ok(Step::Done(max_ongoing_requests))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Decoder;
    use super::*;

    const TOKEN: &[u8] = b"cluster token";

    fn one_frame(buf: &mut BytesMut) -> Frame {
        Decoder::new(MAX_HELLO).next(buf).expect("valid").expect("whole")
    }

    fn shake(caller_token: &[u8], callee_token: &[u8], wanted: &str) -> Result<(Step, Step), HelloError> {
        let (mut to_replica, mut to_caller) = (BytesMut::new(), BytesMut::new());
        let mut caller = Caller::start(caller_token, Role::Proxy, wanted, &mut to_replica);
        let mut callee = Callee::default();
        let hello = one_frame(&mut to_replica);
        callee.feed(&hello, callee_token, "r1", 7, &mut to_caller)?;
        assert_eq!(caller.feed(&one_frame(&mut to_caller), &mut to_replica)?, Step::Continue);
        let served = callee.feed(&one_frame(&mut to_replica), callee_token, "r1", 7, &mut to_caller)?;
        Ok((caller.feed(&one_frame(&mut to_caller), &mut to_replica)?, served))
    }

    #[test]
    fn sides_that_share_the_token_trust_each_other() {
        assert_eq!(shake(TOKEN, TOKEN, "r1"), Ok((Step::Done(7), Step::Done(7))));
    }

    #[test]
    fn a_caller_refuses_a_replica_without_the_token() {
        assert_eq!(shake(TOKEN, b"other", "r1"), Err(HelloError::Untrusted));
    }

    #[test]
    fn a_replica_refuses_a_caller_without_the_token() {
        let (mut to_replica, mut to_caller) = (BytesMut::new(), BytesMut::new());
        let _caller = Caller::start(b"other", Role::Handle, "r1", &mut to_replica);
        let mut callee = Callee::default();
        callee.feed(&one_frame(&mut to_replica), TOKEN, "r1", 7, &mut to_caller).expect("hello is not yet proof");
        put(&mut to_replica, Header::new(Kind::Proof, 0), &[&[0; MAC]]);
        let proof = one_frame(&mut to_replica);
        assert_eq!(callee.feed(&proof, TOKEN, "r1", 7, &mut to_caller), Err(HelloError::Untrusted));
    }

    #[test]
    fn a_reused_address_is_noticed() {
        assert_eq!(shake(TOKEN, TOKEN, "r2"), Err(HelloError::OtherReplica("r2".into())));
    }

    #[test]
    fn nothing_but_the_handshake_is_read_before_it_is_through() {
        let frame = Frame { header: Header::new(Kind::Request, 1), payload: bytes::Bytes::new() };
        let refused = Callee::default().feed(&frame, TOKEN, "r1", 7, &mut BytesMut::new());
        assert_eq!(refused, Err(HelloError::Unexpected(Kind::Request)));
    }
}
