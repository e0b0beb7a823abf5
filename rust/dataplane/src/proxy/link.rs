//! One socket to one replica: coalesced writes, reads, death, and the way back.
//!
//! Connections append frames to the link's buffer and wake its task; on the shard's single thread it runs after all that
//! are ready now, so that their frames share a system call while an idle link waits for nothing. Reading never depends on
//! writing, or two full peers would wait for each other. End of file is the death notice.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    future::poll_fn,
    io::IoSlice,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWrite},
    sync::Notify,
    time::{sleep, timeout},
};

use super::{
    dial::{Down, Reader, Writer, dial},
    shard::Shard,
    stream::{Stream, StreamRef},
};
use crate::{
    engine::{Lease, ReplicaKey, Streams},
    snapshot,
    wire::{Decoder, Header, Kind, MAX_PAYLOAD, Spool, WireError, flag, models::models, put},
};

const PING_PERIOD: Duration = Duration::from_secs(2);
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(1);
/// Bytes read at once: bodies in large pieces cost a third less than in pieces of 64 KiB.
const READ: usize = 256 * 1024;
/// Parts of the outbox that one write takes.
const SLICES: usize = 32;
/// Body senders wait while more than this is unsent: requests and answers of others stay quick.
pub(super) const HIGH_WATER: usize = 512 * 1024;

/// Frames on their way out, with offsets that say what the kernel has taken.
#[derive(Default)]
struct Outbox {
    spool: Spool,
    queued: u64,
    written: u64,
    /// The link's task, when there is nothing to write.
    writer: Option<Waker>,
    /// Body senders that wait for room.
    senders: Vec<Waker>,
}

/// See the module. It lives from the engine's Open to its Close, over any number of sockets.
pub(super) struct Link {
    pub(super) key: ReplicaKey,
    address: snapshot::Replica,
    outbox: RefCell<Outbox>,
    streams: RefCell<Streams<Stream>>,
    leaving: Cell<bool>,
    left: Notify,
    /// Something came since the last PING.
    heard: Cell<bool>,
}

impl Link {
    pub(super) fn new(key: ReplicaKey, address: snapshot::Replica) -> Rc<Self> {
        Rc::new(Self {
            key,
            address,
            outbox: RefCell::default(),
            streams: RefCell::default(),
            leaving: Cell::new(false),
            left: Notify::new(),
            heard: Cell::new(true),
        })
    }

    /// Ends when the last stream has ended.
    pub(super) fn leave(&self) {
        self.leaving.set(true);
        self.left.notify_one();
        self.wake();
    }

    fn is_left(&self) -> bool {
        self.leaving.get() && self.streams.borrow().is_empty()
    }

    /// Opens a stream for `lease`; `encode` writes its REQUEST under the id that it is given.
    ///
    /// # Errors
    /// The stream table is full; the lease comes back.
    pub(super) fn open(
        self: &Rc<Self>,
        shard: &Rc<Shard>,
        lease: Lease,
        encode: impl FnOnce(&mut BytesMut, u32),
    ) -> Result<StreamRef, Lease> {
        let id = self.streams.borrow_mut().insert(Stream::new(lease)).map_err(Stream::into_lease)?;
        shard.metrics.streams.up();
        let end = self.write(|out| encode(out, id));
        self.with(id, |stream| stream.begun_at = end);
        Ok(StreamRef::new(Rc::clone(shard), Rc::clone(self), id))
    }

    /// Runs `f` on an open stream.
    pub(super) fn with<R>(&self, id: u32, f: impl FnOnce(&mut Stream) -> R) -> Option<R> {
        self.streams.borrow_mut().get_mut(id).map(f)
    }

    /// Forgets a stream that has ended.
    pub(super) fn remove(&self, shard: &Shard, id: u32) {
        // Dropped after the borrow: what waits in it may come back here.
        let removed = self.streams.borrow_mut().remove(id);
        if removed.is_some() {
            shard.metrics.streams.down();
            if self.leaving.get() {
                self.wake();
            }
        }
    }

    /// Appends frames and returns the offset at which they end.
    pub(super) fn write(&self, fill: impl FnOnce(&mut BytesMut)) -> u64 {
        self.spool(|spool| fill(spool.tail()))
    }

    /// The same for a frame whose payload need not be copied.
    pub(super) fn write_shared(&self, header: Header, payload: Bytes) {
        self.spool(|spool| {
            spool.tail().put_slice(&header.encode(payload.len()));
            spool.push(payload);
        });
    }

    fn spool(&self, fill: impl FnOnce(&mut Spool)) -> u64 {
        let outbox = &mut *self.outbox.borrow_mut();
        let before = outbox.spool.remaining();
        fill(&mut outbox.spool);
        outbox.queued += (outbox.spool.remaining() - before) as u64;
        if let Some(writer) = outbox.writer.take() {
            writer.wake();
        }
        outbox.queued
    }

    /// A frame without payload.
    pub(super) fn signal(&self, header: Header) {
        self.write(|out| put(out, header, &[]));
    }

    pub(super) fn unused(&self, count: u32) {
        self.signal(Header::new(Kind::Unused, 0).aux(count));
    }

    /// Whether a body sender may go on; if not it is woken when it may.
    pub(super) fn poll_room(&self, cx: &Context<'_>) -> Poll<()> {
        let outbox = &mut *self.outbox.borrow_mut();
        if outbox.spool.remaining() < HIGH_WATER {
            return Poll::Ready(());
        }
        if !outbox.senders.iter().any(|waker| waker.will_wake(cx.waker())) {
            outbox.senders.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn wake(&self) {
        if let Some(writer) = self.outbox.borrow_mut().writer.take() {
            writer.wake();
        }
    }

    /// Keeps the link up while the engine wants it.
    pub(super) async fn supervise(self: Rc<Self>, shard: Rc<Shard>) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            if !self.leaving.get() && self.session(&shard).await {
                backoff = FIRST_BACKOFF;
            }
            let wanted = shard.engine.borrow_mut().closed(self.key);
            if !wanted {
                shard.shared.distrusted().remove(&self.address.id);
                // Before anything else is opened, which may be given the same key.
                shard.set_link(self.key, None);
            }
            self.bury(&shard);
            shard.settle();
            if !wanted {
                return;
            }
            // A link that is to leave does not wait.
            let _ = timeout(backoff, self.left.notified()).await;
            backoff = LAST_BACKOFF.min(backoff * 2);
        }
    }

    /// One socket from its opening to its end; returns whether it was ever up.
    async fn session(self: &Rc<Self>, shard: &Rc<Shard>) -> bool {
        let (reader, writer, max_ongoing, rest) = match dial(&self.address, &shard.shared.config).await {
            Ok(open) => open,
            Err(down) => {
                // Every shard and every further attempt meets the same: one of them tells.
                if matches!(down, Down::Hello(_)) && shard.shared.distrusted().insert(self.address.id.clone()) {
                    let reason = &down as &dyn std::error::Error;
                    tracing::warn!(replica = self.address.id, reason, "cannot link to a replica; trying on");
                }
                return false;
            }
        };
        shard.metrics.links.up();
        shard.engine.borrow_mut().linked(self.key, max_ongoing);
        shard.settle();
        shard.shared.linked(&self.address.id);
        let (mut reading, mut writing) = (pin!(self.read(shard, reader, rest)), pin!(self.write_out(writer)));
        let mut beating = pin!(self.beat(shard));
        let down =
            poll_fn(|cx| match (reading.as_mut().poll(cx), writing.as_mut().poll(cx), beating.as_mut().poll(cx)) {
                (Poll::Pending, Poll::Pending, _) => Poll::Pending,
                (Poll::Ready(down), ..) | (_, Poll::Ready(down), _) => Poll::Ready(down),
            });
        let down = down.await;
        shard.metrics.links.down();
        shard.metrics.links_lost.up();
        if shard.shared.unlinked(&self.address.id) && shard.engine.borrow().wants(self.key) {
            let reason = &down as &dyn std::error::Error;
            tracing::warn!(replica = self.address.id, reason, "lost the last link to a replica; linking again");
        }
        true
    }

    /// Asks an idle or busy peer for a sign of life. Without one it is not picked, but the link lives: user code may hold
    /// the replica's loop for a minute.
    async fn beat(&self, shard: &Rc<Shard>) -> Infallible {
        loop {
            self.heard.set(false);
            self.signal(Header::new(Kind::Ping, 0));
            sleep(PING_PERIOD).await;
            if !self.heard.get() {
                shard.engine.borrow_mut().silent(self.key, true);
                shard.settle();
            }
        }
    }

    /// Bytes came.
    fn hear(&self, shard: &Rc<Shard>) {
        shard.events.up();
        if !self.heard.replace(true) {
            shard.engine.borrow_mut().silent(self.key, false);
        }
    }

    async fn read(self: &Rc<Self>, shard: &Rc<Shard>, mut reader: Reader, mut buf: BytesMut) -> Down {
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        loop {
            loop {
                match decoder.next(&mut buf) {
                    Ok(Some(frame)) => {
                        if let Err(error) = self.frame(shard, &frame.header, frame.payload) {
                            return error.into();
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return error.into(),
                }
            }
            shard.settle();
            if !buf.try_reclaim(READ) && buf.capacity() - buf.len() < READ / 4 {
                buf.reserve(READ);
            }
            match reader.read_buf(&mut buf).await {
                Ok(0) => return Down::Eof,
                Ok(_) => self.hear(shard),
                Err(error) => return error.into(),
            }
        }
    }

    fn frame(self: &Rc<Self>, shard: &Rc<Shard>, header: &Header, payload: Bytes) -> Result<(), WireError> {
        match header.kind {
            Kind::Response | Kind::Chunk | Kind::Error | Kind::Busy | Kind::Returned | Kind::Window => {
                return Stream::receive(shard, self, header, payload);
            }
            Kind::Drain => shard.engine.borrow_mut().draining(self.key),
            Kind::Credit => shard.engine.borrow_mut().credit(self.key, header.aux),
            Kind::Models => shard.engine.borrow_mut().models(self.key, &models(&payload)?),
            Kind::Ping => self.signal(Header::new(Kind::Pong, 0).aux(header.aux)),
            Kind::Pong => {}
            _ => return Err(WireError::Malformed("direction of a frame")),
        }
        Ok(())
    }

    async fn write_out(&self, mut writer: Writer) -> Down {
        poll_fn(|cx| {
            loop {
                if self.is_left() {
                    return Poll::Ready(Down::Left);
                }
                let outbox = &mut *self.outbox.borrow_mut();
                if !outbox.spool.has_remaining() {
                    outbox.writer = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                let mut slices = [IoSlice::new(&[]); SLICES];
                let count = outbox.spool.chunks_vectored(&mut slices);
                match Pin::new(&mut writer).poll_write_vectored(cx, &slices[..count]) {
                    Poll::Ready(Ok(n)) => {
                        outbox.spool.advance(n);
                        outbox.written += n as u64;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
                    Poll::Pending => return Poll::Pending,
                }
                if outbox.spool.remaining() < HIGH_WATER / 2 {
                    outbox.senders.drain(..).for_each(Waker::wake);
                }
            }
        })
        .await
    }

    /// Ends every stream of a socket that is gone: those whose request the kernel had taken whole count as begun.
    fn bury(self: &Rc<Self>, shard: &Rc<Shard>) {
        let outbox = std::mem::take(&mut *self.outbox.borrow_mut());
        outbox.senders.into_iter().for_each(Waker::wake);
        let ids = self.streams.borrow().ids();
        for id in ids {
            let forgotten = self.with(id, |stream| stream.die(outbox.written)).unwrap_or(false);
            if forgotten {
                self.remove(shard, id);
            }
        }
    }
}

/// Whether a frame ends its stream.
pub(super) fn is_final(header: &Header) -> bool {
    header.has(flag::FIN) || matches!(header.kind, Kind::Error | Kind::Busy | Kind::Returned)
}
