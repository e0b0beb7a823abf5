//! One HTTP request: its id, its route, its body and deadline, and the answer that it gets in every case.

use std::{borrow::Cow, convert::Infallible, rc::Rc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode,
    header::{ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER},
    request::Parts,
};
use hyper::{body::Incoming, ext::ReasonPhrase};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    body::{Body, Inbound, LINGER, Source},
    builtin,
    departure::{Departure, Presence, Unread},
    forwarded::Forwarded,
    listen::{Conn, Open},
    relay::{Call, Marks, X_REQUEST_ID, relay},
    stream::{Head, StreamRef},
};
use crate::{
    engine::{Affinity, route::decoded},
    error::Error,
    request_id,
    wire::{
        ResponseHeadView,
        head::{MODEL_HEADER, is_named},
    },
};

const FORWARDED_FOR: &str = "x-forwarded-for";
const FORWARDED_PROTO: &str = "x-forwarded-proto";
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// When a request must be answered, and how many seconds that was.
type Deadline = Option<(Instant, f64)>;

/// Answers one request of a connection.
pub(super) async fn answer(conn: Rc<Conn>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let open = Open::new(&conn);
    let (parts, incoming) = request.into_parts();
    let wishes = Wishes::read(&parts.headers, conn.shard.shared.config.session_header.as_bytes());
    let (id, made) = match wishes.id {
        Some(given) => (given.clone(), false),
        None => (make_id(&conn), true),
    };
    let marks = Marks { id, made, affinity: wishes.affinity(), forwarded: wishes.forwarded(&conn, &parts.headers) };
    let request_id = marks.id.clone();
    let mut response = if let Some(page) = builtin::page(&conn.shard, parts.uri.path()) {
        page.map(|bytes| Body::whole(bytes, open))
    } else if wishes.websocket {
        refusal(&Error::WebSocket, open)
    } else if parts.method == http::Method::CONNECT {
        refusal(&Error::Malformed, open)
    } else {
        let deadline = wishes.deadline(conn.shard.shared.config.request_timeout_s);
        if wishes.keep {
            // On a task of its own the request goes on when hyper drops this future, and the client's presence with it.
            let (keeper, departure) = (Rc::clone(&conn), Rc::new(Departure::default()));
            let _present = Presence(Rc::clone(&departure));
            let task =
                async move { handle(&keeper, &parts, incoming, &marks, deadline, Some(&*departure), open).await };
            match tokio::task::spawn_local(task).await {
                Ok(response) => response,
                Err(_) => refusal(&Error::Internal("the request's task panicked".into()), Open::new(&conn)),
            }
        } else {
            handle(&conn, &parts, incoming, &marks, deadline, None, open).await
        }
    };
    response.headers_mut().append(X_REQUEST_ID, request_id);
    if response.status().canonical_reason().is_none() {
        // hyper would write `<none>`.
        response.extensions_mut().insert(ReasonPhrase::from_static(b""));
    }
    Ok(response)
}

async fn handle(
    conn: &Rc<Conn>,
    parts: &Parts,
    incoming: Incoming,
    marks: &Marks,
    deadline: Deadline,
    departure: Option<&Departure>,
    open: Open,
) -> Response<Body> {
    let work = dispatch(conn, parts, incoming, marks, deadline, departure);
    let result = match deadline {
        None => work.await,
        Some((instant, seconds)) => match timeout_at(instant, work).await {
            // The replica's clock may be the first to say so.
            Ok(Err(Error::Deadline { .. })) | Err(_) => {
                let request_id = String::from_utf8_lossy(marks.id.as_bytes()).into_owned();
                Err(Error::Deadline { request_id, seconds })
            }
            Ok(result) => result,
        },
    };
    match result {
        Ok((mut stream, Head { status, payload, view, whole })) => {
            let body = view.body();
            let mut response = Response::new(());
            *response.status_mut() = final_status(status, marks);
            put_headers(response.headers_mut(), &view, &payload);
            let bodiless = bodiless(parts, response.status());
            let declared = response.headers().get(CONTENT_LENGTH);
            if whole
                && !bodiless
                && declared.is_some_and(|declared| declared.as_bytes() != body.len().to_string().as_bytes())
            {
                // To send it as it is would leave the client waiting, or reading a part as the whole.
                return refusal(&Error::User, open);
            }
            let body = if whole {
                drop(stream);
                Body::whole(body, open)
            } else {
                stream.unread = match departure {
                    _ if bodiless => Unread::Ignored,
                    Some(_) => Unread::Told,
                    None => Unread::Cancelled,
                };
                let length = declared.filter(|_| !bodiless).and_then(|length| length.to_str().ok()?.parse().ok());
                let limit = (bodiless && departure.is_none()).then(|| Instant::now() + LINGER);
                let deadline = deadline.map(|(instant, _)| instant).into_iter().chain(limit).min();
                let deadline = deadline.map(|instant| Box::pin(sleep_until(instant)));
                Body::streamed(body, stream, length, deadline, open)
            };
            response.map(|()| body)
        }
        Err(error) => refusal(&error, open),
    }
}

/// The handler's status, if it is one that a response may end with.
fn final_status(status: u32, marks: &Marks) -> StatusCode {
    let known = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
    known.filter(|known| !known.is_informational()).unwrap_or_else(|| {
        let request_id = &*String::from_utf8_lossy(marks.id.as_bytes());
        tracing::warn!(request_id, status, "a handler's status is not a final one; its client gets 500");
        StatusCode::INTERNAL_SERVER_ERROR
    })
}

/// hyper reads no body then, which is no reason to cancel the handler.
fn bodiless(parts: &Parts, status: StatusCode) -> bool {
    parts.method == http::Method::HEAD || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED
}

async fn dispatch(
    conn: &Rc<Conn>,
    parts: &Parts,
    incoming: Incoming,
    marks: &Marks,
    deadline: Deadline,
    departure: Option<&Departure>,
) -> Result<(StreamRef, Head), Error> {
    let source = Source::new(incoming, &parts.headers);
    let shard = &conn.shard;
    let config = &shard.shared.config;
    let path = decoded(parts.uri.path().as_bytes());
    let Some((route, params)) = shard.route(&path) else {
        let path = format!("{}{}", config.root_path, String::from_utf8_lossy(&path));
        return Err(Error::NotFound { path });
    };
    route.takes(parts.method.as_str())?;
    let body = Inbound::read(source, config.max_body_bytes, route.batched).await?;
    let deadline = deadline.map(|(instant, _)| instant);
    let mut call = Call { shard, conn, route, params, path: &path, parts, marks, deadline, departure, aimed: None };
    let mut result = relay(&mut call, body).await;
    call.end(&mut result);
    result
}

/// What a client's headers ask of the proxy, found in one pass.
#[derive(Default)]
pub(super) struct Wishes<'h> {
    id: Option<&'h HeaderValue>,
    timeout: Option<&'h HeaderValue>,
    /// Not to be cancelled when the client leaves.
    keep: bool,
    websocket: bool,
    model: Option<&'h HeaderValue>,
    session: Option<&'h HeaderValue>,
    /// A proxy has passed it on, or says so.
    forwarded: bool,
    scheme: Option<&'h HeaderValue>,
}

impl<'h> Wishes<'h> {
    pub(super) fn read(headers: &'h HeaderMap, session_header: &[u8]) -> Self {
        let mut wishes = Self::default();
        for (name, value) in headers {
            match name.as_str() {
                "x-request-id" => wishes.id = wishes.id.or(Some(value)),
                "x-request-timeout-seconds" => wishes.timeout = Some(value),
                "x-request-disconnect-disabled" => wishes.keep = value == "?1",
                "upgrade" => wishes.websocket = value.as_bytes().eq_ignore_ascii_case(b"websocket"),
                FORWARDED_FOR => wishes.forwarded = true,
                FORWARDED_PROTO => wishes.scheme = Some(value),
                name if is_named(name.as_bytes(), MODEL_HEADER) => wishes.model = Some(value),
                _ => {}
            }
            if is_named(name.as_str().as_bytes(), session_header) {
                wishes.session = Some(value);
            }
        }
        wishes
    }

    /// Of model and session; empty: none.
    pub(super) fn names(&self) -> (&'h [u8], &'h [u8]) {
        let name = |header: Option<&'h HeaderValue>| header.map_or(&b""[..], HeaderValue::as_bytes);
        (name(self.model), name(self.session))
    }

    fn affinity(&self) -> Affinity {
        let (model, session) = self.names();
        Affinity::new(model, session)
    }

    /// What its proxy says of the client, if that is to be believed.
    fn forwarded(&self, conn: &Conn, headers: &HeaderMap) -> Option<Box<Forwarded>> {
        let trusted = &conn.shard.shared.trusted;
        if !(self.forwarded || self.scheme.is_some()) || !trusted.has(&conn.client.0) {
            return None;
        }
        Some(Box::new(Forwarded::read(trusted, self.scheme, headers.get_all(FORWARDED_FOR).iter())))
    }

    /// The client's deadline, or the configured one: not above zero means none, what is no number is ignored.
    fn deadline(&self, configured: Option<f64>) -> Deadline {
        let given = self.timeout.and_then(|value| value.to_str().ok()?.trim().parse::<f64>().ok());
        let seconds = match given.filter(|seconds| !seconds.is_nan()) {
            Some(seconds) => Some(seconds).filter(|&seconds| seconds > 0.0),
            None => configured,
        }?;
        let instant = Instant::now().checked_add(Duration::try_from_secs_f64(seconds).ok()?)?;
        Some((instant, seconds))
    }
}

/// The id of a request that came without one.
fn make_id(conn: &Conn) -> HeaderValue {
    let id = request_id::uuid(conn.shard.random.borrow_mut().u128(..));
    HeaderValue::from_bytes(&id).expect("hexadecimal digits are a header value")
}

/// Copies a response's headers. What cannot be one is left out, and so is the framing: that is hyper's.
fn put_headers(out: &mut HeaderMap, view: &ResponseHeadView, payload: &Bytes) {
    out.reserve(view.header_count() + 1);
    for (name, value) in view.headers().filter(|(name, _)| *name != b"transfer-encoding") {
        let value = HeaderValue::from_maybe_shared(payload.slice_ref(value));
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), value) {
            out.append(name, value);
        }
    }
}

/// The proxy's own answer to a request that failed.
fn refusal(error: &Error, open: Open) -> Response<Body> {
    open.metrics().errors.up();
    let text = match error.text() {
        Cow::Borrowed(text) => Bytes::from_static(text.as_bytes()),
        Cow::Owned(text) => text.into(),
    };
    let mut response = Response::new(Body::whole(text, open));
    *response.status_mut() = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let headers = response.headers_mut();
    if error.typed() {
        headers.insert(CONTENT_TYPE, TEXT);
    }
    if let Some(allow) = error.allow().and_then(|methods| HeaderValue::try_from(methods).ok()) {
        headers.insert(ALLOW, allow);
    }
    if let Some(seconds) = error.retry_after() {
        headers.insert(RETRY_AFTER, seconds.into());
    }
    if error.closes() {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
