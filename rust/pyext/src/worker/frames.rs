//! What each frame of a trusted link does: begins a request, feeds or cancels one, or moves credit.
//!
//! A frame that no caller of this protocol sends ends its link. Reading and decoding are `poll.rs`'s.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pyo3::prelude::*;
use rayserve_dataplane::wire::hello::HelloError;
use rayserve_dataplane::wire::{CallView, Frame, Header, Kind, RequestHeadView, WireError, batch::batch, flag};

use super::inbox::feed;
use super::items;
use super::link::Link;
use super::replica::{Replica, Request, Work};
use super::stream::Stream;
use crate::http::receive;

/// One frame of a trusted link; `fed`: streams whose readers are told once, of all pieces that have come together.
pub(super) fn handle(
    py: Python<'_>,
    replica: &Arc<Replica>,
    link: &Arc<Link>,
    frame: Frame,
    fed: &mut Vec<Arc<Stream>>,
) -> Result<(), Broken> {
    let Frame { header, payload } = frame;
    match header.kind {
        Kind::Request | Kind::Call => {
            let unary = header.kind == Kind::Call && !header.has(flag::STREAM);
            let stream = Arc::new(Stream::new(link.clone(), header.stream, unary));
            if header.aux > 0 {
                let left = Duration::from_millis(header.aux.into());
                stream.state().children.deadline = Instant::now().checked_add(left);
            }
            if !link.insert(&stream) {
                return Err(Broken::Peer);
            }
            let work = if header.kind == Kind::Call {
                Work::Call(CallView::parse(payload)?, header.has(flag::STREAM))
            } else {
                let whole = header.has(flag::FIN);
                // The head of a long upload would keep its buffer from being read into again, for as long as it lasts.
                let view = RequestHeadView::parse(if whole { payload } else { Bytes::copy_from_slice(&payload) })?;
                if whole {
                    stream.fill(view.body());
                }
                Work::Http(view)
            };
            if !header.has(flag::BATCHED) {
                replica.take_in(Request { stream, work }, header.has(flag::GRANTED));
                replica.run_ready(py)?;
            } else if !link.parked.push(stream, work) {
                return Err(Broken::Peer);
            }
        }
        Kind::Batch => {
            let mut requests = Vec::new();
            for id in batch(&payload)? {
                match link.parked.take(id) {
                    Some(request) => requests.push(request),
                    None if link.stream(id).is_none() => {} // it was cancelled
                    None => return Err(Broken::Peer),
                }
            }
            replica.take_in_batch(py, link, requests, header.has(flag::GRANTED))?;
            replica.run_ready(py)?;
        }
        Kind::Body => {
            // Without a stream: the answer and the rest of the body have crossed.
            if let Some(stream) = link.stream(header.stream) {
                if !stream.body(py, payload, header.has(flag::FIN)) {
                    return Err(Broken::Peer);
                }
                feed(fed, stream);
            }
        }
        Kind::Cancel => {
            if let Some(stream) = link.stream(header.stream) {
                replica.cancel(py, &stream)?;
                replica.run_ready(py)?;
            }
        }
        Kind::Window => {
            if let Some(stream) = link.stream(header.stream) {
                if header.has(flag::LEFT) {
                    stream.state().left = true;
                    receive::wake_readers(py, &stream)?;
                }
                items::widen(py, &stream, header.aux)?;
                if stream.widen(header.aux) {
                    link.enqueue(&stream);
                }
            }
        }
        Kind::Unused => {
            replica.with_limit(|limit| limit.unused(link.token.0, header.aux));
            replica.give_slots();
            replica.run_ready(py)?;
        }
        Kind::Ping => link.put(Header::new(Kind::Pong, 0).aux(header.aux), &[]),
        Kind::Pong => {}
        _ => return Err(Broken::Peer),
    }
    Ok(())
}

/// The link cannot be used any further.
pub(super) enum Broken {
    Peer,
    Python(PyErr),
}

impl From<WireError> for Broken {
    fn from(_: WireError) -> Self {
        Self::Peer
    }
}

impl From<HelloError> for Broken {
    fn from(_: HelloError) -> Self {
        Self::Peer
    }
}

impl From<PyErr> for Broken {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}
