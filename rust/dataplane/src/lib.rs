//! The data plane of rayserve-fast: engine, wire format and HTTP proxy.
//!
//! It knows nothing of Python; `rust/pyext` drives it from there. ARCHITECTURE.md lists the request path file by file.

pub mod engine;
pub mod error;
pub mod histogram;
pub mod metrics;
pub mod proxy;
pub mod request_id;
mod roster;
pub mod snapshot;
pub mod tally;
pub mod tcp;
pub mod traffic;
pub mod vigil;
pub mod wire;
