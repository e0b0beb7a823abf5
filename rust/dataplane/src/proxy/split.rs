//! Requests of routes that have several targets: the choice, waiting while none is ready, and what is counted.
//!
//! The choice itself is the engine's. A request waits in the queue of the target that was chosen for it, within that
//! deployment's limits; one whose target is not ready while another is leaves for the other.

use std::{pin::pin, rc::Rc, sync::Arc, task::Poll, time::Instant as Clock};

use http::{HeaderMap, header::COOKIE};
use tokio::time::Instant;

use super::{
    body::Inbound,
    relay::Call,
    shadow::{Shadow, copy},
    shard::{Route, Shard},
    stream::{Head, StreamRef},
    waiting::{Asked, Came, Waiting},
};
use crate::{
    engine::{DeploymentKey, Engine, SplitKey, Turn, split::cookie},
    error::{Blame, Error},
    snapshot::{self, Sign},
};

/// What a route leads to that has a split.
#[derive(Debug)]
pub(super) struct Fork {
    pub(super) key: SplitKey,
    /// One route a target, in the snapshot's order.
    targets: Vec<Rc<Route>>,
    shadows: Vec<Rc<Shadow>>,
}

impl Fork {
    /// The fork of `route`, whose split the engine knows by the same snapshot.
    pub(super) fn new(
        shard: &Shard,
        engine: &mut Engine<usize>,
        route: &Route,
        name: &str,
        split: &snapshot::Split,
    ) -> Option<Self> {
        let key = engine.split(name)?;
        let targets = split.targets.iter().enumerate().map(|(at, target)| {
            let deployment = engine.target(key, at).unwrap_or(DeploymentKey::NONE);
            Rc::new(Route {
                deployment,
                prefix: route.prefix.clone(),
                root_path: route.root_path.clone(),
                retry_idempotent: engine.config(deployment).is_some_and(|config| config.retry_idempotent),
                batched: engine.config(deployment).is_some_and(|config| config.batch.is_some()),
                methods: None, // the fork's own route has let the request through
                fork: None,
                meter: Some(shard.metrics.traffic.target(name, &target.name)),
                copied: split.shadows.iter().any(|shadow| shadow.share > 0.0),
            })
        });
        let targets = targets.collect();
        let shadows = split.shadows.iter().filter(|shadow| shadow.share > 0.0);
        Some(Self { key, targets, shadows: shadows.map(|shadow| Shadow::new(shard, engine, name, shadow)).collect() })
    }

    pub(super) fn is_batched(&self) -> bool {
        self.targets.iter().any(|target| target.batched)
    }
}

/// What a header or cookie of the request says.
fn read<'h>(headers: &'h HeaderMap, sign: &Sign) -> Option<&'h [u8]> {
    match sign {
        Sign::Header(name) => headers.get(name).map(http::HeaderValue::as_bytes),
        Sign::Cookie(name) => headers.get_all(COOKIE).iter().find_map(|header| cookie(header.as_bytes(), name)),
    }
}

impl Call<'_> {
    /// A slot at one of the route's targets, or that the request was sent there with a batch. Shadows get their copies then.
    pub(super) async fn divide(&mut self, body: &mut Inbound) -> Result<Came, Error> {
        let route = Rc::clone(&self.route);
        let came = match self.ask(&route) {
            Ok(Some(Asked::Go(lease))) => Came::Lease(lease),
            // In a box: what those need that have to wait must not make every request's future larger.
            asked => Box::pin(self.choose(asked, body)).await?,
        };
        for shadow in route.fork.iter().flat_map(|fork| &fork.shadows) {
            copy(self, shadow, body);
        }
        Ok(came)
    }

    /// What comes of having asked one of the targets, or of asking others. As long as none is ready this only waits; the
    /// request's deadline or its client ends that.
    pub(super) async fn choose(
        &mut self,
        mut asked: Result<Option<Asked>, Error>,
        body: &Inbound,
    ) -> Result<Came, Error> {
        loop {
            match asked {
                Ok(Some(Asked::Go(lease))) => return Ok(Came::Lease(lease)),
                Ok(Some(Asked::Wait(waiting))) => {
                    waiting.pack(|| self.pack(body));
                    match self.unless_stranded(waiting).await {
                        Some(Err(Error::Deleted(_) | Error::Unavailable(_))) | None => {}
                        Some(came) => return came,
                    }
                }
                Ok(None) => self.shard.readiness.notified().await,
                Err(Error::Deleted(_)) => {}
                Err(error) => return Err(error),
            }
            let Some((route, params)) = self.shard.route(self.path) else {
                return Err(Error::Deleted("The route was deleted.".into()));
            };
            self.params = params;
            asked = self.ask(&route);
        }
    }

    /// Asks for a lease where `route` leads; `None`: there is no target to wait at. [`Error::Deleted`] if the route is of an
    /// earlier snapshot.
    pub(super) fn ask(&mut self, route: &Rc<Route>) -> Result<Option<Asked>, Error> {
        let (shard, headers) = (self.shard, &self.parts.headers);
        match &route.fork {
            None => self.aim(Rc::clone(route), None),
            Some(Fork { key, targets, .. }) => {
                let turn = shard.engine.borrow_mut().choose(*key, |it| it.choose(|sign| read(headers, sign)))?;
                let (Turn::To(at) | Turn::Wait(Some(at))) = turn else { return Ok(None) };
                self.aim(Rc::clone(&targets[at]), Some(Clock::now()));
            }
        }
        shard.ask(self.route.deployment, self.marks.affinity).map(Some)
    }

    /// What comes of it, unless the target is not ready and another is or becomes so; then the request leaves its place.
    async fn unless_stranded(&self, waiting: Waiting) -> Option<Result<Came, Error>> {
        let mut work = pin!(waiting.end(|| self.describe()));
        let mut turned = pin!(self.shard.readiness.notified());
        // One that comes back waits where readiness may have changed before it did.
        let mut unsure = true;
        std::future::poll_fn(|cx| {
            if let Poll::Ready(came) = work.as_mut().poll(cx) {
                return Poll::Ready(Some(came));
            }
            while std::mem::take(&mut unsure) || turned.as_mut().poll(cx).is_ready() {
                if self.is_stranded() {
                    return Poll::Ready(None);
                }
                turned.set(self.shard.readiness.notified());
            }
            Poll::Pending
        })
        .await
    }

    fn is_stranded(&self) -> bool {
        let fork = self.shard.route(self.path);
        let Some(key) = fork.as_ref().and_then(|(route, _)| Some(route.fork.as_ref()?.key)) else { return false };
        self.shard.engine.borrow_mut().strands(key, self.route.deployment)
    }
}

impl Call<'_> {
    /// From now on the request is one of that route, `aimed` if it is a target that was chosen for it.
    pub(super) fn aim(&mut self, route: Rc<Route>, aimed: Option<Clock>) {
        if let Some(meter) = &self.route.meter {
            meter.open.down();
        }
        if let Some(meter) = &route.meter {
            meter.open.up();
        }
        (self.route, self.aimed) = (route, aimed);
    }

    /// Counts at its target what the request has come to, if its route has targets.
    pub(super) fn end(&mut self, result: &mut Result<(StreamRef, Head), Error>) {
        let (Some(meter), Some(since)) = (&self.route.meter, self.aimed.take()) else { return };
        match result {
            Ok((stream, head)) => {
                meter.latency.record(since.elapsed());
                if head.status >= 500 {
                    meter.errors.up();
                } else if !head.whole {
                    stream.meter = Some(Arc::clone(meter));
                }
            }
            Err(error) if error.blame() == Blame::Client => {}
            Err(_) => {
                meter.latency.record(since.elapsed());
                meter.errors.up();
            }
        }
    }
}

/// Whichever way a request ends, it is one of the target where it is then: nothing has ended at those that it has left.
impl Drop for Call<'_> {
    fn drop(&mut self) {
        let Some(meter) = &self.route.meter else { return };
        meter.open.down();
        meter.requests.up();
        // Out of time, or the client has left: an answer would have taken longer than that.
        if let Some(since) = self.aimed {
            meter.latency.record(since.elapsed());
            if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                meter.errors.up();
            }
        }
    }
}
