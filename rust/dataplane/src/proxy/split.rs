//! Requests of routes that have several targets: the choice, waiting while none is ready, and what is counted.
//!
//! The choice itself is the engine's. A request waits in the queue of the target that was chosen for it, within that
//! deployment's limits; one whose target is not ready while another is leaves for the other.

use std::{pin::pin, rc::Rc, sync::Arc, task::Poll, time::Instant as Clock};

use http::{HeaderMap, header::COOKIE};
use tokio::time::Instant;

use super::{
    body::Inbound,
    relay::{Call, carry},
    shadow::{Shadow, copy},
    shard::{Found, Route, Shard},
    stream::{Head, StreamRef},
    waiting::{Asked, Came, Waiting},
};
use crate::{
    engine::{DeploymentKey, Engine, SplitKey, Turn, split::cookie},
    error::{Blame, Error},
    snapshot::{self, Sign},
    traffic::TargetMeter,
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
}

/// What a header or cookie of the request says.
fn read<'h>(headers: &'h HeaderMap, sign: &Sign) -> Option<&'h [u8]> {
    match sign {
        Sign::Header(name) => headers.get(name).map(http::HeaderValue::as_bytes),
        Sign::Cookie(name) => headers.get_all(COOKIE).iter().find_map(|header| cookie(header.as_bytes(), name)),
    }
}

/// Counts a request at its target when it ends, whichever way.
pub(super) struct Watch {
    meter: Arc<TargetMeter>,
    since: Clock,
    deadline: Option<Instant>,
}

impl Watch {
    /// Ends it with what the request has come to.
    pub(super) fn end(mut self, result: &mut Result<(StreamRef, Head), Error>) {
        let meter = &self.meter;
        match result {
            Ok((stream, head)) => {
                meter.latency.record(self.since.elapsed());
                if head.status >= 500 {
                    meter.errors.up();
                } else if !head.whole {
                    stream.meter = Some(Arc::clone(meter));
                }
            }
            Err(error) if error.blame() == Blame::Client => {}
            Err(_) => {
                meter.latency.record(self.since.elapsed());
                meter.errors.up();
            }
        }
        self.deadline = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.meter.requests.up();
        // Out of time, or the client has left.
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.meter.latency.record(self.since.elapsed());
            self.meter.errors.up();
        }
    }
}

/// What `relay` is for other routes: sends the request to one of the targets, counts it there, and copies it for shadows.
///
/// # Errors
/// See [`Error`]; nothing has been sent to the client then.
pub(super) async fn relay_to_targets(mut call: Call<'_>, body: Inbound) -> Result<(StreamRef, Head), Error> {
    let route = Rc::clone(&call.route);
    let found = (Rc::clone(&route), std::mem::take(&mut call.params));
    let mut result = match call.choose(Some(found), &body).await {
        Ok(came) => {
            for shadow in route.fork.iter().flat_map(|fork| &fork.shadows) {
                copy(&call, shadow, &body);
            }
            carry(&mut call, came, body).await
        }
        Err(error) => Err(error),
    };
    if let Some(watch) = call.watch.take() {
        watch.end(&mut result);
    }
    result
}

impl Call<'_> {
    /// What comes of waiting for one of the targets. As long as none is ready this only waits; the request's deadline or its
    /// client ends that. `found` is the route if it has been looked up; one of an earlier snapshot is looked up again.
    pub(super) async fn choose(&mut self, mut found: Option<Found>, body: &Inbound) -> Result<Came, Error> {
        let shard = self.shard;
        loop {
            let turned = shard.readiness.notified();
            let Some((route, params)) = found.take().or_else(|| shard.route(self.path)) else {
                return Err(Error::Deleted("The route was deleted.".into()));
            };
            self.params = params;
            let Some(fork) = &route.fork else {
                (self.route, self.watch) = (route, None);
                match self.admit(body).await {
                    Err(Error::Deleted(_)) => continue,
                    came => return came,
                }
            };
            let headers = &self.parts.headers;
            let turn =
                shard.engine.borrow_mut().choose(fork.key, |splitter| splitter.choose(|sign| read(headers, sign)));
            let target = match turn {
                Ok(Turn::To(target) | Turn::Wait(Some(target))) => target,
                Ok(Turn::Wait(None)) => {
                    turned.await;
                    continue;
                }
                Err(Error::Deleted(_)) => continue,
                Err(error) => return Err(error),
            };
            self.aim(&fork.targets[target]);
            match shard.ask(self.route.deployment, self.marks.affinity) {
                Ok(Asked::Go(lease)) => return Ok(Came::Lease(lease)),
                Ok(Asked::Wait(waiting)) => {
                    waiting.pack(|| self.pack(body));
                    match self.unless_stranded(waiting).await {
                        Some(Err(Error::Deleted(_) | Error::Unavailable(_))) | None => {}
                        Some(came) => return came,
                    }
                }
                Err(Error::Deleted(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// What comes of one that waits at a target once more, there or at another.
    pub(super) async fn stay(&mut self, waiting: Waiting, body: &Inbound) -> Result<Came, Error> {
        match self.unless_stranded(waiting).await {
            Some(Err(Error::Deleted(_) | Error::Unavailable(_))) | None => self.choose(None, body).await,
            Some(came) => came,
        }
    }

    fn aim(&mut self, target: &Rc<Route>) {
        self.route = Rc::clone(target);
        let meter = target.meter.as_ref().map(Arc::clone);
        let deadline = self.deadline;
        match (&mut self.watch, meter) {
            // Nothing has ended at the target that the request leaves.
            (Some(watch), Some(meter)) => (watch.meter, watch.since) = (meter, Clock::now()),
            (watch, meter) => *watch = meter.map(|meter| Watch { meter, since: Clock::now(), deadline }),
        }
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
