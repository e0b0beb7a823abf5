//! Waiting for a replica: a request's place in the engine's queue, and what comes of it.
//!
//! A place is left when its request goes away, and a lease that came too late is given back: both by `Drop`.

use std::{
    rc::Rc,
    task::{Poll, Waker},
};

use super::{
    batches::Packed,
    choose::{Choice, Chosen},
    shard::Shard,
    stream::{StreamRef, wake},
};
use crate::{
    engine::{Admission, Affinity, DeploymentKey, Lease, Place},
    error::Error,
};

/// What comes of waiting for a replica.
pub(super) enum Came {
    /// A slot: the REQUEST may be sent.
    Lease(Lease),
    /// The same, by a router in Python, which hears of the request's end; boxed, as this stands in every request's future.
    Chosen(Box<(Lease, Box<Chosen>)>),
    /// The REQUEST was sent with its batch.
    Sent(StreamRef, Place),
    /// The request has to wait again.
    Again(Place),
}

impl Came {
    /// The stream of the request, which is sent by `send` if it was not with its batch, and its place; no stream: the request
    /// has to wait there again.
    pub(super) fn sent(self, send: impl FnOnce(Lease) -> Option<StreamRef>) -> (Option<StreamRef>, Place) {
        match self {
            Self::Lease(lease) => {
                let place = lease.place;
                (send(lease), place)
            }
            Self::Chosen(chosen) => {
                let (lease, chosen) = *chosen;
                let place = lease.place;
                (send(lease).map(|stream| stream.by(chosen)), place)
            }
            Self::Sent(stream, place) => (Some(stream), place),
            Self::Again(place) => (None, place),
        }
    }
}

/// A request that waits for a replica.
pub(super) struct Waiter {
    pub(super) waker: Option<Waker>,
    /// Its frame, if it is to go in a batch.
    pub(super) packed: Option<Box<Packed>>,
    /// The question to its router, if that is one in Python.
    chosen: Option<Box<Chosen>>,
    came: Option<Result<Came, Error>>,
    /// It has left the queue, though its place may be there again already: that of a batch that came back.
    left: bool,
}

impl Waiter {
    pub(super) fn tell(&mut self, came: Result<Came, Error>) {
        (self.came, self.left) = (Some(came), true);
        wake(&mut self.waker);
    }
}

/// What comes of asking for a lease.
pub(super) enum Asked {
    Go(Lease),
    Wait(Waiting),
}

impl Shard {
    /// A lease for a new request, as soon as there is one; a frame made by `pack` is sent as soon as its batch is bound.
    pub(super) async fn admit(
        self: &Rc<Self>,
        deployment: DeploymentKey,
        affinity: Affinity,
        pack: impl FnOnce() -> Packed,
        describe: impl Fn() -> Choice,
    ) -> Result<Came, Error> {
        match self.ask(deployment, affinity)? {
            Asked::Go(lease) => Ok(Came::Lease(lease)),
            Asked::Wait(waiting) => {
                waiting.pack(pack);
                waiting.end(describe).await
            }
        }
    }

    /// A lease for a new request, or its place in the queue.
    #[inline]
    pub(super) fn ask(self: &Rc<Self>, deployment: DeploymentKey, affinity: Affinity) -> Result<Asked, Error> {
        let mut waiting = None;
        let admission =
            self.engine.borrow_mut().request(deployment, affinity, |place| self.wait(place, &mut waiting))?;
        match (admission, waiting) {
            (Admission::Go(lease), _) => Ok(Asked::Go(lease)),
            (Admission::Wait(_), Some(waiting)) => {
                self.metrics.queued.up();
                Ok(Asked::Wait(waiting))
            }
            (Admission::Wait(_), None) => unreachable!("the engine asks for a waiter before it says that one waits"),
        }
    }

    /// A request that came back takes its old place at once, so that a credit on the heels of its BUSY finds it.
    pub(super) fn again(self: &Rc<Self>, place: Place, packed: Option<Box<Packed>>) -> Result<Waiting, Error> {
        let mut waiting = None;
        let admission = self.engine.borrow_mut().again(place, |place| self.wait(place, &mut waiting))?;
        if let Admission::Go(lease) = admission {
            let key = self.wait(place, &mut waiting);
            self.waiters.borrow_mut()[key].tell(Ok(Came::Lease(lease)));
        }
        let waiting = waiting.expect("the engine asks for a waiter unless the request goes");
        self.waiters.borrow_mut()[waiting.key].packed = packed;
        self.seal_soon();
        Ok(waiting)
    }

    fn wait(self: &Rc<Self>, place: Place, waiting: &mut Option<Waiting>) -> usize {
        let waiter = Waiter { waker: None, packed: None, chosen: None, came: None, left: false };
        let key = self.waiters.borrow_mut().insert(waiter);
        *waiting = Some(Waiting { shard: Rc::clone(self), place, key });
        key
    }
}

/// A place in the queue: left when the request goes away, and a lease that came too late is given back.
pub(super) struct Waiting {
    shard: Rc<Shard>,
    place: Place,
    key: usize,
}

impl Waiting {
    /// Makes the frame ready if it is to go in a batch.
    pub(super) fn pack(&self, pack: impl FnOnce() -> Packed) {
        let batched = self.shard.engine.borrow_mut().is_batched(self.place.deployment);
        let waiter = &mut self.shard.waiters.borrow_mut()[self.key];
        if batched && waiter.packed.is_none() {
            waiter.packed = Some(Box::new(pack()));
            self.shard.seal_soon();
        }
    }

    /// What comes of it, as soon as it does; a router in Python is told of the request that `describe` describes.
    pub(super) async fn end(self, describe: impl Fn() -> Choice) -> Result<Came, Error> {
        std::future::poll_fn(|cx| {
            let Self { shard, place, key } = &self;
            let mut waiters = shard.waiters.borrow_mut();
            let waiter = &mut waiters[*key];
            if let Some(came) = waiter.came.take() {
                return Poll::Ready(match (came, waiter.chosen.take()) {
                    (Ok(Came::Lease(lease)), Some(chosen)) => Ok(Came::Chosen(Box::new((lease, chosen)))),
                    (came, _) => came,
                });
            }
            // Its deployment may have got that router since.
            if waiter.chosen.is_none() && shard.engine.borrow_mut().is_custom(place.deployment) {
                waiter.chosen = Some(Box::new(Chosen::ask(shard, *place, describe())));
            }
            waiter.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let waiter = self.shard.waiters.borrow_mut().remove(self.key);
        if !waiter.left {
            self.shard.engine.borrow_mut().cancel(self.place);
        }
        if let Some(Ok(Came::Lease(lease))) = waiter.came {
            self.shard.release(lease);
        }
    }
}
