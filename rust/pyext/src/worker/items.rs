//! The items of a streaming call on their way out: one ITEM frame each, within the window.
//!
//! An item goes out while the window is open and may overdraw it, so that one larger than the window travels too; then the
//! generator is suspended until the caller has taken enough. On the loop that is an awaitable, in a pool thread a wait
//! without the GIL. Small items share a system call: the loop flushes when it has gone round, a thread every [`STALE`].

use std::sync::Arc;
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use pyo3::buffer::PyBuffer;
use pyo3::import_exception;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rayserve_dataplane::wire::{Header, Kind, WINDOW};

use super::answer::packed;
use super::flush::STALE;
use super::replica::Replica;
use super::stream::Stream;
use crate::http::asgi;

import_exception!(asyncio, CancelledError);

/// How long a thread sleeps before it looks whether the pool has been stopped.
const SLICE: Duration = Duration::from_millis(100);

/// How far the items of a stream are.
pub(crate) struct Items {
    /// Bytes that may be sent; below zero: overdrawn.
    window: i64,
    writer: Option<Writer>,
    /// When its thread has last flushed.
    sent: Option<Instant>,
}

/// Who waits for the window to open.
enum Writer {
    Future(Py<PyAny>),
    Thread(Thread),
}

impl Default for Items {
    fn default() -> Self {
        Self { window: WINDOW.into(), writer: None, sent: None }
    }
}

impl Replica {
    /// Sends an item. What comes back is to be awaited before the next; a pool thread has waited already.
    pub(crate) fn put_item<'py>(
        self: &Arc<Self>,
        py: Python<'py>,
        stream: &Arc<Stream>,
        pickle: &Bound<'_, PyBytes>,
        buffers: &[PyBuffer<u8>],
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        if stream.state().cancelled {
            return Err(CancelledError::new_err(()));
        }
        let payload = packed(pickle, buffers);
        let len = payload.len();
        stream.put_value(Header::new(Kind::Item, stream.id), &payload);
        let open = {
            let mut state = stream.state();
            state.items.window -= i64::try_from(len).unwrap_or(i64::MAX);
            state.items.window > 0
        };
        if !self.on_loop() {
            self.share(py, stream)?;
            return if open { Ok(None) } else { self.wait_for_window(py, stream) };
        }
        self.settle(py)?;
        if open {
            return if asgi::is_breathless(self, stream, len) { asgi::pause(py).map(Some) } else { Ok(None) };
        }
        let future = self.hooks.create_future.bind(py).call0()?;
        stream.state().items.writer = Some(Writer::Future(future.clone().unbind()));
        Ok(Some(future))
    }

    /// Sees to it that what a pool thread has put is sent soon, though it goes on with its generator.
    fn share(&self, py: Python<'_>, stream: &Stream) -> PyResult<()> {
        let now = Instant::now();
        let early = {
            // Not while the link is flushed, which gives this stream its turn.
            let sent = &mut stream.state().items.sent;
            let early = sent.is_some_and(|sent| now - sent < STALE);
            if !early {
                *sent = Some(now);
            }
            early
        };
        if early {
            self.nudge();
            return Ok(());
        }
        self.flush(py)
    }

    fn wait_for_window<'py>(&self, py: Python<'py>, stream: &Stream) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.flush(py)?;
        loop {
            let mut state = stream.state();
            if state.cancelled || self.pool.is_stopped() {
                return Err(CancelledError::new_err(()));
            }
            if state.items.window > 0 {
                return Ok(None);
            }
            state.items.writer = Some(Writer::Thread(thread::current()));
            drop(state);
            py.detach(|| thread::park_timeout(SLICE));
        }
    }
}

/// The caller has taken so many bytes.
pub(crate) fn widen(py: Python<'_>, stream: &Stream, bytes: u32) -> PyResult<()> {
    let mut state = stream.state();
    let items = &mut state.items;
    items.window = (items.window + i64::from(bytes)).min(WINDOW.into());
    let writer = if items.window > 0 { items.writer.take() } else { None };
    drop(state);
    match writer {
        Some(Writer::Future(future)) => asgi::resolve(py, vec![future]),
        Some(Writer::Thread(thread)) => {
            thread.unpark();
            Ok(())
        }
        None => Ok(()),
    }
}

impl Items {
    /// The caller is gone: a thread that waits looks at once. A coroutine is cancelled anyway.
    pub(crate) fn wake_thread(&self) {
        if let Some(Writer::Thread(thread)) = &self.writer {
            thread.unpark();
        }
    }
}
