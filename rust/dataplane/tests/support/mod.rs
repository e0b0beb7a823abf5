//! Real sockets for black-box tests: a proxy, replicas that do what the test says frame by frame, and a client that sees
//! every byte. Every wait is an event with a bound; what does not happen in time is a failure.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod auto;
pub mod client;
pub mod replica;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rayserve_dataplane::proxy::{Config, Proxy};
use serde_json::{Value, json};

pub use self::{client::Client, replica::Replica};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(10);
pub const TOKEN: &str = "00112233445566778899aabbccddeeff";

/// A directory that goes away with the test.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("rsf-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // A leftover in the temporary directory is no reason to fail.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The proxy's configuration with these fields changed.
pub fn config(changes: Value) -> Config {
    let mut config = json!({"host": "127.0.0.1", "port": 0, "root_path": "", "request_timeout_s": null, "shards": 1,
        "keep_alive_timeout_s": 90.0, "max_head_bytes": 65536, "max_body_bytes": null, "node_id": "n",
        "token": TOKEN, "snapshot_path": null, "session_header": "x-session-id", "prefer_local_node": true,
        "forwarded_allow_ips": "127.0.0.1"});
    let Value::Object(changes) = changes else { panic!("changes are an object") };
    config.as_object_mut().expect("an object").extend(changes);
    Config::parse(config.to_string().as_bytes()).expect("a valid configuration")
}

/// A proxy and its replicas.
pub struct Served {
    pub proxy: Proxy,
    pub address: SocketAddr,
    pub dir: Dir,
    version: AtomicU64,
}

impl Served {
    /// A running proxy that knows nothing yet.
    pub fn empty(changes: Value) -> Self {
        let proxy = Proxy::new(config(changes));
        let address = proxy.start().expect("port 0 is free");
        Self { proxy, address, dir: Dir::new(), version: AtomicU64::new(0) }
    }

    /// A proxy with one application at `/`, and its replicas `r0`, `r1`, ...
    pub fn with(changes: Value, deployment: Value, replicas: usize) -> (Self, Vec<Replica>) {
        let served = Self::empty(changes);
        let max_ongoing = deployment["max_ongoing_requests"].as_u64().unwrap_or(5) as u32;
        let replicas: Vec<_> =
            (0..replicas).map(|i| Replica::start(served.dir.path(), &format!("r{i}"), max_ongoing)).collect();
        served.publish(deployment, &replicas.iter().collect::<Vec<_>>());
        served.linked(&replicas.iter().collect::<Vec<_>>());
        (served, replicas)
    }

    /// One replica and every default.
    pub fn one() -> (Self, Replica) {
        let (served, mut replicas) = Self::with(json!({}), json!({}), 1);
        (served, replicas.remove(0))
    }

    pub fn publish(&self, deployment: Value, replicas: &[&Replica]) -> bool {
        self.publish_routes(
            &json!([{"prefix": "/", "app": "default", "deployment": "default#D"}]),
            deployment,
            replicas,
        )
    }

    pub fn publish_routes(&self, routes: &Value, changes: Value, replicas: &[&Replica]) -> bool {
        self.publish_all(routes, [("D", changes, replicas)])
    }

    /// These deployments of one application and no others.
    pub fn publish_all<'r, const N: usize>(
        &self,
        routes: &Value,
        deployments: [(&str, Value, &'r [&'r Replica]); N],
    ) -> bool {
        let deployments: serde_json::Map<_, _> = deployments
            .into_iter()
            .map(|(name, changes, replicas)| {
                let addresses: Vec<_> = replicas.iter().map(|replica| replica.address()).collect();
                let mut deployment =
                    json!({"app": "default", "name": name, "max_ongoing_requests": 5, "replicas": addresses});
                let Value::Object(changes) = changes else { panic!("changes are an object") };
                deployment.as_object_mut().expect("an object").extend(changes);
                (format!("default#{name}"), deployment)
            })
            .collect();
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        let snapshot = json!({"version": [1, version], "routes": routes, "deployments": deployments});
        self.proxy.publish(snapshot.to_string().as_bytes()).expect("a valid snapshot")
    }

    /// One split that `/` and `/x` lead to, and deployments by name: their changes, and addresses of their replicas. The
    /// proxy serves by it when this returns.
    pub fn publish_split(&self, split: &Value, deployments: &[(&str, Value, Vec<Value>)]) {
        let deployments: serde_json::Map<_, _> = deployments
            .iter()
            .map(|(name, changes, replicas)| {
                let mut deployment = json!({"app": name, "name": "D", "max_ongoing_requests": 5, "replicas": replicas});
                deployment.as_object_mut().expect("an object").extend(changes.as_object().expect("changes").clone());
                (format!("{name}#D"), deployment)
            })
            .collect();
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        let mark = format!("/version-{version}");
        let route = |prefix| json!({"prefix": prefix, "app": "a", "deployment": "", "split": "/x"});
        let routes = ["/", "/x", &mark].map(route);
        let snapshot =
            json!({"version": [1, version], "routes": routes, "splits": {"/x": split}, "deployments": deployments});
        assert!(self.proxy.publish(snapshot.to_string().as_bytes()).expect("a valid snapshot"));
        let mut client = self.client();
        let mut routes = || {
            client.get("/-/routes");
            client.response().text()
        };
        eventually(&format!("{mark} is served"), || routes().contains(&mark), String::new);
    }

    /// What the proxy counts of a target or shadow: by `targets` or `shadows`, and its name.
    pub fn traffic(&self, kind: &str, name: &str) -> Value {
        let mut traffic: Value = serde_json::from_str(&self.proxy.traffic()).expect("JSON");
        traffic["/x"][kind][name].take()
    }

    /// Waits until a counter of a target or shadow, by its JSON pointer, has this value.
    pub fn counts(&self, kind: &str, name: &str, counter: &str, value: u64) {
        let found = || self.traffic(kind, name).pointer(counter).and_then(Value::as_u64);
        eventually(&format!("{counter} of {name} is {value}"), || found() == Some(value), || self.proxy.traffic());
    }

    pub fn linked_ids(&self, ids: &[&str]) {
        let ids: Vec<_> = ids.iter().map(|&id| id.to_owned()).collect();
        assert_eq!(self.proxy.wait_linked(&ids, PATIENCE), [""; 0], "not linked");
    }

    pub fn linked(&self, replicas: &[&Replica]) {
        self.linked_ids(&replicas.iter().map(|replica| &*replica.id).collect::<Vec<_>>());
    }

    pub fn client(&self) -> Client {
        Client::connect(self.address)
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.proxy.counters()[name]
    }

    /// Waits until a counter has this value.
    pub fn settles(&self, name: &str, value: u64) {
        eventually(
            &format!("{name} is {value}"),
            || self.counter(name) == value,
            || format!("{:?}", self.proxy.counters()),
        );
    }
}

/// Waits for a state that no event announces.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool, state: impl Fn() -> String) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "never: {what}; {}", state());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The replica that has a frame, and the other one.
pub fn either(replicas: &[Replica]) -> (&Replica, &Replica) {
    loop {
        for (one, other) in [(0, 1), (1, 0)] {
            if let Some((link, frame)) = replicas[one].try_next() {
                replicas[one].push_back(link, frame);
                return (&replicas[one], &replicas[other]);
            }
        }
    }
}
