//! A request as the user's code sees it, read from the wire's bytes when it is asked for.
//!
//! Both heads are also the request context of what they run, so they have the attributes of `context._RequestContext`;
//! `RequestHead` has the ASGI callables `receive` and `send` of its stream besides.

use std::sync::Arc;

use bytes::Bytes;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple, PyType};
use rayserve_dataplane::engine::pattern::Pattern;
use rayserve_dataplane::wire::head::{MODEL_HEADER, is_named};
use rayserve_dataplane::wire::params::{Kind, Param};
use rayserve_dataplane::wire::{CallView, RequestHeadView};

use super::{asgi, receive};
use crate::convert::{pair, text, unquoted};
use crate::value;
use crate::worker::replica::Replica;
use crate::worker::stream::Stream;

#[pyclass(frozen, freelist = 128, module = "rayserve_fast._core")]
pub(crate) struct RequestHead {
    pub(crate) view: RequestHeadView,
    pub(crate) stream: Arc<Stream>,
    pub(crate) replica: Arc<Replica>,
}

#[pymethods]
impl RequestHead {
    #[getter]
    pub(super) fn method<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        match self.view.method() {
            b"GET" => intern!(py, "GET").clone(),
            b"POST" => intern!(py, "POST").clone(),
            other => text(py, other),
        }
    }

    #[getter]
    pub(super) fn path<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        unquoted(py, self.view.path())
    }

    #[getter]
    pub(super) fn raw_path<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.view.path())
    }

    #[getter]
    pub(super) fn query_string<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.view.query())
    }

    #[getter]
    pub(super) fn root_path<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        text(py, self.view.root_path())
    }

    #[getter]
    fn route<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        text(py, self.view.route())
    }

    #[getter]
    fn request_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        text(py, self.view.request_id())
    }

    #[getter]
    pub(super) fn http_version<'py>(&self, py: Python<'py>) -> &Bound<'py, PyString> {
        version(py, &self.view)
    }

    #[getter]
    pub(super) fn scheme<'py>(&self, py: Python<'py>) -> &Bound<'py, PyString> {
        scheme(py, &self.view)
    }

    /// The head as it travels, for a request that is sent on; `head_parts` reads it.
    #[getter]
    fn encoded<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.view.encoded())
    }

    #[getter]
    pub(super) fn client<'py>(&self, py: Python<'py>) -> Option<(Bound<'py, PyString>, u16)> {
        address(py, self.view.client())
    }

    #[getter]
    pub(super) fn server<'py>(&self, py: Python<'py>) -> Option<(Bound<'py, PyString>, u16)> {
        address(py, self.view.server())
    }

    #[getter]
    pub(super) fn headers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let pairs: Vec<_> = self.view.headers().map(|(name, value)| pair(py, name, value)).collect();
        PyList::new(py, pairs)
    }

    /// The first header of that lower-case name.
    fn header<'py>(&self, py: Python<'py>, name: &[u8]) -> Option<Bound<'py, PyBytes>> {
        self.view.headers().find(|(key, _)| *key == name).map(|(_, value)| PyBytes::new(py, value))
    }

    /// What the route's pattern found in the path, converted as it says; mostly nothing.
    #[getter]
    pub(super) fn path_params<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        params(py, &self.view)
    }

    fn scope<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        asgi::scope(slf)
    }

    fn receive<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        receive::receive(py, self)
    }

    /// The whole body, to be awaited; None if the client goes away before.
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        receive::read(py, self)
    }

    fn send<'py>(&self, message: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyAny>> {
        asgi::send(self, message)
    }

    #[getter]
    fn body<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        receive::whole_body(py, &self.stream)
    }

    #[getter]
    fn disconnected(&self) -> bool {
        let state = self.stream.state();
        state.cancelled || state.left
    }

    #[getter]
    fn app_name<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.replica.app.bind(py).clone()
    }

    #[getter]
    fn _internal_request_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.request_id(py)
    }

    #[getter]
    fn multiplexed_model_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.named(py, MODEL_HEADER)
    }

    #[getter]
    fn session_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.named(py, self.replica.session_header.as_bytes())
    }

    #[classattr]
    fn grpc_context() -> Option<u8> {
        None
    }

    #[classattr]
    fn is_http_request() -> bool {
        true
    }

    #[classattr]
    fn cancel_on_parent_request_cancel() -> bool {
        false
    }

    #[getter]
    fn _client(&self) -> String {
        let (host, port) = self.view.client();
        format!("{}:{port}", String::from_utf8_lossy(host))
    }

    #[classattr]
    fn _ray_trace_ctx() -> Option<u8> {
        None
    }
}

impl RequestHead {
    /// The model id as it came; empty if there is none.
    pub(crate) fn model(&self) -> &[u8] {
        self.value_of(MODEL_HEADER)
    }

    /// The last header of that name, or nothing: the proxy has chosen the replica by the same one.
    fn named<'py>(&self, py: Python<'py>, key: &[u8]) -> Bound<'py, PyString> {
        text(py, self.value_of(key))
    }

    fn value_of(&self, key: &[u8]) -> &[u8] {
        let value = self.view.headers().filter(|(name, _)| is_named(name, key)).last();
        value.map_or(b"", |(_, value)| value)
    }
}

/// `CallHead`: a handle call as Python sees it, and the request context of what it runs.
#[pyclass(frozen, freelist = 128, module = "rayserve_fast._core")]
pub(crate) struct CallHead {
    pub(crate) view: CallView,
    pub(crate) stream: Arc<Stream>,
    /// The caller wants items.
    pub(crate) streaming: bool,
    pub(crate) replica: Arc<Replica>,
}

#[pymethods]
impl CallHead {
    #[getter]
    fn method(&self) -> &str {
        self.view.head().method
    }

    #[getter]
    fn streaming(&self) -> bool {
        self.streaming
    }

    /// Sends an item of a streaming call; what comes back is to be awaited before the next.
    #[expect(clippy::needless_pass_by_value, reason = "what a Python argument becomes is owned")]
    fn put_item<'py>(
        &self,
        py: Python<'py>,
        pickle: &Bound<'_, PyBytes>,
        buffers: Vec<PyBuffer<u8>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.replica.put_item(py, &self.stream, pickle, &buffers)
    }

    /// The pickle, its out-of-band buffers, and those arguments that other calls have answered: place, pickle and buffers.
    /// The buffers are the receiver's own, and can be had once.
    fn arguments<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let taken = || PyRuntimeError::new_err("the arguments have been taken");
        value::of_call(py, self.view.take_arguments().ok_or_else(taken)?)
    }

    #[getter]
    fn route(&self) -> &str {
        self.view.head().route
    }

    #[getter]
    fn request_id(&self) -> &str {
        self.view.head().request_id
    }

    #[getter]
    fn _internal_request_id(&self) -> &str {
        self.view.head().request_id
    }

    #[getter]
    fn app_name<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.replica.app.bind(py).clone()
    }

    #[getter]
    fn multiplexed_model_id(&self) -> &str {
        self.view.head().multiplexed_model_id
    }

    #[getter]
    fn session_id(&self) -> &str {
        self.view.head().session_id
    }

    #[classattr]
    fn grpc_context() -> Option<u8> {
        None
    }

    #[classattr]
    fn is_http_request() -> bool {
        false
    }

    #[classattr]
    fn cancel_on_parent_request_cancel() -> bool {
        false
    }

    #[classattr]
    fn _client() -> &'static str {
        ""
    }

    #[classattr]
    fn _ray_trace_ctx() -> Option<u8> {
        None
    }
}

/// What a request that was sent on is made of, in the order of `replica.portable.PARTS`.
#[pyfunction]
pub(crate) fn head_parts<'py>(py: Python<'py>, encoded: &[u8]) -> PyResult<Bound<'py, PyTuple>> {
    let view = RequestHeadView::parse(Bytes::copy_from_slice(encoded))
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    let headers: Vec<_> = view.headers().map(|(name, value)| pair(py, name, value)).collect();
    (
        text(py, view.method()),
        unquoted(py, view.path()),
        PyBytes::new(py, view.path()),
        PyBytes::new(py, view.query()),
        text(py, view.root_path()),
        PyList::new(py, headers)?,
        address(py, view.client()),
        address(py, view.server()),
        scheme(py, &view),
        version(py, &view),
        params(py, &view)?,
    )
        .into_pyobject(py)
}

/// What the route's pattern has found in the path.
fn params<'py>(py: Python<'py>, view: &RequestHeadView) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    for param in view.params() {
        found.set_item(text(py, param.name), converted(py, param)?)?;
    }
    Ok(found)
}

fn version<'py>(py: Python<'py>, view: &RequestHeadView) -> &'py Bound<'py, PyString> {
    match view.http_version {
        10 => intern!(py, "1.0"),
        20 => intern!(py, "2"),
        _ => intern!(py, "1.1"),
    }
}

fn scheme<'py>(py: Python<'py>, view: &RequestHeadView) -> &'py Bound<'py, PyString> {
    if view.https { intern!(py, "https") } else { intern!(py, "http") }
}

/// See `_core.pyi`.
#[pyfunction]
pub(crate) fn check_pattern(pattern: &str) -> PyResult<()> {
    Pattern::parse(pattern).map(drop).map_err(|error| PyValueError::new_err(error.to_string()))
}

/// A path parameter as the type that its pattern names.
fn converted<'py>(py: Python<'py>, param: Param<'_>) -> PyResult<Bound<'py, PyAny>> {
    static UUID: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let value = PyString::new(py, &String::from_utf8_lossy(param.value));
    match param.kind {
        Kind::Text => Ok(value.into_any()),
        Kind::Int => py.get_type::<PyInt>().call1((value,)),
        Kind::Float => py.get_type::<PyFloat>().call1((value,)),
        Kind::Uuid => UUID.import(py, "uuid", "UUID")?.call1((value,)),
    }
}

impl CallHead {
    /// The model id; empty if there is none.
    pub(crate) fn model(&self) -> &str {
        self.view.head().multiplexed_model_id
    }

    /// The arguments, if they are plain and the method's own coroutine takes them; else they stay here.
    pub(crate) fn plain_arguments<'py>(&self, py: Python<'py>) -> Option<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let arguments = if self.streaming { None } else { self.view.take_arguments() }?;
        let plain = value::plain_arguments(py, &arguments);
        if plain.is_none() {
            self.view.restore_arguments(arguments);
        }
        plain
    }
}

fn address<'py>(py: Python<'py>, (host, port): (&[u8], u16)) -> Option<(Bound<'py, PyString>, u16)> {
    (!host.is_empty()).then(|| (text(py, host), port))
}
