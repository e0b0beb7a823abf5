//! A request's body on the way in: what has come, who waits for it, and the sender's window.
//!
//! What is for somebody who waits for the whole body is copied into one bytes object as it comes, or read there at once.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;

use bytes::Bytes;
use pyo3::prelude::*;
use rayserve_dataplane::wire::BODY_WINDOW;

use super::stream::Stream;
use crate::http::gather::Gather;

/// Consumed body bytes are credited to the sender in steps of half the window: it can send the other half meanwhile.
const CREDIT_STEP: u32 = BODY_WINDOW / 2;

/// The request's body.
#[derive(Default)]
pub(crate) struct Inbox {
    pub(crate) chunks: VecDeque<Bytes>,
    pub(crate) fin: bool,
    /// The application has been given some of it.
    pub(crate) begun: bool,
    /// The application has been given the last of it.
    pub(crate) taken: bool,
    unread: u32,
    uncredited: u32,
    /// The futures of those `receive()` that wait, the first one last.
    pub(crate) readers: Vec<Py<PyAny>>,
    /// The futures of those who wait for the whole body, and what has come of it.
    pub(crate) gatherers: Vec<Py<PyAny>>,
    pub(crate) gather: Option<Gather>,
}

impl Inbox {
    /// Takes what has come; the second value is the credit to send.
    pub(crate) fn take(&mut self) -> (VecDeque<Bytes>, u32) {
        self.uncredited += std::mem::take(&mut self.unread);
        (self.begun, self.taken) = (true, self.fin);
        let credit = self.credit();
        (std::mem::take(&mut self.chunks), credit)
    }

    /// Moves what has come into the whole body.
    pub(crate) fn gather_chunks(&mut self, py: Python<'_>) {
        self.uncredited += std::mem::take(&mut self.unread);
        let Some(gather) = &mut self.gather else { return };
        self.chunks.drain(..).for_each(|chunk| gather.push(py, &chunk));
    }

    /// The credit to send for what was consumed.
    pub(crate) fn credit(&mut self) -> u32 {
        if !self.fin && self.uncredited >= CREDIT_STEP { std::mem::take(&mut self.uncredited) } else { 0 }
    }
}

impl Stream {
    /// The inline body of a REQUEST with FIN.
    pub(crate) fn fill(&self, body: Bytes) {
        let mut state = self.state();
        state.inbox.fin = true;
        if !body.is_empty() {
            state.inbox.chunks.push_back(body);
        }
    }

    /// A BODY frame; `false`: the sender has exceeded its window.
    pub(crate) fn body(&self, py: Python<'_>, chunk: Bytes, fin: bool) -> bool {
        let mut state = self.state();
        let inbox = &mut state.inbox;
        inbox.unread += chunk.len() as u32;
        if inbox.fin || inbox.unread + inbox.uncredited > BODY_WINDOW {
            return false;
        }
        inbox.fin = fin;
        if !chunk.is_empty() {
            inbox.chunks.push_back(chunk);
        }
        if !inbox.gatherers.is_empty() {
            inbox.gather_chunks(py);
        }
        true
    }

    /// Has so many bytes of a BODY frame, without its end, read to where they stay; how many came. None: nobody waits for the
    /// whole body, there is no room, or the sender exceeds its window.
    pub(super) fn read_body(
        &self,
        py: Python<'_>,
        len: usize,
        read: impl FnOnce(&mut [MaybeUninit<u8>]) -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        let mut state = self.state();
        let inbox = &mut state.inbox;
        if inbox.gatherers.is_empty() || inbox.uncredited as usize + len > BODY_WINDOW as usize {
            return None;
        }
        let read = inbox.gather.as_mut()?.read(py, len, read)?;
        inbox.uncredited += read.as_ref().map_or(0, |read| *read as u32);
        Some(read)
    }
}

/// Notes that something has come for a stream, once.
pub(super) fn feed(fed: &mut Vec<Arc<Stream>>, stream: Arc<Stream>) {
    if !fed.iter().any(|known| Arc::ptr_eq(known, &stream)) {
        fed.push(stream);
    }
}
