//! `Callee`: what a handle calls, and how; the part of its calls that is the same each time.
//!
//! A call is given the arguments, as they are or packed, and the context in which it is made: from that come the id of the
//! request that it belongs to, the route, the application, the deadline, and the request that cancels it.

use std::{borrow::Cow, sync::Arc};

use pyo3::{
    buffer::PyBuffer,
    exceptions::PyRuntimeError,
    intern,
    prelude::*,
    types::{PyBytes, PyDict, PyTuple},
};
use rayserve_dataplane::{
    engine::Affinity,
    wire::{
        LARGE, Payload,
        call::{CallHead, put_call_head},
    },
};

use super::{Call, pending::Pending, turns::Caller};
use crate::{http::request as http, lock::lock, value, worker::stream::Stream};

/// Room for the head of most calls and a few plain values.
const SMALL: usize = 256;

/// See the module.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Callee {
    caller: Arc<Caller>,
    pub(super) deployment: Arc<str>,
    method: String,
    /// Model and session.
    wishes: [String; 2],
    pub(super) affinity: Affinity,
    pub(super) stream: bool,
    pub(super) target: Option<String>,
}

#[pymethods]
impl Callee {
    /// Calls it with plain values; None: the arguments are of other kinds, and have to be packed.
    fn call(
        &self,
        args: &Bound<'_, PyTuple>,
        kwargs: &Bound<'_, PyDict>,
        context: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Call>> {
        let origin = Origin::of(context)?;
        let (mut out, request_id) = self.open(&origin, 0);
        if !value::put_plain_arguments(&mut out, args, kwargs) {
            return Ok(None);
        }
        self.send(context.py(), out, request_id, origin.parent, Vec::new(), None).map(Some)
    }

    /// Calls it with packed arguments; None: the value of one of `needs` has been taken, and must be packed too.
    #[expect(clippy::needless_pass_by_value, reason = "what a Python argument becomes is owned")]
    fn begin(
        &self,
        pickle: &Bound<'_, PyBytes>,
        buffers: Vec<PyBuffer<u8>>,
        context: &Bound<'_, PyAny>,
        needs: Vec<(u32, Bound<'_, Call>)>,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Option<Call>> {
        let py = context.py();
        let origin = Origin::of(context)?;
        let (mut out, request_id) = self.open(&origin, pickle.as_bytes().len());
        value::put(py, &mut out, pickle, &buffers);
        if needs.iter().any(|(_, call)| !Arc::ptr_eq(&call.get().caller, &self.caller) && !call.get().ready()) {
            return Err(PyRuntimeError::new_err(
                "an argument is the answer of a Serve instance that has been shut down",
            ));
        }
        if needs.iter().any(|(_, call)| call.get().told.get(py).is_some()) {
            return Ok(None);
        }
        let needs = needs.iter().map(|(slot, call)| (*slot, Arc::clone(&call.get().pending))).collect();
        self.send(py, out, request_id, origin.parent, needs, keep).map(Some)
    }
}

impl Callee {
    pub(super) fn new(
        caller: &Arc<Caller>,
        deployment: &str,
        method: String,
        wishes: [String; 2],
        near: bool,
        stream: bool,
        target: Option<String>,
    ) -> Self {
        let affinity = Affinity::new(wishes[0].as_bytes(), wishes[1].as_bytes()).or_near(near);
        Self { caller: Arc::clone(caller), deployment: deployment.into(), method, wishes, affinity, stream, target }
    }

    /// A payload that begins with the call's head, and the id of the request.
    fn open(&self, origin: &Origin<'_>, pickle: usize) -> (Payload, String) {
        let request_id = match &*origin.request_id {
            "" => lock(&self.caller.ids).make(),
            known => known.to_owned(),
        };
        let [multiplexed_model_id, session_id] = &self.wishes;
        let head = CallHead {
            method: &self.method,
            request_id: &request_id,
            route: &origin.route,
            app: &origin.app,
            multiplexed_model_id,
            session_id,
        };
        let mut out = Payload::with_capacity(SMALL + pickle.min(LARGE));
        put_call_head(out.open(), &head);
        (out, request_id)
    }

    fn send(
        &self,
        py: Python<'_>,
        payload: Payload,
        request_id: String,
        parent: Option<&Arc<Stream>>,
        needs: Vec<(u32, Arc<Pending>)>,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Call> {
        let deadline = parent.and_then(|parent| parent.state().children.deadline);
        let call = Pending::new(self, payload, deadline, needs, keep);
        if let Some(parent) = parent {
            parent.state().children.add(&self.caller, &call);
        }
        let home = self.caller.home();
        if !self.caller.begin(&call, home.is_some()) {
            return Err(PyRuntimeError::new_err("handles are closed: the interpreter exits"));
        }
        if let Some(replica) = home
            && !replica.called(py)?
        {
            self.caller.flush();
        }
        Ok(Call::new(&self.caller, call, request_id, true))
    }
}

/// Where a call is made.
struct Origin<'a> {
    /// Empty: of no request.
    request_id: Cow<'a, str>,
    route: Cow<'a, str>,
    app: Cow<'a, str>,
    /// The request on whose behalf, if it is one of this process's own.
    parent: Option<&'a Arc<Stream>>,
}

impl<'a> Origin<'a> {
    /// What the request context says, or None outside a request.
    fn of(context: &'a Bound<'_, PyAny>) -> PyResult<Self> {
        let py = context.py();
        if let Ok(head) = context.cast::<http::CallHead>() {
            let http::CallHead { view, stream, replica, .. } = head.get();
            let CallHead { request_id, route, .. } = view.head();
            let app = replica.app.bind(py).to_str()?;
            return Ok(Self {
                request_id: request_id.into(),
                route: route.into(),
                app: app.into(),
                parent: Some(stream),
            });
        }
        if let Ok(head) = context.cast::<http::RequestHead>() {
            let http::RequestHead { view, stream, replica } = head.get();
            let (request_id, route) =
                (String::from_utf8_lossy(view.request_id()), String::from_utf8_lossy(view.route()));
            let app = replica.app.bind(py).to_str()?;
            return Ok(Self { request_id, route, app: app.into(), parent: Some(stream) });
        }
        if context.is_none() {
            return Ok(Self { request_id: "".into(), route: "".into(), app: "".into(), parent: None });
        }
        let text = |name| context.getattr(name)?.extract::<String>().map(Cow::Owned);
        Ok(Self {
            request_id: text(intern!(py, "request_id"))?,
            route: text(intern!(py, "route"))?,
            app: text(intern!(py, "app_name"))?,
            parent: None,
        })
    }
}
