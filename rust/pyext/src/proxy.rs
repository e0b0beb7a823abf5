//! Class `Proxy`: the HTTP proxy as the proxy actor holds it.
//!
//! Every call that can wait detaches from the interpreter, and the proxy's own threads never attach to it, so that the
//! proxy serves while Python is busy and the interpreter can end at any time. What those threads have to tell they write
//! to the process's error output themselves: a file among Ray's logs, which Ray shows to the driver too.

use std::{collections::BTreeMap, os::fd::RawFd, time::Duration};

use pyo3::{exceptions::PyValueError, prelude::*};
use rayserve_dataplane::{
    proxy::{Config, Proxy as Inner},
    snapshot::{Snapshot, SnapshotError},
};

use crate::client::{Told, told, word};

/// Number, deployment, route, request id, model id and session id of a request that waits for its router.
type Asked = (u64, String, String, String, String, String);

/// See `_core.pyi`.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Proxy(Inner);

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value.max(0.0)).unwrap_or(Duration::MAX)
}

/// What a snapshot that cannot be read becomes.
pub(crate) fn refused(error: &SnapshotError) -> PyErr {
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    PyValueError::new_err(format!("{error}{cause}"))
}

/// Whether proxies and handles can read this snapshot; see `_core.pyi`.
#[pyfunction]
pub(crate) fn check_snapshot(py: Python<'_>, snapshot: &[u8]) -> PyResult<()> {
    py.detach(|| Snapshot::parse(snapshot)).map(drop).map_err(|error| refused(&error))
}

#[pymethods]
impl Proxy {
    #[new]
    fn new(config: &[u8]) -> PyResult<Self> {
        let config = Config::parse(config).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self(Inner::new(config)))
    }

    fn start(&self, py: Python<'_>) -> PyResult<(String, u16)> {
        let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).finish();
        let address = py.detach(|| tracing::subscriber::with_default(log, || self.0.start()))?;
        Ok((address.ip().to_string(), address.port()))
    }

    fn publish(&self, py: Python<'_>, snapshot: &[u8]) -> PyResult<bool> {
        py.detach(|| self.0.publish(snapshot)).map_err(|error| refused(&error))
    }

    #[expect(clippy::needless_pass_by_value, reason = "what Python passes is converted into a vector")]
    fn wait_linked(&self, py: Python<'_>, replica_ids: Vec<String>, timeout_s: f64) -> Vec<String> {
        py.detach(|| self.0.wait_linked(&replica_ids, seconds(timeout_s)))
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        self.0.counters()
    }

    fn traffic(&self) -> String {
        self.0.traffic()
    }

    fn metrics_text(&self) -> String {
        self.0.metrics_text()
    }

    /// What is counted of batches, as JSON.
    fn batches(&self) -> String {
        self.0.batches()
    }

    fn choices_fileno(&self) -> RawFd {
        self.0.choices_fd()
    }

    fn choices(&self) -> (Vec<Asked>, Vec<u64>) {
        let (fresh, ended) = self.0.choices();
        let told = fresh
            .into_iter()
            .map(|it| (it.number, it.deployment, it.route, it.request_id, it.multiplexed_model_id, it.session_id));
        (told.collect(), ended)
    }

    fn candidates(&self, py: Python<'_>, number: u64) -> Option<(Vec<Told>, Option<String>)> {
        let (candidates, custom) = py.detach(|| self.0.candidates(number))?;
        Some((candidates.into_iter().map(told).collect(), custom))
    }

    fn assign(&self, py: Python<'_>, number: u64, ranks: Vec<Vec<String>>) -> Option<String> {
        word(py.detach(|| self.0.assign(number, ranks)))
    }

    fn drain(&self) {
        self.0.drain();
    }

    fn shutdown(&self, py: Python<'_>, timeout_s: f64) {
        py.detach(|| self.0.shutdown(seconds(timeout_s)));
    }
}
