//! One request to a replica and its answer back: admission, the REQUEST frame, and what a failure leads to.
//!
//! Not begun is sent elsewhere, at its old place in the order of arrival; if its deployment is gone, to where the route
//! leads by now. Begun and dead is tried once more if the method is idempotent, the deployment allows it, nothing was
//! answered and the body is still whole. Where a route has several targets, `split.rs` chooses and chooses again.

use std::{future::poll_fn, rc::Rc, task::Poll, time::Instant as Clock};

use bytes::{Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Version, request::Parts};
use tokio::time::Instant;

use super::{
    batches::Packed,
    body::{Inbound, Upload},
    choose::Choice,
    departure::Departure,
    forwarded::Forwarded,
    http::Wishes,
    listen::Conn,
    sender::Sender,
    shard::{Route, Shard},
    stream::{Head, Outcome, StreamRef},
    waiting::{Asked, Came, Waiting},
};
use crate::{
    engine::{Affinity, Lease, Place},
    error::{Error, Retry},
    wire::{
        flag,
        head::{RequestHead, put_request_head},
    },
};

/// Room for a head of usual length.
const HEAD: usize = 512;

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What a request is known by.
pub(super) struct Marks {
    pub(super) id: HeaderValue,
    /// The id was made here and is added to the headers.
    pub(super) made: bool,
    pub(super) affinity: Affinity,
    /// What a trusted proxy says of the client.
    pub(super) forwarded: Option<Box<Forwarded>>,
}

/// A request that has found its route.
pub(super) struct Call<'c> {
    pub(super) shard: &'c Rc<Shard>,
    pub(super) conn: &'c Conn,
    pub(super) route: Rc<Route>,
    /// What the route's pattern found in the path.
    pub(super) params: Vec<u8>,
    /// What the route was found by.
    pub(super) path: &'c [u8],
    pub(super) parts: &'c Parts,
    pub(super) marks: &'c Marks,
    pub(super) deadline: Option<Instant>,
    /// If it goes on when its client leaves.
    pub(super) departure: Option<&'c Departure>,
    /// Since when its route is a target that was chosen for it; none when what it has come to is counted.
    pub(super) aimed: Option<Clock>,
}

/// Sends the request until one replica has answered. A body that is still on its way goes on by itself.
///
/// # Errors
/// See [`Error`]; nothing has been sent to the client then.
pub(super) async fn relay(call: &mut Call<'_>, mut body: Inbound) -> Result<(StreamRef, Head), Error> {
    let came = if call.route.fork.is_some() {
        call.divide(&mut body).await?
    } else {
        let first = call.admit(&body).await;
        call.settled(first, &body).await?
    };
    carry(call, came, body).await
}

/// The same for a request that has waited for its first replica.
async fn carry(call: &mut Call<'_>, mut came: Came, mut body: Inbound) -> Result<(StreamRef, Head), Error> {
    let mut retried = false;
    loop {
        let (stream, place) = came.sent(|lease| call.send(lease, &body));
        let Some(stream) = stream else {
            tokio::task::yield_now().await;
            came = call.again(place, &body).await?;
            continue;
        };
        if let Some(departure) = call.departure {
            departure.follow(stream.sender());
        }
        let error = match body.outcome(&stream).await? {
            Outcome::Head(head) => {
                if let Some(departure) = call.departure {
                    departure.hand_over();
                }
                if let Inbound::Streamed(upload) = body
                    && !upload.is_done()
                {
                    tokio::task::spawn_local(go_on(upload, stream.sender()));
                }
                return Ok((stream, head));
            }
            Outcome::Back(waiting) => {
                if !body.rewind() {
                    return Err(Error::NotBegun);
                }
                drop(stream);
                came = call.resumed(waiting, &body).await?;
                continue;
            }
            Outcome::Failed(error) => error,
        };
        let again = match error.retry() {
            Retry::Never => false,
            Retry::Elsewhere | Retry::Reroute => true,
            Retry::Idempotent => {
                let again = !retried && call.route.retry_idempotent && call.parts.method.is_idempotent();
                retried = true;
                again
            }
        };
        if !again || !body.rewind() {
            return Err(error);
        }
        drop(stream);
        call.shard.metrics.retried.up();
        came = call.again(place, &body).await?;
    }
}

impl Inbound {
    /// What comes of the stream, to which the body goes meanwhile.
    ///
    /// # Errors
    /// The client's: its body is too large, broken, or it has gone.
    pub(super) async fn outcome(&mut self, stream: &StreamRef) -> Result<Outcome, Error> {
        let Self::Streamed(upload) = self else { return Ok(poll_fn(|cx| stream.poll_outcome(cx)).await) };
        let sender = stream.sender();
        poll_fn(|cx| {
            if !upload.is_done()
                && let Poll::Ready(Err(error)) = upload.poll(cx, &sender)
            {
                return Poll::Ready(Err(error));
            }
            stream.poll_outcome(cx).map(Ok)
        })
        .await
    }
}

/// The response has begun before the request's body has ended.
async fn go_on(mut upload: Upload, sender: Sender) {
    if poll_fn(|cx| upload.poll(cx, &sender)).await.is_err() {
        sender.cancel();
    }
}

impl Call<'_> {
    /// For a router in Python.
    pub(super) fn describe(&self) -> Choice {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let wishes = Wishes::read(&self.parts.headers, self.shard.shared.config.session_header.as_bytes());
        let (model, session) = wishes.names();
        let deployment = match self.shard.engine.borrow_mut().config(self.route.deployment) {
            Some(config) => config.key(),
            None => String::new(),
        };
        Choice {
            number: 0,
            deployment,
            route: text(&self.route.prefix),
            request_id: text(self.marks.id.as_bytes()),
            multiplexed_model_id: text(model),
            session_id: text(session),
        }
    }

    /// A slot at the route's deployment, or that the request was sent with a batch.
    pub(super) async fn admit(&self, body: &Inbound) -> Result<Came, Error> {
        let (route, marks) = (&self.route, self.marks);
        self.shard.admit(route.deployment, marks.affinity, || self.pack(body), || self.describe()).await
    }

    /// What comes next of a request that came back.
    async fn again(&mut self, place: Place, body: &Inbound) -> Result<Came, Error> {
        match self.shard.again(place, None) {
            Ok(waiting) => {
                waiting.pack(|| self.pack(body));
                self.resumed(waiting, body).await
            }
            Err(error) => self.settled(Err(error), body).await,
        }
    }

    /// The same for one that waits again already.
    async fn resumed(&mut self, waiting: Waiting, body: &Inbound) -> Result<Came, Error> {
        if self.route.meter.is_some() {
            return Box::pin(self.choose(Ok(Some(Asked::Wait(waiting))), body)).await;
        }
        let came = waiting.end(|| self.describe()).await;
        self.settled(came, body).await
    }

    /// Takes a request whose deployment is gone, or has failed while others share its route, to where that leads by now. It
    /// may go on for as long as redeploys rename the ingress: only the request's deadline ends that.
    async fn settled(&mut self, mut came: Result<Came, Error>, body: &Inbound) -> Result<Came, Error> {
        loop {
            match came {
                Err(error) if self.may_leave(&error) => match self.shard.route(self.path) {
                    Some((route, params)) if route.fork.is_some() => {
                        self.params = params;
                        let asked = self.ask(&route);
                        return Box::pin(self.choose(asked, body)).await;
                    }
                    Some((route, params)) if route.deployment != self.route.deployment => {
                        self.aim(route, None);
                        self.params = params;
                    }
                    _ => return Err(error),
                },
                came => return came,
            }
            came = self.admit(body).await;
        }
    }

    fn may_leave(&self, error: &Error) -> bool {
        error.retry() == Retry::Reroute || (self.route.meter.is_some() && matches!(error, Error::Unavailable(_)))
    }

    /// The REQUEST for a batch.
    pub(super) fn pack(&self, body: &Inbound) -> Packed {
        let mut head = BytesMut::with_capacity(HEAD);
        self.put_head(&mut head);
        let (body, whole) = match body {
            Inbound::Whole(bytes) => (bytes.clone(), true),
            Inbound::Streamed(_) => (Bytes::new(), false),
        };
        let wake = self.route.copied || self.departure.is_some();
        Packed { head, body, whole, wake, deadline: self.deadline }
    }

    /// Writes the REQUEST; `None` if the lease's link has gone since.
    fn send(&self, lease: Lease, body: &Inbound) -> Option<StreamRef> {
        let (inline, fin) = match body {
            Inbound::Whole(bytes) => (&bytes[..], flag::FIN),
            Inbound::Streamed(_) => (&[][..], 0),
        };
        self.shard.open(lease, fin, self.deadline, |out| {
            self.put_head(out);
            out.extend_from_slice(inline);
        })
    }

    pub(super) fn put_head(&self, out: &mut BytesMut) {
        let root_path = self.shard.shared.config.root_path.as_bytes();
        let path = self.parts.uri.path().as_bytes();
        let rooted;
        let path = if root_path.is_empty() {
            path
        } else {
            rooted = [root_path, path].concat();
            &rooted
        };
        let forwarded = self.marks.forwarded.as_deref();
        let client = forwarded.and_then(|it| it.client.as_ref()).unwrap_or(&self.conn.client);
        let head = RequestHead {
            method: self.parts.method.as_str().as_bytes(),
            http_version: if self.parts.version == Version::HTTP_10 { 10 } else { 11 },
            https: forwarded.is_some_and(|it| it.https),
            path,
            query: self.parts.uri.query().unwrap_or("").as_bytes(),
            root_path: &self.route.root_path,
            route: &self.route.prefix,
            request_id: self.marks.id.as_bytes(),
            client: (client.0.as_bytes(), client.1),
            server: (self.conn.server.0.as_bytes(), self.conn.server.1),
            params: &self.params,
        };
        let made = self.marks.made.then_some((&b"x-request-id"[..], self.marks.id.as_bytes()));
        let headers = self.parts.headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
        put_request_head(out, &head, headers.chain(made));
    }
}
