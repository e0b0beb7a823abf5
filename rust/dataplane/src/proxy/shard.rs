//! One thread of the proxy: its engine, its links, its connections; shared with no other thread but by counters.
//!
//! Everything here lives on one current-thread runtime, so that state is plain cells. No borrow of a cell is held across an
//! await or a call that could come back here.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use slab::Slab;
use tokio::{sync::Notify, time::Instant};

use super::{
    Shared,
    batches::left_ms,
    link::Link,
    listen::Conn,
    shadow::Lane,
    split::Fork,
    stream::{StreamRef, wake},
    vigil::Events,
    waiting::{Came, Waiter},
};
use crate::{
    engine::{Action, DeploymentKey, Engine, Lease, ReplicaKey, RouteTable, pattern::Pattern},
    error::Error,
    metrics::Metrics,
    snapshot::{self, Snapshot},
    tally::Tally,
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
    /// One call may serve several requests: it should not wait for one whose small body is still on its way.
    pub(super) batched: bool,
    /// The HTTP methods that are let through, if not all.
    pub(super) methods: Option<Vec<String>>,
    /// Several answer, each its share; `deployment` leads nowhere then.
    pub(super) fork: Option<Fork>,
    /// Counts the requests, where this is what a fork leads to.
    pub(super) meter: Option<Arc<TargetMeter>>,
    /// Shadows get copies of them.
    pub(super) copied: bool,
}

impl Route {
    /// Whether a request of that method is let through; who takes GET takes HEAD.
    ///
    /// # Errors
    /// [`Error::Method`].
    pub(super) fn takes(&self, method: &str) -> Result<(), Error> {
        let Some(allowed) = &self.methods else { return Ok(()) };
        if allowed.iter().any(|other| other == method || (method == "HEAD" && other == "GET")) {
            return Ok(());
        }
        Err(Error::Method { method: method.to_owned(), allowed: allowed.clone() })
    }
}

/// A route, and what its pattern found in the path.
pub(super) type Found = (Rc<Route>, Vec<u8>);

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
    /// By split and shadow, as long as a route or a copy holds it.
    pub(super) lanes: RefCell<HashMap<(String, String), Rc<Lane>>>,
    /// `/-/routes`; none before the first snapshot.
    pub(super) listing: RefCell<Option<Bytes>>,
    links: RefCell<Vec<Option<Rc<Link>>>>,
    pub(super) waiters: RefCell<Slab<Waiter>>,
    /// There are batches to bind.
    pub(super) sealing: Notify,
    pub(super) tallies: RefCell<HashMap<DeploymentKey, Arc<Tally>>>,
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
        let (node, near_first) = (shared.config.node_id.clone(), shared.config.prefer_local_node);
        let engine = RefCell::new(Engine::sharing(shared.schedules.clone()).on(node, near_first));
        Rc::new(Self {
            shared,
            metrics,
            index: Cell::new(0),
            engine,
            routes: RefCell::default(),
            readiness: Notify::new(),
            lanes: RefCell::default(),
            listing: RefCell::default(),
            links: RefCell::default(),
            waiters: RefCell::default(),
            sealing: Notify::new(),
            tallies: RefCell::default(),
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
        let (mut prefixes, mut patterns) = (Vec::new(), Vec::new());
        for route in &snapshot.routes {
            let Some(resolved) = self.resolve(&mut engine, snapshot, route) else { continue };
            match Pattern::parse(&route.prefix) {
                Ok(pattern) if route.pattern => patterns.push((pattern, Rc::new(resolved))),
                _ => prefixes.push((route.prefix.clone(), Rc::new(resolved))),
            }
        }
        *self.routes.borrow_mut() = RouteTable::new(prefixes).with_patterns(patterns);
        drop(engine);
        self.lanes.borrow_mut().retain(|_, lane| Rc::strong_count(lane) > 1);
        let label = |route: &snapshot::Route| route.label.clone().unwrap_or_else(|| route.app.clone().into());
        self.tallies.borrow_mut().retain(|&key, _| self.engine.borrow_mut().config(key).is_some());
        let listing: serde_json::Map<_, _> =
            snapshot.routes.iter().map(|route| (route.prefix.clone(), label(route))).collect();
        *self.listing.borrow_mut() = Some(serde_json::Value::Object(listing).to_string().into());
        self.settle();
    }

    fn resolve(&self, engine: &mut Engine<usize>, snapshot: &Snapshot, route: &snapshot::Route) -> Option<Route> {
        let root_path = self.shared.config.root_path.as_bytes();
        let mounted = if route.pattern { "" } else { route.prefix.trim_end_matches('/') };
        let mut resolved = Route {
            deployment: DeploymentKey::NONE,
            prefix: route.prefix.as_bytes().to_vec(),
            root_path: [root_path, mounted.as_bytes()].concat(),
            retry_idempotent: false,
            batched: false,
            methods: route.methods.clone(),
            fork: None,
            meter: None,
            copied: false,
        };
        if let Some(name) = &route.split {
            let fork = Fork::new(self, engine, &resolved, name, snapshot.splits.get(name)?)?;
            (resolved.batched, resolved.fork) = (fork.is_batched(), Some(fork));
        } else {
            resolved.deployment = engine.deployment(&route.deployment)?;
            let config = engine.config(resolved.deployment)?;
            (resolved.retry_idempotent, resolved.batched) = (config.retry_idempotent, config.batch.is_some());
        }
        Some(resolved)
    }

    /// The route of a percent-decoded path.
    pub(super) fn route(&self, path: &[u8]) -> Option<Found> {
        self.routes.borrow().find(path).map(|found| (Rc::clone(found.to), found.params))
    }

    /// Carries out what the engine asks for; called after every event that the engine was told.
    pub(super) fn settle(self: &Rc<Self>) {
        loop {
            let Some(action) = self.engine.borrow_mut().next_action() else { break };
            match action {
                Action::Start(waiter, lease) => self.tell(waiter, Ok(Came::Lease(lease))),
                Action::Batch(batch) => self.bind(batch),
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
                Action::Ask(key) => {
                    let mut waiters = self.waiters.borrow_mut();
                    for &waiter in self.engine.borrow_mut().waiters(key) {
                        waiters.get_mut(waiter).into_iter().for_each(|waiter| wake(&mut waiter.waker));
                    }
                }
                Action::Readiness => self.readiness.notify_waiters(),
            }
        }
        self.seal_soon();
    }

    /// Has batches bound after every connection that is ready now.
    pub(super) fn seal_soon(&self) {
        if self.engine.borrow().is_due() {
            self.sealing.notify_one();
        }
    }

    fn tell(&self, waiter: usize, came: Result<Came, Error>) {
        if let Some(waiter) = self.waiters.borrow_mut().get_mut(waiter) {
            waiter.tell(came);
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
        let left = deadline.map_or(0, |deadline| left_ms(deadline.saturating_duration_since(Instant::now())));
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
