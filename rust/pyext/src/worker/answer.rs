//! What the user's code returned or raised, as the frames that answer a request.
//!
//! When to answer, and that it is done once, is `run.rs`'s to see to.

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rayserve_dataplane::wire::{Fault, Header, Kind, LARGE, Payload, flag};

use super::replica::{Replica, count};
use super::run::Running;
use super::stream::Answer;
use crate::http::request::CallHead;
use crate::http::response;
use crate::value;

impl Replica {
    /// Answers with a result; a response that must be run comes back.
    pub(super) fn answer<'py>(
        &self,
        running: &Running,
        result: Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match running {
            Running::Http(head) => response::put_result(self, &head.get().stream, result),
            Running::Call(head) => {
                let CallHead { stream, streaming, .. } = head.get();
                let payload = if *streaming { Payload::default() } else { self.value(&result)? };
                stream.put_value(Header::new(Kind::Result, stream.id).with(flag::FIN), &payload);
                stream.close();
                Ok(None)
            }
        }
    }

    fn value(&self, result: &Bound<'_, PyAny>) -> PyResult<Payload> {
        let mut payload = Payload::with_capacity(64);
        if value::put_plain(&mut payload, result) {
            payload.close();
            return Ok(payload);
        }
        let encoded = self.hooks.dump_result.bind(result.py()).call1((result,))?;
        let (pickle, buffers): (Bound<'_, PyBytes>, Vec<PyBuffer<u8>>) = encoded.extract()?;
        Ok(packed(&pickle, &buffers))
    }

    /// Answers with an error of the user's code, which Python logs.
    pub(super) fn fail(&self, py: Python<'_>, running: &Running, error: PyErr) -> PyResult<()> {
        let (stream, object) = (running.stream(), running.object(py));
        match running {
            Running::Call(_) => {
                let dumped = self.hooks.dump_error.bind(py).call1((object, error.into_value(py)))?;
                let (fault, payload): (u32, Bound<'_, PyBytes>) = dumped.extract()?;
                self.end_with(stream, Fault::from_aux(fault), payload.as_bytes());
            }
            Running::Http(_) => {
                count(&self.counters.errors);
                let encoded = self.hooks.failed.bind(py).call1((object, error.into_value(py)))?;
                let answer = {
                    let mut state = stream.state();
                    if state.answer == Answer::Headed && state.outbox.head.is_some() && !state.outbox.has_body() {
                        state.outbox.clear();
                        state.answer = Answer::Nothing;
                    }
                    state.answer
                };
                match answer {
                    Answer::Nothing => response::put_encoded(stream, encoded.cast()?)?,
                    // What the application has sent before it failed is sent.
                    Answer::Headed => self.flush(py).map(|()| self.end_with(stream, Fault::Aborted, b""))?,
                    Answer::Complete => {}
                }
            }
        }
        Ok(())
    }
}

/// A payload that is one value.
pub(super) fn packed(pickle: &Bound<'_, PyBytes>, buffers: &[PyBuffer<u8>]) -> Payload {
    let mut payload = Payload::with_capacity(32 + pickle.as_bytes().len().min(LARGE));
    value::put(pickle.py(), &mut payload, pickle, buffers);
    payload.close();
    payload
}
