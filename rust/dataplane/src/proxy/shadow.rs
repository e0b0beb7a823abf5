//! Copies of a share of a split's requests, for targets whose answers nobody reads: they are discarded and counted.
//!
//! A copy never waits for its client's request, nor that for it, and nothing that happens to it reaches the client. It has a
//! task and a copy of the request's bytes; how many there may be, how many bytes they hold and for how long is bounded, and
//! what is beyond is dropped and counted by reason. So a shadow that hangs costs bounded memory: its slots stay taken by
//! copies that were given up until it ends them, and further ones wait for slots and are dropped.

use std::{cell::Cell, future::poll_fn, rc::Rc, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, timeout_at};

use super::{
    batches::Packed,
    body::Inbound,
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
    wire::flag,
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

    /// The bytes of the request, if it is to be copied and may be. A slice of the request's own body would keep the client's
    /// whole buffer.
    fn take(&self, call: &Call<'_>, body: &Inbound) -> Result<Bytes, Dropped> {
        let Inbound::Whole(body) = body else { return Err(Dropped::Body) };
        if !call.shard.engine.borrow_mut().is_ready(self.deployment) {
            return Err(Dropped::NotReady);
        }
        if self.lane.open.get() >= OPEN {
            return Err(Dropped::InFlight);
        }
        let mut head = BytesMut::new();
        call.put_head(&mut head);
        if self.lane.bytes.get() + head.len() + body.len() > BYTES {
            return Err(Dropped::Bytes);
        }
        Ok([&head[..], body].concat().into())
    }
}

/// Sends a copy of the request on its way if it is among the shadow's share.
pub(super) fn copy(call: &Call<'_>, shadow: &Rc<Shadow>, body: &Inbound) {
    if !shadow.is_due() {
        return;
    }
    match shadow.take(call, body) {
        Err(reason) => shadow.lane.meter.drop_for(reason),
        Ok(request) => {
            let latest = Instant::now() + GIVE_UP;
            let is_custom = call.shard.engine.borrow_mut().is_custom(shadow.deployment);
            let choice = is_custom.then(|| Choice { deployment: shadow.name.clone(), ..call.describe() });
            let copy = Copy {
                shard: Rc::clone(call.shard),
                deployment: shadow.deployment,
                affinity: call.marks.affinity,
                choice: choice.unwrap_or_default(),
                until: call.deadline.map_or(latest, |deadline| deadline.min(latest)),
                held: Held::new(Rc::clone(&shadow.lane), request.len()),
                request,
            };
            tokio::task::spawn_local(copy.run());
        }
    }
}

/// A copy on its way.
struct Copy {
    shard: Rc<Shard>,
    deployment: DeploymentKey,
    affinity: Affinity,
    choice: Choice,
    until: Instant,
    request: Bytes,
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
    async fn run(self) {
        let meter = &self.held.lane.meter;
        match timeout_at(self.until, self.send()).await {
            Ok(Ok(status)) if status < 500 => meter.answered.up(),
            Ok(Ok(_) | Err(Unanswered::Failed)) => meter.errors.up(),
            Ok(Err(Unanswered::Refused)) => meter.drop_for(Dropped::Refused),
            Err(_) => meter.drop_for(Dropped::Timeout),
        }
    }

    /// The status of the answer, when all of it has come.
    async fn send(&self) -> Result<u32, Unanswered> {
        let refused = |_: Error| Unanswered::Refused;
        let describe = || self.choice.clone();
        let pack = || Packed::copy(self.request.clone(), Some(self.until));
        let mut sent = false;
        let mut came = self.shard.admit(self.deployment, self.affinity, pack, describe).await.map_err(refused)?;
        loop {
            let (stream, place) = came.sent(|lease| {
                self.shard.open(lease, flag::FIN, Some(self.until), |out| out.extend_from_slice(&self.request))
            });
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
            match poll_fn(|cx| stream.poll_outcome(cx)).await {
                Outcome::Back(waiting) => {
                    drop(stream);
                    came = waiting.end(describe).await.map_err(refused)?;
                }
                Outcome::Failed(_) => return Err(Unanswered::Failed),
                Outcome::Head(head) => {
                    if !head.whole {
                        stream.consumed(head.view.body().len());
                        discard(&stream).await.map_err(|_| Unanswered::Failed)?;
                    }
                    return Ok(head.status);
                }
            }
        }
    }
}

async fn discard(stream: &StreamRef) -> Result<(), Error> {
    while let Some(chunk) = poll_fn(|cx| stream.poll_chunk(cx)).await {
        chunk?;
    }
    Ok(())
}

/// Counts a copy and its bytes as open while it lives.
struct Held {
    lane: Rc<Lane>,
    bytes: usize,
}

impl Held {
    fn new(lane: Rc<Lane>, bytes: usize) -> Self {
        lane.open.set(lane.open.get() + 1);
        lane.bytes.set(lane.bytes.get() + bytes);
        Self { lane, bytes }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.lane.open.set(self.lane.open.get() - 1);
        self.lane.bytes.set(self.lane.bytes.get() - self.bytes);
    }
}
