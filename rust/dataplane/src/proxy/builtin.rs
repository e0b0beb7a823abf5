//! The proxy's own pages: `/-/routes` and `/-/healthz`, with the bodies that Ray Serve's users poll for, and `/-/metrics`.

use std::{rc::Rc, sync::atomic::Ordering::Relaxed};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header::CONTENT_TYPE};

use super::{metrics_page, shard::Shard};

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const METRICS: HeaderValue = HeaderValue::from_static(metrics_page::CONTENT_TYPE);
const NO_ROUTES: &str = "Route table is not populated yet.";

/// The page of a raw path, whatever the method; `None` if the path is an application's.
pub(super) fn page(shard: &Rc<Shard>, path: &str) -> Option<Response<Bytes>> {
    let rest = path.strip_prefix("/-/")?;
    let listing = shard.listing.borrow().clone();
    let (status, kind, body) = match (rest, listing) {
        ("metrics", _) => (StatusCode::OK, METRICS, metrics_page::text(&shard.shared).into()),
        ("routes" | "healthz", None) => {
            (StatusCode::SERVICE_UNAVAILABLE, TEXT, Bytes::from_static(NO_ROUTES.as_bytes()))
        }
        ("routes", Some(listing)) => (StatusCode::OK, JSON, listing),
        ("healthz", Some(_)) if shard.shared.draining.load(Relaxed) => {
            (StatusCode::SERVICE_UNAVAILABLE, TEXT, Bytes::from_static(b"This node is being drained."))
        }
        ("healthz", Some(_)) => (StatusCode::OK, TEXT, Bytes::from_static(b"success")),
        _ => return None,
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Some(response)
}
