//! One thread of the proxy: its engine, its links, its connections; shared with no other thread but by counters.
//!
//! Everything here lives on one current-thread runtime, so that state is plain cells. No borrow of a cell is held across an
//! await or a call that could come back here.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    task::{Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use slab::Slab;
use tokio::{sync::Notify, time::Instant};

use super::{
    Shared, choose::Choice, link::Link, listen::Conn, shadow::Lane, split::Fork, stream::StreamRef, vigil::Events,
};
use crate::{
    engine::{Action, Admission, Affinity, DeploymentKey, Engine, Lease, Place, ReplicaKey, RouteTable},
    error::Error,
    metrics::Metrics,
    snapshot::{self, Snapshot},
    traffic::TargetMeter,
    wire::{Header, Kind, flag, frame::put_with},
};

/// What a request needs to know of its route, resolved when the snapshot came.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) deployment: DeploymentKey,
    pub(super) prefix: Vec<u8>,
    /// `HTTPOptions.root_path` and the prefix.
    pub(super) root_path: Vec<u8>,
    pub(super) retry_idempotent: bool,
    /// Several answer, each its share; `deployment` leads nowhere then.
    pub(super) fork: Option<Fork>,
    /// Counts the requests, where this is what a fork leads to.
    pub(super) meter: Option<Arc<TargetMeter>>,
}

/// A request that waits for a replica.
struct Waiter {
    waker: Option<Waker>,
    result: Option<Result<Lease, Error>>,
}

/// See the module.
pub(super) struct Shard {
    pub(super) shared: Arc<Shared>,
    pub(super) metrics: Arc<Metrics>,
    /// Among the proxy's shards.
    pub(super) index: Cell<usize>,
    pub(super) engine: RefCell<Engine<usize>>,
    routes: RefCell<RouteTable<Rc<Route>>>,
    /// Wakes who waits for a target of a split.
    pub(super) readiness: Notify,
    /// By split and shadow.
    pub(super) lanes: RefCell<HashMap<(String, String), Rc<Lane>>>,
    /// `/-/routes`; none before the first snapshot.
    pub(super) listing: RefCell<Option<Bytes>>,
    pub(super) node_draining: Cell<bool>,
    links: RefCell<Vec<Option<Rc<Link>>>>,
    waiters: RefCell<Slab<Waiter>>,
    pub(super) conns: RefCell<Slab<Rc<Conn>>>,
    /// Goes up with every sweep; the only clock that connections read.
    pub(super) tick: Cell<u64>,
    pub(super) random: RefCell<fastrand::Rng>,
    pub(super) events: Events,
}

impl Shard {
    pub(super) fn new(shared: Arc<Shared>, metrics: Arc<Metrics>) -> Rc<Self> {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).expect("the operating system has random bytes");
        let engine = RefCell::new(Engine::sharing(shared.schedules.clone()));
        Rc::new(Self {
            shared,
            metrics,
            index: Cell::new(0),
            engine,
            routes: RefCell::default(),
            readiness: Notify::new(),
            lanes: RefCell::default(),
            listing: RefCell::default(),
            node_draining: Cell::new(false),
            links: RefCell::default(),
            waiters: RefCell::default(),
            conns: RefCell::default(),
            tick: Cell::new(0),
            events: Events::default(),
            random: RefCell::new(fastrand::Rng::with_seed(u64::from_ne_bytes(seed))),
        })
    }

    /// Makes a snapshot the truth.
    pub(super) fn apply(self: &Rc<Self>, snapshot: &Snapshot) {
        let mut engine = self.engine.borrow_mut();
        engine.apply(snapshot);
        let routes = snapshot.routes.iter().filter_map(|route| {
            let resolved = self.resolve(&mut engine, snapshot, route)?;
            Some((route.prefix.clone(), Rc::new(resolved)))
        });
        *self.routes.borrow_mut() = RouteTable::new(routes);
        drop(engine);
        let listing: serde_json::Map<_, _> =
            snapshot.routes.iter().map(|route| (route.prefix.clone(), route.app.clone().into())).collect();
        *self.listing.borrow_mut() = Some(serde_json::Value::Object(listing).to_string().into());
        self.node_draining.set(snapshot.draining_nodes.contains(&self.shared.config.node_id));
        self.settle();
    }

    fn resolve(&self, engine: &mut Engine<usize>, snapshot: &Snapshot, route: &snapshot::Route) -> Option<Route> {
        let root_path = self.shared.config.root_path.as_bytes();
        let mut resolved = Route {
            deployment: DeploymentKey::NONE,
            prefix: route.prefix.as_bytes().to_vec(),
            root_path: [root_path, route.prefix.trim_end_matches('/').as_bytes()].concat(),
            retry_idempotent: false,
            fork: None,
            meter: None,
        };
        if let Some(name) = &route.split {
            resolved.fork = Some(Fork::new(self, engine, &resolved, name, snapshot.splits.get(name)?)?);
        } else {
            resolved.deployment = engine.deployment(&route.deployment)?;
            resolved.retry_idempotent = engine.config(resolved.deployment)?.retry_idempotent;
        }
        Some(resolved)
    }

    /// The route of a percent-decoded path.
    pub(super) fn route(&self, path: &[u8]) -> Option<Rc<Route>> {
        self.routes.borrow().find(path).map(Rc::clone)
    }

    /// Carries out what the engine asks for; called after every event that the engine was told.
    pub(super) fn settle(self: &Rc<Self>) {
        loop {
            let Some(action) = self.engine.borrow_mut().next_action() else { return };
            match action {
                Action::Start(waiter, lease) => self.tell(waiter, Ok(lease)),
                Action::Refuse(waiter, error) => self.tell(waiter, Err(error)),
                Action::Open(key, address) => {
                    let link = Link::new(key, address);
                    self.set_link(key, Some(Rc::clone(&link)));
                    tokio::task::spawn_local(link.supervise(Rc::clone(self)));
                }
                Action::Close(key) => match self.link(key) {
                    Some(link) => link.leave(),
                    None => drop(self.engine.borrow_mut().closed(key)),
                },
                Action::Unused(key, count) => {
                    if let Some(link) = self.link(key) {
                        link.unused(count);
                    }
                }
                Action::Readiness => self.readiness.notify_waiters(),
            }
        }
    }

    fn tell(&self, waiter: usize, result: Result<Lease, Error>) {
        if let Some(waiter) = self.waiters.borrow_mut().get_mut(waiter) {
            waiter.result = Some(result);
            if let Some(waker) = waiter.waker.take() {
                waker.wake();
            }
        }
    }

    pub(super) fn link(&self, key: ReplicaKey) -> Option<Rc<Link>> {
        self.links.borrow().get(key.index()).and_then(Clone::clone)
    }

    pub(super) fn set_link(&self, key: ReplicaKey, link: Option<Rc<Link>>) {
        let mut links = self.links.borrow_mut();
        if links.len() <= key.index() {
            links.resize(key.index() + 1, None);
        }
        links[key.index()] = link;
    }

    /// A lease for a new request, as soon as there is one.
    pub(super) async fn admit(
        self: &Rc<Self>,
        deployment: DeploymentKey,
        affinity: Affinity,
        describe: impl Fn() -> Choice,
    ) -> Result<Lease, Error> {
        match self.ask(deployment, affinity)? {
            Asked::Go(lease) => Ok(lease),
            Asked::Wait(waiting) => waiting.lease(describe).await,
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
    pub(super) fn again(self: &Rc<Self>, place: Place) -> Result<Waiting, Error> {
        let mut waiting = None;
        let admission = self.engine.borrow_mut().again(place, |place| self.wait(place, &mut waiting))?;
        if let Admission::Go(lease) = admission {
            let key = self.wait(place, &mut waiting);
            self.waiters.borrow_mut()[key].result = Some(Ok(lease));
        }
        Ok(waiting.expect("the engine asks for a waiter unless the request goes"))
    }

    fn wait(self: &Rc<Self>, place: Place, waiting: &mut Option<Waiting>) -> usize {
        let key = self.waiters.borrow_mut().insert(Waiter { waker: None, result: None });
        *waiting = Some(Waiting { shard: Rc::clone(self), place, key });
        key
    }

    /// Writes a REQUEST whose payload `fill` writes; `None` if the lease's link has gone since.
    pub(super) fn open(
        self: &Rc<Self>,
        lease: Lease,
        flags: u8,
        deadline: Option<Instant>,
        fill: impl FnOnce(&mut BytesMut),
    ) -> Option<StreamRef> {
        if !self.engine.borrow().holds(&lease) {
            return None;
        }
        let link = self.link(lease.replica)?;
        let granted = if lease.granted { flag::GRANTED } else { 0 };
        let left = deadline.map_or(0, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            u32::try_from(left).unwrap_or(u32::MAX).max(1)
        });
        let opened = link.open(self, lease, |out, id| {
            put_with(out, Header::new(Kind::Request, id).with(granted | flags).aux(left), fill);
        });
        match opened {
            Ok(stream) => Some(stream),
            Err(lease) => {
                self.release(lease);
                None
            }
        }
    }

    /// Gives a lease back that was not used for sending.
    pub(super) fn release(self: &Rc<Self>, lease: Lease) {
        self.engine.borrow_mut().unsent(lease);
        self.settle();
    }
}

/// What comes of asking for a lease.
pub(super) enum Asked {
    Go(Lease),
    Wait(Waiting),
}

/// A place in the queue: left when the request goes away, and a lease that came too late is given back.
pub(super) struct Waiting {
    shard: Rc<Shard>,
    place: Place,
    key: usize,
}

impl Waiting {
    /// The lease, as soon as there is one; a router in Python is told of the request that `describe` describes.
    pub(super) async fn lease(self, describe: impl Fn() -> Choice) -> Result<Lease, Error> {
        let shard = &self.shard;
        if shard.engine.borrow_mut().is_custom(self.place.deployment)
            && shard.waiters.borrow()[self.key].result.is_none()
        {
            shard.shared.choices.ask(shard.index.get(), self.place, describe());
        }
        std::future::poll_fn(|cx| {
            let mut waiters = self.shard.waiters.borrow_mut();
            let waiter = &mut waiters[self.key];
            if let Some(result) = waiter.result.take() {
                return Poll::Ready(result);
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
        self.shard.engine.borrow_mut().cancel(self.place);
        if let Some(Ok(lease)) = waiter.result {
            self.shard.release(lease);
        }
    }
}
