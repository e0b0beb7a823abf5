//! The HTTP proxy: hyper on a few single-threaded tokio runtimes ("shards") that share nothing but the snapshot.
//!
//! [`Proxy`] is what Python holds. Its threads are started by [`Proxy::start`] and joined by [`Proxy::shutdown`] or `Drop`;
//! none of them ever touches the interpreter. They tell what an operator has to know to the `tracing` subscriber of the
//! thread that has started them.

mod batches;
mod body;
mod builtin;
mod choose;
mod config;
mod departure;
mod dial;
mod forwarded;
mod http;
mod link;
mod listen;
mod metrics_page;
mod relay;
mod sender;
mod shadow;
mod shard;
mod split;
mod stream;
mod vigil;
mod waiting;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::{SocketAddr, TcpListener},
    os::fd::RawFd,
    rc::Rc,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::{
    runtime::{Builder, LocalOptions},
    sync::watch,
};
use tracing::dispatcher;

pub use self::{
    choose::Choice,
    config::{Config, ConfigError},
};
use self::{choose::Choices, forwarded::Trusted, shard::Shard};
use crate::{
    engine::{Assigned, Candidate, Schedules},
    metrics::Metrics,
    snapshot::{self, Snapshot, SnapshotError},
    tally::{self, Batches, Tallies},
    traffic::SplitTotals,
};

/// Instants have an end; nobody waits for longer.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// What the shards are told.
#[derive(Debug, Default)]
struct Orders {
    snapshot: Option<Arc<Snapshot>>,
    /// Until when requests may finish.
    stop: Option<Instant>,
}

/// What all threads of a proxy see.
struct Shared {
    config: Config,
    /// Who may say for whom it sends a request.
    trusted: Trusted,
    draining: AtomicBool,
    /// On how many shards a replica's link is up.
    linked: Mutex<HashMap<String, usize>>,
    link_changed: Condvar,
    choices: Choices,
    /// Replicas with which the handshake has failed.
    distrusted: Mutex<HashSet<String>>,
    /// Of splits, in which the shards take turns.
    schedules: Schedules,
    /// One a shard.
    metrics: Mutex<Vec<Arc<Metrics>>>,
}

impl Shared {
    fn metrics(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Metrics>>> {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let mut sums = BTreeMap::new();
        for (name, value) in self.metrics().iter().flat_map(|metrics| metrics.all()) {
            *sums.entry(name).or_default() += value;
        }
        sums
    }

    fn traffic(&self) -> BTreeMap<String, SplitTotals> {
        let mut sums = BTreeMap::new();
        for metrics in self.metrics().iter() {
            metrics.traffic.add_to(&mut sums);
        }
        sums
    }

    fn batches(&self) -> BTreeMap<String, Batches> {
        Tallies::sum(self.metrics().iter().map(|metrics| &metrics.batches))
    }

    fn links(&self) -> std::sync::MutexGuard<'_, HashMap<String, usize>> {
        self.linked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn linked(&self, replica_id: &str) {
        *self.links().entry(replica_id.to_owned()).or_default() += 1;
        self.link_changed.notify_all();
    }

    /// Returns whether this was the last link.
    fn unlinked(&self, replica_id: &str) -> bool {
        let mut links = self.links();
        let Some(count) = links.get_mut(replica_id) else { return false };
        *count -= 1;
        let last = *count == 0;
        if last {
            links.remove(replica_id);
        }
        last
    }

    fn distrusted(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.distrusted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One proxy; two of them can live in one process.
pub struct Proxy {
    shared: Arc<Shared>,
    orders: watch::Sender<Orders>,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    address: Option<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
    /// Who started them: a fork has the handles and not the threads.
    process: u32,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Proxy({:?})", self.shared.config)
    }
}

impl Proxy {
    /// A proxy that does not listen yet. A snapshot that its predecessor kept is taken over.
    pub fn new(config: Config) -> Self {
        let shared = Shared {
            trusted: Trusted::parse(&config.forwarded_allow_ips),
            config,
            draining: AtomicBool::default(),
            linked: Mutex::default(),
            link_changed: Condvar::new(),
            choices: Choices::new(),
            distrusted: Mutex::default(),
            schedules: Schedules::default(),
            metrics: Mutex::default(),
        };
        let kept = shared.config.snapshot_path.as_ref().and_then(|path| std::fs::read(path).ok());
        let snapshot = kept.and_then(|json| Snapshot::parse(&json).ok()).map(Arc::new);
        let orders = watch::Sender::new(Orders { snapshot, stop: None });
        Self { shared: Arc::new(shared), orders, running: Mutex::default() }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Binds and starts the shards; returns the bound address, which a second call returns again.
    ///
    /// # Errors
    /// The address cannot be bound; the text says why and what to do.
    pub fn start(&self) -> io::Result<SocketAddr> {
        let mut running = self.running();
        if let Some(address) = running.address {
            return Ok(address);
        }
        listen::raise_descriptor_limit();
        let listener = listen::bind(&self.shared.config.host, self.shared.config.port)?;
        let address = listener.local_addr()?;
        for index in 0..self.shared.config.shards {
            let (shared, metrics) = (Arc::clone(&self.shared), Arc::<Metrics>::default());
            let (listener, orders) = (listener.try_clone()?, self.orders.subscribe());
            self.shared.metrics().push(Arc::clone(&metrics));
            let subscriber = dispatcher::get_default(Clone::clone);
            let body = move || dispatcher::with_default(&subscriber, || run(shared, metrics, listener, orders));
            running.threads.push(std::thread::Builder::new().name(format!("rsf-proxy-{index}")).spawn(body)?);
        }
        (running.address, running.process) = (Some(address), std::process::id());
        Ok(address)
    }

    /// Takes over a snapshot if its version is greater than the present one; returns whether it was.
    ///
    /// # Errors
    /// See [`SnapshotError`]; the present one stays.
    pub fn publish(&self, json: &[u8]) -> Result<bool, SnapshotError> {
        let snapshot = Arc::new(Snapshot::parse(json)?);
        let newer = self.orders.send_if_modified(|orders| {
            let newer = snapshot.replaces(orders.snapshot.as_deref());
            if newer {
                orders.snapshot = Some(snapshot);
            }
            newer
        });
        if newer && let Some(path) = &self.shared.config.snapshot_path {
            // Serving goes on without the file; only a restart would then wait for the controller.
            let _ = snapshot::save(path, json);
        }
        Ok(newer)
    }

    /// Waits until every shard has a link to each of these replicas; returns those of which one has not.
    pub fn wait_linked(&self, replica_ids: &[String], wait: Duration) -> Vec<String> {
        let shards = self.shared.config.shards;
        let missing = |links: &HashMap<String, usize>| -> Vec<String> {
            replica_ids.iter().filter(|id| links.get(*id).is_none_or(|&count| count < shards)).cloned().collect()
        };
        let (links, _) = self
            .shared
            .link_changed
            .wait_timeout_while(self.shared.links(), wait.min(LONGEST_WAIT), |links| !missing(links).is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        missing(&links)
    }

    /// Every counter, summed over the shards.
    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        self.shared.counters()
    }

    /// What the splits have counted, summed over the shards, as JSON: see [`SplitTotals`].
    pub fn traffic(&self) -> String {
        serde_json::to_string(&self.shared.traffic()).expect("names and numbers are JSON")
    }

    /// The text of `/-/metrics`.
    pub fn metrics_text(&self) -> String {
        metrics_page::text(&self.shared)
    }

    /// What is counted of batches, as JSON: see [`tally::json`].
    pub fn batches(&self) -> String {
        tally::json(&self.shared.batches()).to_string()
    }

    /// A descriptor that is readable while [`Self::choices`] has something.
    pub fn choices_fd(&self) -> RawFd {
        self.shared.choices.fd()
    }

    /// Requests that have come to wait for a router in Python, and the numbers of those that were assigned and have ended.
    pub fn choices(&self) -> (Vec<Choice>, Vec<u64>) {
        self.shared.choices.take()
    }

    /// What a router may choose from for a request, and the user's router; `None`: the request has ended.
    pub fn candidates(&self, number: u64) -> Option<(Vec<Candidate>, Option<String>)> {
        self.shared.choices.candidates(number)
    }

    /// Gives a request to a replica of these ranks, see [`Engine::assign`](crate::engine::Engine::assign).
    pub fn assign(&self, number: u64, ranks: Vec<Vec<String>>) -> Assigned {
        self.shared.choices.assign(number, ranks)
    }

    /// Makes `/-/healthz` say that this node is being drained; requests are still served.
    pub fn drain(&self) {
        self.shared.draining.store(true, Relaxed);
    }

    /// Stops listening, lets requests finish for as long as `wait`, and joins the threads.
    pub fn shutdown(&self, wait: Duration) {
        self.orders.send_modify(|orders| orders.stop = Some(Instant::now() + wait.min(LONGEST_WAIT)));
        let Running { threads, process, .. } = &mut *self.running();
        for thread in threads.drain(..).filter(|_| *process == std::process::id()) {
            // A shard that panicked has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shutdown(Duration::ZERO);
    }
}

/// A shard's thread.
fn run(shared: Arc<Shared>, metrics: Arc<Metrics>, listener: TcpListener, orders: watch::Receiver<Orders>) {
    let runtime = Builder::new_current_thread().enable_io().enable_time().build_local(LocalOptions::default());
    let runtime = runtime.expect("a thread can have an epoll descriptor");
    runtime.block_on(serve(Shard::new(shared, metrics), listener, orders));
}

async fn serve(shard: Rc<Shard>, listener: TcpListener, mut orders: watch::Receiver<Orders>) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("the listener is non-blocking");
    let (index, wishes) = shard.shared.choices.join();
    shard.index.set(index);
    tokio::task::spawn_local(choose::obey(Rc::clone(&shard), wishes));
    let accepting = tokio::task::spawn_local(listen::accept(Rc::clone(&shard), listener));
    tokio::task::spawn_local(listen::sweep(Rc::clone(&shard)));
    tokio::task::spawn_local(vigil::keep(Rc::clone(&shard)));
    tokio::task::spawn_local(batches::keep(Rc::clone(&shard)));
    let mut applied = None;
    let stop = loop {
        let (snapshot, stop) = {
            let orders = orders.borrow_and_update();
            (orders.snapshot.clone(), orders.stop)
        };
        if let Some(stop) = stop {
            break stop;
        }
        if let Some(snapshot) = snapshot.filter(|snapshot| applied != Some(snapshot.version)) {
            shard.apply(&snapshot);
            applied = Some(snapshot.version);
        }
        if orders.changed().await.is_err() {
            break Instant::now();
        }
    };
    accepting.abort();
    let _ = accepting.await;
    for (_, conn) in shard.conns.borrow().iter() {
        conn.retire();
    }
    while !shard.conns.borrow().is_empty() && Instant::now() < stop {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
