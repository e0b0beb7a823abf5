//! Copies of a share of a split's requests, for targets whose answers nobody reads: they are discarded and counted.
//!
//! A request never waits for its copy, and nothing that happens to that reaches the client. A copy has bytes of its own: the
//! body is copied as it is read for the target, and when all of it has come the copy gets a task and goes its way. How many
//! copies there may be, how many bytes they hold and for how long is bounded, and what is beyond is dropped and counted by
//! reason. So a shadow that hangs costs bounded memory: its slots stay taken by copies that were given up until it ends
//! them, and further ones wait for slots and are dropped.

use std::{cell::Cell, future::poll_fn, rc::Rc, sync::Arc, task::Context, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, timeout_at};

use super::{
    batches::Packed,
    body::{Inbound, Upload},
    choose::Choice,
    relay::Call,
    shard::Shard,
    stream::{Outcome, StreamRef},
};
use crate::{
    engine::{Affinity, DeploymentKey, Engine},
    error::Error,
    snapshot,
    traffic::{Dropped, ShadowMeter},
    wire::{MAX_INLINE, flag},
};

/// Copies of one shadow that are open at a time, on one shard.
const OPEN: usize = 256;
/// Bytes of requests that they hold; as much again may stand in the links' buffers.
const BYTES: usize = 16 * 1024 * 1024;
/// A copy is given up after this, or earlier with its request's deadline.
const GIVE_UP: Duration = Duration::from_secs(30);
/// One copy, in the units of shares.
const ONE: u64 = 1 << 50;

/// One shadow of a split, by the present snapshot.
#[derive(Debug)]
pub(super) struct Shadow {
    deployment: DeploymentKey,
    /// A key of the snapshot's.
    name: String,
    /// Of each request.
    share: u64,
    lane: Rc<Lane>,
}

/// What of a shadow outlives a snapshot.
#[derive(Debug)]
pub(super) struct Lane {
    /// Of the next copy; begins in the middle, so that a count is its share rounded.
    due: Cell<u64>,
    open: Cell<usize>,
    bytes: Cell<usize>,
    meter: Arc<ShadowMeter>,
}

impl Shadow {
    pub(super) fn new(shard: &Shard, engine: &Engine<usize>, split: &str, shadow: &snapshot::Shadow) -> Rc<Self> {
        let meter = shard.metrics.traffic.shadow(split, &shadow.name);
        let fresh = || Rc::new(Lane { due: Cell::new(ONE / 2), open: Cell::new(0), bytes: Cell::new(0), meter });
        let mut lanes = shard.lanes.borrow_mut();
        let lane = Rc::clone(lanes.entry((split.to_owned(), shadow.name.clone())).or_insert_with(fresh));
        #[expect(clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a share is from 0 to 1, ONE is exact")]
        let share = (shadow.share * ONE as f64).round() as u64;
        let deployment = engine.deployment(&shadow.deployment).unwrap_or(DeploymentKey::NONE);
        Rc::new(Self { deployment, name: shadow.deployment.clone(), share, lane })
    }

    /// Whether this request is among the share.
    fn is_due(&self) -> bool {
        let due = self.lane.due.get() + self.share;
        self.lane.due.set(due % ONE);
        due >= ONE
    }

    /// A copy of the request's head, with room for a body of this length, if there may be one.
    fn begin(&self, call: &Call<'_>, length: u64) -> Result<Late, Dropped> {
        if !call.shard.engine.borrow_mut().is_ready(self.deployment) {
            return Err(Dropped::NotReady);
        }
        if self.lane.open.get() >= OPEN {
            return Err(Dropped::InFlight);
        }
        let mut head = BytesMut::new();
        call.put_head(&mut head);
        let is_custom = call.shard.engine.borrow_mut().is_custom(self.deployment);
        let choice = is_custom.then(|| Choice { deployment: self.name.clone(), ..call.describe() });
        let mut copy = Copy {
            shard: Rc::clone(call.shard),
            deployment: self.deployment,
            affinity: call.marks.affinity,
            choice: choice.unwrap_or_default(),
            deadline: call.deadline,
            request: BytesMut::new(),
            head: head.len(),
            held: Held::new(Rc::clone(&self.lane)),
        };
        if !copy.reserve(head.len().saturating_add(usize::try_from(length).unwrap_or(usize::MAX))) {
            return Err(Dropped::Bytes);
        }
        copy.request.extend_from_slice(&head);
        Ok(Late(Some(copy)))
    }
}

/// Has the request copied if it is among the shadow's share.
pub(super) fn copy(call: &Call<'_>, shadow: &Rc<Shadow>, body: &mut Inbound) {
    if !shadow.is_due() {
        return;
    }
    match shadow.begin(call, body.length()) {
        Err(reason) => shadow.lane.meter.drop_for(reason),
        Ok(copy) => body.copy_to(copy),
    }
}

/// A copy whose body is still to come; without, when it was dropped.
pub(super) struct Late(Option<Copy>);

impl Late {
    /// The next bytes of the body. A slice of the request's own would keep the client's whole buffer.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        let Some(copy) = &mut self.0 else { return };
        if copy.reserve(bytes.len()) {
            copy.request.extend_from_slice(bytes);
        } else {
            self.drop_for(Dropped::Bytes);
        }
    }

    /// All of the body has come.
    pub(super) fn end(mut self) {
        if let Some(copy) = self.0.take() {
            tokio::task::spawn_local(copy.run());
        }
    }

    fn drop_for(&mut self, reason: Dropped) {
        if let Some(copy) = self.0.take() {
            copy.held.lane.meter.drop_for(reason);
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.drop_for(Dropped::Body);
    }
}

/// A copy on its way, or on its way to be complete.
struct Copy {
    shard: Rc<Shard>,
    deployment: DeploymentKey,
    affinity: Affinity,
    choice: Choice,
    deadline: Option<Instant>,
    /// The head, of this length, and as much of the body as has come.
    request: BytesMut,
    head: usize,
    held: Held,
}

/// Why a copy has no answer.
enum Unanswered {
    /// It was never begun.
    Refused,
    /// The replica failed.
    Failed,
}

impl Copy {
    /// Makes room for so many more bytes, if all copies may hold as many.
    fn reserve(&mut self, more: usize) -> bool {
        let others = self.held.lane.bytes.get() - self.held.bytes;
        if self.request.len().saturating_add(more) > BYTES.saturating_sub(others) {
            return false;
        }
        self.request.reserve(more);
        self.held.resize(self.request.capacity());
        true
    }

    async fn run(mut self) {
        let latest = Instant::now() + GIVE_UP;
        let until = self.deadline.map_or(latest, |deadline| deadline.min(latest));
        let body = if self.request.len() - self.head > MAX_INLINE {
            Inbound::Streamed(Upload::whole(self.request.split_off(self.head).freeze()))
        } else {
            Inbound::Whole(Bytes::new())
        };
        let request = std::mem::take(&mut self.request).freeze();
        let meter = &self.held.lane.meter;
        match timeout_at(until, self.send(&request, body, until)).await {
            Ok(Ok(status)) if status < 500 => meter.answered.up(),
            Ok(Ok(_) | Err(Unanswered::Failed)) => meter.errors.up(),
            Ok(Err(Unanswered::Refused)) => meter.drop_for(Dropped::Refused),
            Err(_) => meter.drop_for(Dropped::Timeout),
        }
    }

    /// The status of the answer, when all of it has come. `body`: what does not travel in the REQUEST.
    async fn send(&self, request: &Bytes, mut body: Inbound, until: Instant) -> Result<u32, Unanswered> {
        let (refused, failed) = (|_: Error| Unanswered::Refused, |_: Error| Unanswered::Failed);
        let describe = || self.choice.clone();
        let whole = matches!(body, Inbound::Whole(_));
        let pack = || Packed::copy(request.clone(), whole, Some(until));
        let fin = if whole { flag::FIN } else { 0 };
        let mut sent = false;
        let mut came = self.shard.admit(self.deployment, self.affinity, pack, describe).await.map_err(refused)?;
        loop {
            let (stream, place) =
                came.sent(|lease| self.shard.open(lease, fin, Some(until), |out| out.extend_from_slice(request)));
            let Some(stream) = stream else {
                tokio::task::yield_now().await;
                let waiting = self.shard.again(place, None).map_err(refused)?;
                waiting.pack(pack);
                came = waiting.end(describe).await.map_err(refused)?;
                continue;
            };
            if !std::mem::replace(&mut sent, true) {
                self.held.lane.meter.copied.up();
            }
            match body.outcome(&stream).await.map_err(failed)? {
                Outcome::Back(waiting) if body.rewind() => {
                    drop(stream);
                    came = waiting.end(describe).await.map_err(refused)?;
                }
                Outcome::Back(_) | Outcome::Failed(_) => return Err(Unanswered::Failed),
                Outcome::Head(head) => {
                    if !head.whole {
                        stream.consumed(head.view.body().len());
                        discard(&stream, body).await.map_err(failed)?;
                    }
                    return Ok(head.status);
                }
            }
        }
    }
}

/// Reads the answer away; the body goes on meanwhile.
async fn discard(stream: &StreamRef, mut body: Inbound) -> Result<(), Error> {
    let sender = stream.sender();
    let mut next = |cx: &mut Context<'_>| {
        if let Inbound::Streamed(upload) = &mut body {
            let _ = upload.poll(cx, &sender)?;
        }
        stream.poll_chunk(cx).map(Option::transpose)
    };
    while poll_fn(&mut next).await?.is_some() {}
    Ok(())
}

/// Counts a copy and its bytes as open while it lives.
struct Held {
    lane: Rc<Lane>,
    bytes: usize,
}

impl Held {
    fn new(lane: Rc<Lane>) -> Self {
        lane.open.set(lane.open.get() + 1);
        Self { lane, bytes: 0 }
    }

    fn resize(&mut self, bytes: usize) {
        self.lane.bytes.set(self.lane.bytes.get() - self.bytes + bytes);
        self.bytes = bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.lane.open.set(self.lane.open.get() - 1);
        self.lane.bytes.set(self.lane.bytes.get() - self.bytes);
    }
}
