//! One link: the socket, what was read and not yet decoded, what is written and not yet sent, and its streams.
//!
//! Whoever has something to send appends it to the link's buffer and lets [`Link::flush`] share one system call among many
//! frames. Long bodies do not go into the buffer at once: their streams wait in `turns` and put a chunk each while
//! there is room, so that a large answer never blocks a small one and the buffer stays small.
//! Invariants: no lock is held across a call into Python or while a Python object is dropped; of the two locks
//! that nest, the link's output comes before the stream's state.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use bytes::{Buf, BytesMut};
use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};
use pyo3::Python;
use rayserve_dataplane::wire::hello::{Callee, MAX_HELLO};
use rayserve_dataplane::wire::{Decoder, Header, Payload, Spool, flag, put};

use super::batch::Parked;
use super::inbox::feed;
use super::stream::{Stream, Turn, Woken};
use crate::lock::lock;
use crate::socket;

/// Chunks of long bodies are put while less than this is unsent.
const ROOM: usize = 256 * 1024;
/// Parts of the buffer that one write takes.
const SLICES: usize = 32;
/// Most that a read takes: what has just been read is copied soonest.
const READ: usize = 256 * 1024;
/// The same behind a BODY frame that was read to where it stays. More would be of the next one, which shall be so too.
const NEXT: usize = 4 * 1024;
/// A stream id's slab index.
const INDEX: u32 = (1 << 20) - 1;

pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

macro_rules! each {
    ($socket:expr, $it:ident => $body:expr) => {
        match $socket {
            Socket::Unix($it) => $body,
            Socket::Tcp($it) => $body,
        }
    };
}

impl Socket {
    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        each!(self, it => registry.register(it, token, Interest::READABLE))
    }

    /// Whether the peer of a Unix socket runs under our own user.
    #[cfg(target_os = "linux")]
    pub(crate) fn is_own(socket: &UnixStream) -> bool {
        rustix::net::sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
    }

    /// The directory's mode and the token have to do.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn is_own(_: &UnixStream) -> bool {
        true
    }
}

/// The reading side, which only the loop's thread uses.
pub(crate) struct Input {
    pub(crate) buf: BytesMut,
    pub(crate) decoder: Decoder,
    /// Until the handshake is through.
    pub(crate) callee: Option<Callee>,
    /// The peer has ended: nothing but that is left once what it has sent is read.
    pub(crate) ended: bool,
}

struct Output {
    socket: Option<Socket>,
    spool: Spool,
    /// Among the dirty links already.
    dirty: bool,
    /// The kernel's buffer was full: the poller tells when it is not.
    blocked: bool,
    turns: VecDeque<Arc<Stream>>,
}

/// What the links of a replica share on the way out: the load that answers report, and who has something unsent.
#[derive(Default)]
pub(crate) struct Outgoing {
    gauge: AtomicU32,
    dirty: Mutex<Dirty>,
}

#[derive(Default)]
pub(crate) struct Dirty {
    pub(crate) links: Vec<Arc<Link>>,
    /// When the first of them became so.
    pub(crate) since: Option<Instant>,
}

impl Outgoing {
    pub(crate) fn set_load(&self, load: usize, fast: bool) {
        let load = load.min(usize::from(u16::MAX)) as u32;
        self.gauge.store(load | u32::from(fast) << 16, Ordering::Relaxed);
    }

    /// The header of an answer with load and FAST filled in; `own`: what this frame takes off the load.
    pub(crate) fn stamp(&self, header: Header, own: u16) -> Header {
        let (load, flags) = (self.load(), if self.is_fast() { flag::FAST } else { 0 });
        Header { load: load.saturating_sub(own), ..header.with(flags) }
    }

    /// Requests in flight, running and held.
    pub(crate) fn load(&self) -> u16 {
        self.gauge.load(Ordering::Relaxed) as u16
    }

    pub(crate) fn is_fast(&self) -> bool {
        self.gauge.load(Ordering::Relaxed) >> 16 == 1
    }

    pub(crate) fn take_dirty(&self) -> Vec<Arc<Link>> {
        std::mem::take(&mut *lock(&self.dirty)).links
    }

    /// When the oldest unsent answer was put, of links that can send.
    pub(crate) fn since(&self) -> Option<Instant> {
        lock(&self.dirty).since
    }

    fn touch(&self, link: &Arc<Link>) {
        let mut dirty = lock(&self.dirty);
        dirty.links.push(link.clone());
        dirty.since.get_or_insert_with(Instant::now);
    }
}

pub(crate) struct Link {
    pub(crate) token: Token,
    pub(crate) outgoing: Arc<Outgoing>,
    pub(crate) input: Mutex<Input>,
    output: Mutex<Output>,
    streams: Mutex<Vec<Option<Arc<Stream>>>>,
    pub(crate) parked: Parked,
}

impl Link {
    pub(crate) fn new(token: Token, socket: Socket, outgoing: Arc<Outgoing>) -> Self {
        let input = Input {
            buf: BytesMut::with_capacity(READ),
            decoder: Decoder::new(MAX_HELLO),
            callee: Some(Callee::default()),
            ended: false,
        };
        let output = Output {
            socket: Some(socket),
            spool: Spool::default(),
            dirty: false,
            blocked: false,
            turns: VecDeque::new(),
        };
        let (input, output) = (Mutex::new(input), Mutex::new(output));
        Self { token, outgoing, input, output, streams: Mutex::default(), parked: Parked::default() }
    }

    /// Reads what is left of a BODY frame to where it stays, if somebody waits for the whole body, and notes them in `fed`;
    /// then reads once into `buf`. Whether the peer may have more; an end of file is an error.
    pub(super) fn read(&self, py: Python<'_>, buf: &mut BytesMut, fed: &mut Vec<Arc<Stream>>) -> io::Result<bool> {
        let mut most = READ;
        let piece = lock(&self.input).decoder.piece().filter(|_| buf.is_empty());
        if let Some((header, left)) = piece
            && let Some(stream) = self.stream(header.stream)
        {
            let read = self.with_socket(|socket| {
                stream.read_body(py, left, |room| each!(socket, it => socket::read_to(it, room)))
            })?;
            if let Some(read) = read {
                lock(&self.input).decoder.took(*read.as_ref().unwrap_or(&0));
                feed(fed, stream);
                if !may_have_more(read, left)? {
                    return Ok(false);
                }
                most = NEXT;
            }
        }
        if !buf.try_reclaim(READ) && buf.capacity() - buf.len() < READ / 16 {
            buf.reserve(READ);
        }
        let room = most.min(buf.capacity() - buf.len());
        may_have_more(self.with_socket(|socket| each!(socket, it => socket::read(it, buf, room)))?, room)
    }

    /// An error if it is closed.
    fn with_socket<T>(&self, read: impl FnOnce(&Socket) -> T) -> io::Result<T> {
        let output = lock(&self.output);
        output.socket.as_ref().map(read).ok_or_else(|| ErrorKind::NotConnected.into())
    }

    /// Appends a frame; somebody flushes it soon.
    pub(crate) fn put(self: &Arc<Self>, header: Header, parts: &[&[u8]]) {
        self.put_with(|out| put(out, header, parts));
    }

    /// The same for a frame that `fill` writes itself.
    pub(crate) fn put_with(self: &Arc<Self>, fill: impl FnOnce(&mut BytesMut)) {
        let mut output = lock(&self.output);
        if output.socket.is_some() {
            fill(output.spool.tail());
            self.mark(output);
        }
    }

    /// Appends a frame with a value in it, whose large parts are not copied.
    pub(crate) fn put_value(self: &Arc<Self>, header: Header, payload: &Payload) {
        let mut output = lock(&self.output);
        if output.socket.is_some() {
            output.spool.put_payload(header, payload);
            self.mark(output);
        }
    }

    /// Lets a stream with body bytes to send have its turns.
    pub(crate) fn enqueue(self: &Arc<Self>, stream: &Arc<Stream>) {
        let mut output = lock(&self.output);
        if output.socket.is_some() {
            output.turns.push_back(stream.clone());
            self.mark(output);
        }
    }

    fn mark(self: &Arc<Self>, mut output: MutexGuard<'_, Output>) {
        let news = !output.dirty && !output.blocked;
        output.dirty |= news;
        drop(output);
        if news {
            self.outgoing.touch(self);
        }
    }

    /// Sends what there is; what the kernel does not take waits for the poller. An error means that the link is dead.
    pub(crate) fn flush(&self, registry: &Registry, woken: &mut Woken) -> io::Result<()> {
        let mut output = lock(&self.output);
        output.dirty = false;
        loop {
            self.pump(&mut output, woken);
            let Output { socket: Some(socket), spool, .. } = &mut *output else { return Ok(()) };
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = spool.chunks_vectored(&mut slices);
            if count == 0 {
                break;
            }
            match each!(socket, it => it.write_vectored(&slices[..count])) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(sent) => spool.advance(sent),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return output.block(true, registry, self.token);
                }
                Err(error) => return Err(error),
            }
        }
        output.block(false, registry, self.token)
    }

    /// Takes a stream in; `false`: the caller uses an id twice.
    pub(crate) fn insert(&self, stream: &Arc<Stream>) -> bool {
        let mut streams = lock(&self.streams);
        let index = (stream.id & INDEX) as usize;
        if index >= streams.len() {
            streams.resize_with(index + 1, || None);
        }
        if streams[index].is_some() {
            return false;
        }
        streams[index] = Some(stream.clone());
        true
    }

    /// The stream with this id, if it is still open.
    pub(crate) fn stream(&self, id: u32) -> Option<Arc<Stream>> {
        let streams = lock(&self.streams);
        streams.get((id & INDEX) as usize)?.clone().filter(|stream| stream.id == id)
    }

    /// The stream's last frame was put: its id may come again.
    pub(crate) fn remove(&self, id: u32) {
        let stream = lock(&self.streams).get_mut((id & INDEX) as usize).and_then(Option::take);
        drop(stream);
    }

    /// Closes the socket and hands out the open streams. The descriptor is not taken off the poller: in a forked child
    /// that would take it off the parent's.
    pub(crate) fn close(&self) -> Vec<Arc<Stream>> {
        let mut output = lock(&self.output);
        let left = (output.socket.take(), std::mem::take(&mut output.turns), std::mem::take(&mut output.spool));
        drop(output);
        drop(left);
        self.parked.clear();
        std::mem::take(&mut *lock(&self.streams)).into_iter().flatten().collect()
    }

    pub(crate) fn is_open(&self) -> bool {
        lock(&self.output).socket.is_some()
    }

    /// Whether the kernel has every byte of every answer.
    pub(crate) fn is_quiet(&self) -> bool {
        let output = lock(&self.output);
        let quiet = !output.spool.has_remaining() && output.turns.is_empty();
        drop(output);
        quiet && self.open_streams() == 0
    }

    pub(crate) fn open_streams(&self) -> usize {
        lock(&self.streams).iter().flatten().count()
    }

    fn pump(&self, output: &mut Output, woken: &mut Woken) {
        while output.spool.remaining() < ROOM {
            let Some(stream) = output.turns.pop_front() else { break };
            match stream.put_chunk(&mut output.spool, woken) {
                Turn::Again => output.turns.push_back(stream),
                Turn::Wait => {}
                Turn::Last => self.remove(stream.id),
            }
        }
    }
}

/// After a read of at most `room` bytes; an end of file is an error.
fn may_have_more(read: io::Result<usize>, room: usize) -> io::Result<bool> {
    match read {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Ok(len) => Ok(len == room),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
        Err(error) => Err(error),
    }
}

impl Output {
    fn block(&mut self, blocked: bool, registry: &Registry, token: Token) -> io::Result<()> {
        if self.blocked == blocked {
            return Ok(());
        }
        self.blocked = blocked;
        let interest = if blocked { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        match &mut self.socket {
            Some(socket) => each!(socket, it => registry.reregister(it, token, interest)),
            None => Ok(()),
        }
    }
}
