//! Batches in the proxy: the task that brings the engine the time, and the frames of a batch, written in one go.
//!
//! A request that waits for its batch has left its frame here, so that binding one wakes no request: each sleeps on until
//! its answer is there. The task runs after every connection that is ready now, so what arrived together goes together.

use std::{rc::Rc, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, timeout_at};

use super::{link::Link, shard::Shard, stream::Aside, waiting::Came};
use crate::{
    engine::{Batch, DeploymentKey, Lease},
    snapshot::Deployment,
    tally::Tally,
    wire::{Header, Kind, batch::put_batch, flag, put},
};

/// The REQUEST of a request that waits for its batch, but for its stream.
pub(super) struct Packed {
    pub(super) head: BytesMut,
    /// The inline body.
    pub(super) body: Bytes,
    /// Nothing follows the frame.
    pub(super) whole: bool,
    /// Its request has something to do once it is sent.
    pub(super) wake: bool,
    pub(super) deadline: Option<Instant>,
}

impl Packed {
    /// A copy of a request, which counts when it is sent; `whole`: with its body.
    pub(super) fn copy(request: Bytes, whole: bool, deadline: Option<Instant>) -> Self {
        Self { head: BytesMut::new(), body: request, whole, wake: true, deadline }
    }

    /// The frame's header on this stream; `None`: the time of the request is over.
    fn header(&self, stream: u32, now: Instant) -> Option<Header> {
        let left = match self.deadline {
            None => 0,
            Some(deadline) => left_ms(deadline.checked_duration_since(now)?),
        };
        let fin = if self.whole { flag::FIN } else { 0 };
        Some(Header::new(Kind::Request, stream).with(flag::BATCHED | fin).aux(left))
    }
}

/// The time that is left as a REQUEST tells it.
pub(super) fn left_ms(left: std::time::Duration) -> u32 {
    u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1)
}

/// Binds batches, when something has happened and when it is time; runs until it is dropped.
pub(super) async fn keep(shard: Rc<Shard>) {
    let mut next = None;
    loop {
        let happened = shard.sealing.notified();
        match next {
            None => happened.await,
            Some(at) => drop(timeout_at(Instant::from_std(at), happened).await),
        }
        next = shard.engine.borrow_mut().seal(std::time::Instant::now());
        shard.settle();
    }
}

impl Shard {
    /// Writes a batch to its link.
    pub(super) fn bind(self: &Rc<Self>, batch: Batch<usize>) {
        let Some((_, Lease { replica, place, .. })) = batch.items.first() else { return };
        let (replica, deployment) = (*replica, place.deployment);
        let (now, mut sent) = (Instant::now(), Vec::with_capacity(batch.items.len()));
        let mut granted = false;
        let link = self.link(replica);
        for (waiter, lease) in batch.items {
            granted |= lease.granted;
            self.bind_one(link.as_ref(), waiter, lease, now, &mut sent);
        }
        let (Some(link), false) = (link, sent.is_empty()) else { return };
        let end = link.write(|out| put_batch(out, &sent, granted));
        for &id in &sent {
            // None of them begins before the BATCH is there.
            link.with(id, |stream| stream.begun_at = end);
        }
        self.tally(deployment).add(sent.len(), batch.waited, batch.reason);
    }

    fn bind_one(
        self: &Rc<Self>,
        link: Option<&Rc<Link>>,
        waiter: usize,
        lease: Lease,
        now: Instant,
        sent: &mut Vec<u32>,
    ) {
        let mut waiters = self.waiters.borrow_mut();
        let Some(waiting) = waiters.get_mut(waiter) else { return self.unsent(lease) };
        let place = lease.place;
        let lease = match (&waiting.packed, link) {
            (Some(packed), _) if packed.header(0, now).is_none() => return self.unsent(lease), // its deadline ends it now
            (Some(packed), Some(link)) if self.engine.borrow().holds(&lease) => {
                let opened = link.open(self, lease, |out, id| {
                    if let Some(header) = packed.header(id, now) {
                        put(out, header, &[&packed.head, &packed.body]);
                    }
                });
                match opened {
                    Ok(stream) => {
                        // Whoever has more to do is woken now, others when there is an answer.
                        let asleep = packed.whole && !packed.wake;
                        let reader = if asleep { waiting.waker.take() } else { None };
                        let packed = waiting.packed.take().map(Aside::Packed);
                        link.with(stream.id(), |entry| (entry.aside, entry.reader) = (packed, reader));
                        sent.push(stream.id());
                        return waiting.tell(Ok(Came::Sent(stream, place)));
                    }
                    Err(lease) => lease,
                }
            }
            // The link has gone since, or the request came to wait when its deployment did not batch.
            _ => lease,
        };
        self.unsent(lease);
        waiting.tell(Ok(Came::Again(place)));
    }

    fn unsent(&self, lease: Lease) {
        self.engine.borrow_mut().unsent(lease);
    }

    fn tally(&self, key: DeploymentKey) -> Arc<Tally> {
        let mut tallies = self.tallies.borrow_mut();
        let tally = tallies.entry(key).or_insert_with(|| {
            let name = self.engine.borrow_mut().config(key).map(Deployment::key);
            self.metrics.batches.of(&name.unwrap_or_default())
        });
        Arc::clone(tally)
    }
}
