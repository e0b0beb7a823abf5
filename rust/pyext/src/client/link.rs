//! One socket to one replica: the handshake, bytes out, bytes in, and the calls that are under way on it.
//!
//! Nothing here blocks. A large payload is never copied into the output: it stands there as the slice that the call keeps.
//! `flushed` says how far the kernel has taken the output, and so which calls count as begun when the replica dies.

use std::{
    io::{self, ErrorKind, IoSlice, Read, Write},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Buf, BytesMut};
use mio::{
    Interest, Registry, Token,
    event::Source,
    net::{TcpStream, UnixStream},
};
use rayserve_dataplane::{
    engine::{Lease, ReplicaKey, Streams},
    snapshot::Replica,
    tcp,
    wire::{
        Decoder, Frame, HEADER_LEN, Header, Kind, MAX_PAYLOAD, Spool, WireError, batch::put_batch, flag, hello, put,
    },
};

use super::pending::{Pending, Place};
use crate::socket;

/// Parts of the output that one write takes.
const SLICES: usize = 32;
/// With so much room in the input, bytes are read to where they stay.
const ROOM: usize = 16 * 1024;
/// The contract's time for the handshake.
const HANDSHAKE: Duration = Duration::from_secs(2);

#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// By path on this node, if its socket can be reached (a container may not see it); else by address. Neither waits.
    fn open(replica: &Replica, node_id: &str) -> io::Result<Self> {
        let path = replica.unix.as_deref().filter(|_| replica.node_id == node_id);
        let local = path.map(UnixStream::connect);
        let address = match (local, replica.tcp.as_deref()) {
            (Some(Ok(stream)), _) => return Ok(Self::Unix(stream)),
            (_, Some(address)) => address,
            (Some(Err(error)), None) => return Err(error),
            (None, None) => return Err(ErrorKind::AddrNotAvailable.into()),
        };
        let address: SocketAddr = address.parse().map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
        let stream = TcpStream::connect(address)?;
        tcp::prepare(&stream)?;
        Ok(Self::Tcp(stream))
    }

    fn source(&mut self) -> &mut dyn Source {
        match self {
            Self::Unix(stream) => stream,
            Self::Tcp(stream) => stream,
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buf),
            Self::Tcp(stream) => stream.read(buf),
        }
    }

    fn read_into(&self, buf: &mut BytesMut, most: usize) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => socket::read(stream, buf, most),
            Self::Tcp(stream) => socket::read(stream, buf, most),
        }
    }

    fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match (self, slices) {
            (Self::Unix(stream), [slice]) => stream.write(slice),
            (Self::Tcp(stream), [slice]) => stream.write(slice),
            (Self::Unix(stream), _) => stream.write_vectored(slices),
            (Self::Tcp(stream), _) => stream.write_vectored(slices),
        }
    }
}

/// A call on a link.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) call: Arc<Pending>,
    pub(super) lease: Lease,
    /// The offset in the output at which its frame is complete.
    end: u64,
    /// What has come of a value that comes in pieces.
    pieces: BytesMut,
}

/// What a socket had for its owner.
#[derive(Debug)]
pub(super) enum Input {
    /// A frame after the handshake.
    Frame(Frame),
    /// The handshake is through; the replica's `max_ongoing_requests`.
    Ready(u32),
    /// Nothing more for now.
    Empty,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) key: ReplicaKey,
    pub(super) replica: Replica,
    pub(super) streams: Streams<Sent>,
    /// It closes with its last stream.
    pub(super) leaving: bool,
    hello: Option<(hello::Caller<Arc<[u8]>>, Instant)>,
    socket: Socket,
    decoder: Decoder,
    input: BytesMut,
    readable: bool,
    /// The peer has ended, which the poller tells only once.
    ended: bool,
    spool: Spool,
    flushed: u64,
}

impl Link {
    /// Opens the socket and begins the handshake; it is through when [`Link::read`] says `Ready`.
    pub(super) fn open(
        key: ReplicaKey,
        replica: Replica,
        node_id: &str,
        token: &Arc<[u8]>,
        registry: &Registry,
        poll: Token,
    ) -> io::Result<Self> {
        let mut socket = Socket::open(&replica, node_id)?;
        registry.register(socket.source(), poll, Interest::READABLE | Interest::WRITABLE)?;
        let mut spool = Spool::default();
        let hello = hello::Caller::start(Arc::clone(token), hello::Role::Handle, &replica.id, spool.tail());
        let mut link = Self {
            key,
            replica,
            streams: Streams::default(),
            leaving: false,
            hello: Some((hello, Instant::now() + HANDSHAKE)),
            socket,
            decoder: Decoder::new(hello::MAX_HELLO),
            input: BytesMut::new(),
            readable: false,
            ended: false,
            flushed: 0,
            spool,
        };
        link.flush()?;
        Ok(link)
    }

    /// When the handshake must be through.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.hello.as_ref().map(|(_, deadline)| *deadline)
    }

    /// Appends a frame without calls of its own.
    pub(super) fn send(&mut self, header: Header) {
        put(self.spool.tail(), header, &[]);
    }

    /// Appends a CALL under a new stream id; `batched`: a BATCH that names it follows at once.
    ///
    /// # Errors
    /// The lease comes back when a million streams are open.
    pub(super) fn send_call(
        &mut self,
        call: &Arc<Pending>,
        lease: Lease,
        poll: usize,
        batched: bool,
    ) -> Result<u32, Lease> {
        let payload = call.payload();
        let slot = if batched {
            flag::BATCHED
        } else if lease.granted {
            flag::GRANTED
        } else {
            0
        };
        let flags = slot | if call.stream { flag::STREAM } else { 0 };
        let end = self.flushed + (self.spool.remaining() + HEADER_LEN + payload.len()) as u64;
        let sent = Sent { call: Arc::clone(call), lease, end, pieces: BytesMut::new() };
        let stream = self.streams.insert(sent).map_err(|sent| sent.lease)?;
        let header = Header::new(Kind::Call, stream).with(flag::FIN | flags).aux(call.left_ms());
        self.spool.put_payload(header, &payload);
        call.move_to(Place::Sent { link: poll, stream });
        Ok(stream)
    }

    /// Appends the BATCH of these streams, without which none of them begins.
    pub(super) fn send_batch(&mut self, streams: &[u32], granted: bool) {
        put_batch(self.spool.tail(), streams, granted);
        let end = self.flushed + self.spool.remaining() as u64;
        for &stream in streams {
            if let Some(sent) = self.streams.get_mut(stream) {
                sent.end = end;
            }
        }
    }

    /// Hands the kernel what it takes; the rest waits for the socket to become writable.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        loop {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = self.spool.chunks_vectored(&mut slices);
            if count == 0 {
                return Ok(());
            }
            match self.socket.write(&slices[..count]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.flushed += count as u64;
                    self.spool.advance(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // A TCP connection that is still being made says NotConnected; it will become writable.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Notes that the poller has reported bytes or the end.
    pub(super) fn mark_readable(&mut self, ended: bool) {
        self.readable = true;
        self.ended |= ended;
    }

    /// The next frame, from what was read before or from the socket.
    ///
    /// # Errors
    /// The link is of no further use: end of file, an error, or bytes that are no frames.
    pub(super) fn read(&mut self, scratch: &mut [u8]) -> io::Result<Input> {
        loop {
            while let Some(frame) = self.decoder.next(&mut self.input).map_err(invalid)? {
                let Some(frame) = self.join(frame)? else { continue };
                if let Some(ready) = self.shake(frame)? {
                    return Ok(ready);
                }
            }
            if !self.readable {
                return Ok(Input::Empty);
            }
            let (read, offered) = self.read_once(scratch);
            match read {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                // The poller reports edges; a short read says that the socket is empty and saves asking again.
                Ok(count) => self.readable = self.ended || count == offered,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads to where the bytes stay if they are a large payload's; how many came, and how many might have.
    fn read_once(&mut self, scratch: &mut [u8]) -> (io::Result<usize>, usize) {
        if self.input.is_empty()
            && let Some((header, left)) = self.decoder.piece()
            && header.kind == Kind::Piece
            && let Some(Sent { pieces, .. }) = self.streams.get_mut(header.stream)
            && pieces.capacity() - pieces.len() >= left
        {
            let read = self.socket.read_into(pieces, left);
            self.decoder.took(*read.as_ref().unwrap_or(&0));
            return (read, left);
        }
        let room = self.input.capacity() - self.input.len();
        if room >= ROOM {
            return (self.socket.read_into(&mut self.input, room), room);
        }
        let read = self.socket.read(scratch);
        self.input.extend_from_slice(&scratch[..*read.as_ref().unwrap_or(&0)]);
        (read, scratch.len())
    }

    /// Keeps a piece, and puts what was kept in front of the frame that ends the value. An ERROR comes instead of one.
    fn join(&mut self, mut frame: Frame) -> io::Result<Option<Frame>> {
        let header = frame.header;
        if !matches!(header.kind, Kind::Piece | Kind::Result | Kind::Item) {
            return Ok(Some(frame));
        }
        let Some(Sent { pieces, .. }) = self.streams.get_mut(header.stream) else {
            return Ok((header.kind != Kind::Piece).then_some(frame));
        };
        if header.kind == Kind::Piece {
            let total = header.aux as usize;
            if pieces.len() + frame.payload.len() > total || total > MAX_PAYLOAD {
                return Err(invalid(WireError::Malformed("piece")));
            }
            pieces.reserve(total - pieces.len());
            pieces.extend_from_slice(&frame.payload);
            return Ok(None);
        }
        if !pieces.is_empty() {
            pieces.extend_from_slice(&frame.payload);
            frame.payload = std::mem::take(pieces).freeze();
        }
        Ok(Some(frame))
    }

    /// Passes a frame on, or feeds it to the handshake.
    fn shake(&mut self, frame: Frame) -> io::Result<Option<Input>> {
        let Some((hello, _)) = &mut self.hello else { return Ok(Some(Input::Frame(frame))) };
        let step =
            hello.feed(&frame, self.spool.tail()).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        self.flush()?;
        let hello::Step::Done(limit) = step else { return Ok(None) };
        self.hello = None;
        self.decoder = Decoder::new(MAX_PAYLOAD);
        Ok(Some(Input::Ready(limit)))
    }

    /// Calls without an outcome: those of which the kernel has the whole frame, and the others.
    pub(super) fn sent(&self) -> (usize, usize) {
        let open = || self.streams.values().filter(|sent| sent.call.outcome().is_none());
        let sent = open().filter(|sent| sent.end <= self.flushed).count();
        (sent, open().count() - sent)
    }

    /// Closes the socket and returns the calls in the order in which they were sent, each with whether it counts as
    /// begun: the kernel has its whole frame.
    pub(super) fn close(mut self, registry: &Registry) -> Vec<(Sent, bool)> {
        // Closing the descriptor would do, unless a forked child holds a copy of it.
        let _ = registry.deregister(self.socket.source());
        let mut calls: Vec<_> = self.streams.ids().into_iter().filter_map(|id| self.streams.remove(id)).collect();
        calls.sort_by_key(|sent| sent.end);
        let flushed = self.flushed;
        calls
            .into_iter()
            .map(|sent| {
                let begun = sent.end <= flushed;
                (sent, begun)
            })
            .collect()
    }
}

fn invalid(error: WireError) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}
