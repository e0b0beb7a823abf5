//! What exists: routes, deployments, limits and replica addresses, as the controller last said.
//!
//! The value is immutable; a newer one replaces it whole. ARCHITECTURE.md, "Snapshot", is the contract. A proxy keeps the
//! last one in a file of its node, so that it serves again after a restart without asking anybody.

mod split;

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::{Deserialize, Serialize};

pub use self::split::{Rule, Shadow, Sign, Split, Target};
use crate::engine::pattern::{Pattern, PatternError};

/// Compared as (epoch, n): a controller raises the epoch when it starts, so a restarted one is never refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Version(pub u64, pub u64);

/// One version of everything a caller needs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Only a greater one replaces it.
    pub version: Version,
    /// Path prefixes of applications.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// By route, or by an endpoint's name.
    #[serde(default)]
    pub splits: BTreeMap<String, Split>,
    /// By `{app}#{deployment}`.
    #[serde(default)]
    pub deployments: BTreeMap<String, Deployment>,
}

/// A path prefix and who answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// `/` or `/segments` without a slash at the end.
    pub prefix: String,
    /// The application's name.
    pub app: String,
    /// A key of [`Snapshot::deployments`]: the application's ingress.
    pub deployment: String,
    /// Whether [`Route::prefix`] is a pattern for whole paths; see [`Pattern`].
    #[serde(default)]
    pub pattern: bool,
    /// The HTTP methods that are let through; none given: all.
    #[serde(default)]
    pub methods: Option<Vec<String>>,
    /// What the table of routes says instead of the application's name.
    #[serde(default)]
    pub label: Option<serde_json::Value>,
    /// A key of [`Snapshot::splits`], whose targets answer then; `deployment` leads nowhere.
    #[serde(default)]
    pub split: Option<String>,
}

/// A deployment as its callers see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// The application's name.
    pub app: String,
    /// The deployment's name.
    pub name: String,
    /// What user code runs at once in one replica.
    pub max_ongoing_requests: u32,
    /// Requests that one caller may hold waiting; negative: any number.
    #[serde(default = "unlimited")]
    pub max_queued_requests: i64,
    /// How a request beyond that is refused.
    #[serde(default)]
    pub backpressure: Backpressure,
    /// Whether a begun idempotent request of which the client has seen nothing is sent once more when its replica dies.
    #[serde(default = "yes")]
    pub retry_idempotent: bool,
    /// How a replica is chosen.
    #[serde(default)]
    pub router: Router,
    /// Why nothing serves and nothing will: the deployment failed.
    #[serde(default)]
    pub unavailable: Option<String>,
    /// How its requests are put together; it is called with lists then.
    #[serde(default)]
    pub batch: Option<Batch>,
    /// Where it runs.
    #[serde(default)]
    pub replicas: Vec<Replica>,
}

/// How requests are put together to batches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// Requests in a full one; at least 1.
    pub max_size: usize,
    /// Seconds that the oldest request of one waits for others while a replica is free.
    #[serde(default)]
    pub wait_s: f64,
    /// Batches that one replica runs at once.
    #[serde(default = "one")]
    pub concurrent: u32,
}

/// How the replica of a request is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Router {
    /// By which rule.
    #[serde(default)]
    pub policy: Policy,
    /// The user's router, as Python wrote it.
    #[serde(default)]
    pub custom: Option<String>,
}

/// The rules that the engine knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The less loaded of two at random.
    PowerOfTwo,
    /// One after the other.
    RoundRobin,
    /// Sessions, and requests without one, by their hash.
    ConsistentHash,
    /// [`Router::custom`] chooses; the engine only counts.
    Custom,
    /// The replica with the fewest requests; also what a later version may call by another name.
    #[default]
    #[serde(other)]
    LeastLoaded,
}

/// The answer to a request that finds the queue full.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Backpressure {
    /// 503 or 429.
    pub status_code: u16,
    /// Seconds in `Retry-After`.
    #[serde(default)]
    pub retry_after_s: Option<f64>,
}

impl Default for Backpressure {
    fn default() -> Self {
        Self { status_code: 503, retry_after_s: None }
    }
}

/// Where one replica listens, and what it tells routers in Python about itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Replica {
    /// Unique for ever.
    pub id: String,
    /// The Ray node that it runs on.
    pub node_id: String,
    /// Socket path, for callers on the same node.
    #[serde(default)]
    pub unix: Option<String>,
    /// `host:port`, for the others.
    #[serde(default)]
    pub tcp: Option<String>,
    /// What it said once, as Python wrote it.
    #[serde(default)]
    pub metadata: Option<String>,
    /// What it said last, as Python wrote it.
    #[serde(default)]
    pub routing_stats: Option<String>,
}

fn unlimited() -> i64 {
    -1
}

fn one() -> u32 {
    1
}

fn yes() -> bool {
    true
}

/// Why a snapshot was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It is not the JSON value of ARCHITECTURE.md.
    #[error("snapshot cannot be read")]
    Json(#[from] serde_json::Error),
    /// A route leads nowhere.
    #[error("route {prefix:?} names deployment {deployment:?}, which the snapshot does not hold")]
    Dangling {
        /// The route's prefix.
        prefix: String,
        /// The missing deployment.
        deployment: String,
    },
    /// A route's pattern has no meaning.
    #[error("route {prefix:?} is no pattern")]
    Pattern {
        /// The route's prefix.
        prefix: String,
        /// Why.
        source: PatternError,
    },
    /// A split that contradicts itself, or that a route names and nobody knows.
    #[error("split {split:?}: {problem}")]
    Split {
        /// Its key.
        split: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl Deployment {
    /// What [`Snapshot::deployments`] holds it by.
    pub fn key(&self) -> String {
        format!("{}#{}", self.app, self.name)
    }
}

impl Snapshot {
    /// Reads and checks what a controller published.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn parse(json: &[u8]) -> Result<Self, SnapshotError> {
        let snapshot: Self = serde_json::from_slice(json)?;
        for Route { prefix, .. } in snapshot.routes.iter().filter(|route| route.pattern) {
            Pattern::parse(prefix).map_err(|source| SnapshotError::Pattern { prefix: prefix.clone(), source })?;
        }
        for Route { prefix, deployment, split, .. } in &snapshot.routes {
            match split {
                Some(split) if !snapshot.splits.contains_key(split) => {
                    let problem = format!("route {prefix:?} names it, but the snapshot does not hold it");
                    return Err(SnapshotError::Split { split: split.clone(), problem });
                }
                None if !snapshot.deployments.contains_key(deployment) => {
                    return Err(SnapshotError::Dangling { prefix: prefix.clone(), deployment: deployment.clone() });
                }
                _ => {}
            }
        }
        for (name, split) in &snapshot.splits {
            split.check().map_err(|problem| SnapshotError::Split { split: name.clone(), problem })?;
        }
        Ok(snapshot)
    }

    /// Whether it takes the place of `old`.
    pub fn replaces(&self, old: Option<&Self>) -> bool {
        old.is_none_or(|old| self.version > old.version)
    }
}

/// Writes `json` so that a reader sees the old file or the new one, never half of one.
///
/// # Errors
/// The file cannot be written or renamed.
pub fn save(path: &Path, json: &[u8]) -> io::Result<()> {
    let aside = path.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&aside, json)?;
    fs::rename(&aside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"version": [1, 42],
        "routes": [{"prefix": "/", "app": "default", "deployment": "default#Ingress"},
                   {"prefix": "/{n:int}", "app": "default", "deployment": "default#Ingress", "pattern": true,
                    "methods": ["GET"], "label": ["endpoint", ["GET"]]}],
        "deployments": {"default#Ingress": {
            "app": "default", "name": "Ingress", "max_ongoing_requests": 5, "max_queued_requests": -1,
            "backpressure": {"status_code": 429, "retry_after_s": 1.5}, "retry_idempotent": true, "unavailable": null,
            "batch": {"max_size": 32, "wait_s": 0.005},
            "replicas": [{"id": "a1b2c3d4", "node_id": "n", "unix": "/tmp/r.sock", "tcp": "10.0.0.1:41234",
                          "metadata": "gAR9lC4=", "routing_stats": "gAR9lC4="}]}},
        "of_a_later_version": 1}"#;

    #[test]
    fn the_documented_value_reads_and_writes_back() {
        let snapshot = Snapshot::parse(JSON.as_bytes()).expect("valid");
        assert_eq!(snapshot.version, Version(1, 42));
        let deployment = &snapshot.deployments["default#Ingress"];
        assert_eq!(deployment.backpressure, Backpressure { status_code: 429, retry_after_s: Some(1.5) });
        assert_eq!(deployment.batch, Some(Batch { max_size: 32, wait_s: 0.005, concurrent: 1 }));
        let replica = &deployment.replicas[0];
        assert_eq!(replica.tcp.as_deref(), Some("10.0.0.1:41234"));
        assert_eq!(
            (replica.metadata.as_deref(), replica.routing_stats.as_deref()),
            (Some("gAR9lC4="), Some("gAR9lC4="))
        );
        let again = serde_json::to_vec(&snapshot).expect("plain data");
        assert_eq!(Snapshot::parse(&again).expect("valid"), snapshot);
    }

    #[test]
    fn a_route_to_nowhere_is_refused() {
        let refused = Snapshot::parse(JSON.replace("\"default#Ingress\": {", "\"other\": {").as_bytes());
        assert!(matches!(refused, Err(SnapshotError::Dangling { .. })));
    }

    #[test]
    fn a_pattern_without_a_meaning_is_refused() {
        let refused = Snapshot::parse(JSON.replace("{n:int}", "{n:date}").as_bytes());
        assert!(matches!(refused, Err(SnapshotError::Pattern { .. })));
    }

    #[test]
    fn only_a_greater_version_replaces_another() {
        let version = |epoch, n| Snapshot { version: Version(epoch, n), ..Snapshot::default() };
        let current = version(1, 5);
        assert!(current.replaces(None));
        assert!(!version(1, 5).replaces(Some(&current)));
        assert!(!version(1, 4).replaces(Some(&current)));
        assert!(version(2, 0).replaces(Some(&current)), "a restarted controller is not refused");
    }

    #[test]
    fn what_was_saved_is_whole() {
        let dir = std::env::temp_dir().join(format!("rsf-snapshot-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("temporary directory");
        let path = dir.join("snapshot.json");
        save(&path, b"{}").expect("writable");
        save(&path, JSON.as_bytes()).expect("replaceable");
        assert_eq!(fs::read(&path).expect("there"), JSON.as_bytes());
        assert_eq!(fs::read_dir(&dir).expect("there").count(), 1, "nothing is left aside");
        fs::remove_dir_all(&dir).expect("ours");
    }
}
