//! The nested poller: listeners and links behind one descriptor, which the event loop watches, and the tick.
//!
//! One readable event → read, decode, step the handlers, flush the answers once. The tick ends after 64 frames or 1 ms and
//! the loop calls it again, also for bytes that are read already and that the kernel will not report again.
//! The poller is taken out of its lock for the length of a tick: a handler that runs the loop itself finds none.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use mio::net::{TcpListener, UnixListener};
use mio::{Events, Interest, Poll, Token};
use pyo3::intern;
use pyo3::prelude::*;
use rayserve_dataplane::tcp;
use rayserve_dataplane::vigil::Vigil;
use rayserve_dataplane::wire::hello::Step;
use rayserve_dataplane::wire::{Decoder, Frame, Header, Kind, MAX_PAYLOAD};

use super::calls::CALLS;
use super::flush::STALE;
use super::frames::{Broken, handle};
use super::link::{Link, Socket};
use super::replica::{Replica, count};
use super::stream::Stream;
use crate::http::receive;
use crate::lock::lock;

/// The waker's token; links count from there.
pub(crate) const WAKER: Token = Token(0);
const FRAMES: usize = 64;
const TIME: Duration = Duration::from_millis(1);
/// Time for the handshake.
pub(super) const HELLO: Duration = Duration::from_secs(2);

pub(crate) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

pub(crate) struct Poller {
    pub(crate) poll: Poll,
    pub(super) events: Events,
    listeners: Vec<(Token, Listener)>,
    /// Links to read or with bytes that are read and not yet decoded; also what an error or a panic leaves of a tick.
    backlog: VecDeque<Arc<Link>>,
    /// Links whose handshake is not through, oldest first.
    greeting: Vec<(Instant, Arc<Link>)>,
    next: usize,
    pub(super) vigil: Vigil,
    pub(crate) token: Vec<u8>,
    pub(crate) replica_id: String,
}

/// What a tick leaves to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    /// Call again soon.
    Again,
}

struct Budget {
    frames: usize,
    start: Instant,
}

impl Poller {
    pub(crate) fn new(token: Vec<u8>, replica_id: String) -> io::Result<Self> {
        Ok(Self {
            poll: Poll::new()?,
            events: Events::with_capacity(256),
            listeners: Vec::new(),
            backlog: VecDeque::new(),
            greeting: Vec::new(),
            next: CALLS.0,
            vigil: Vigil::default(),
            token,
            replica_id,
        })
    }

    pub(crate) fn listen(&mut self, mut listener: Listener) -> io::Result<()> {
        let token = self.fresh();
        let registry = self.poll.registry();
        match &mut listener {
            Listener::Unix(it) => registry.register(it, token, Interest::READABLE)?,
            Listener::Tcp(it) => registry.register(it, token, Interest::READABLE)?,
        }
        self.listeners.push((token, listener));
        Ok(())
    }

    fn fresh(&mut self) -> Token {
        self.next += 1;
        Token(self.next)
    }

    /// Asks the kernel what there is to do.
    pub(super) fn look(&mut self) -> io::Result<()> {
        match self.poll.poll(&mut self.events, Some(Duration::ZERO)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// Handles what the kernel reports and what was left over.
    pub(crate) fn tick(&mut self, py: Python<'_>, replica: &Arc<Replica>) -> PyResult<After> {
        let mut budget = Budget { frames: 0, start: Instant::now() };
        if self.events.is_empty() {
            self.look()?;
        }
        let events = self.events.iter().map(|event| (event.token(), event.is_writable(), event.is_read_closed()));
        let mut outcome = Ok(());
        let events = events.collect::<Vec<_>>();
        self.events.clear();
        for (token, writable, ended) in events {
            let link = lock(&replica.links).get(&token).cloned();
            if let Some(link) = link {
                if writable {
                    outcome = outcome.and(replica.flush_link(py, &link));
                }
                lock(&link.input).ended |= ended;
                if !self.backlog.iter().any(|known| Arc::ptr_eq(known, &link)) {
                    self.backlog.push_back(link);
                }
            } else if token == CALLS {
                outcome = outcome.and(replica.read_calls(py));
            } else if token != WAKER {
                outcome = outcome.and(self.accept(py, replica, token));
            }
        }
        outcome?;
        replica.run_posted(py)?;
        replica.run_ready(py)?;
        for _ in 0..self.backlog.len() {
            if budget.is_spent() {
                break;
            }
            if let Some(link) = self.backlog.pop_front() {
                self.serve(py, replica, &link, &mut budget)?;
            }
        }
        replica.run_ready(py)?;
        Ok(if self.backlog.is_empty() { After::Nothing } else { After::Again })
    }

    fn accept(&mut self, py: Python<'_>, replica: &Arc<Replica>, listener: Token) -> PyResult<()> {
        loop {
            let Some((_, listener)) = self.listeners.iter().find(|(token, _)| *token == listener) else {
                return Ok(());
            };
            let accepted = match listener {
                Listener::Unix(it) => it.accept().map(|(socket, _)| {
                    (Socket::is_own(&socket) && tcp::widen(&socket).is_ok()).then_some(Socket::Unix(socket))
                }),
                Listener::Tcp(it) => {
                    it.accept().map(|(socket, _)| tcp::prepare(&socket).is_ok().then_some(Socket::Tcp(socket)))
                }
            };
            let mut socket = match accepted {
                Ok(Some(socket)) => socket,
                Ok(None) => continue,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // No descriptor left, or the peer was quicker: the listener stays readable for the next event.
                Err(_) => return Ok(()),
            };
            let token = self.fresh();
            if socket.register(self.poll.registry(), token).is_err() {
                continue;
            }
            let link = Arc::new(Link::new(token, socket, replica.outgoing.clone()));
            lock(&replica.links).insert(token, link.clone());
            self.greeting.push((Instant::now(), link.clone()));
            // What came before the registration is not reported.
            self.backlog.push_back(link);
            if self.greeting.len() == 1 {
                replica.expire_later(py, HELLO)?;
            }
        }
    }

    /// Closes links that have not proven themselves in time, and comes back for the next one.
    pub(crate) fn expire(&mut self, py: Python<'_>, replica: &Arc<Replica>) -> PyResult<()> {
        let (late, rest) = std::mem::take(&mut self.greeting)
            .into_iter()
            .filter(|(_, link)| link.is_open() && lock(&link.input).callee.is_some())
            .partition(|(since, _)| since.elapsed() >= HELLO);
        self.greeting = rest;
        // The loop's clock may be a millisecond ahead of ours.
        if let Some((since, _)) = self.greeting.first() {
            replica.expire_later(py, HELLO.saturating_sub(since.elapsed()))?;
        }
        let late: Vec<(Instant, Arc<Link>)> = late;
        for (_, link) in late {
            replica.lost(py, &link)?;
        }
        Ok(())
    }

    /// Reads a link and handles its frames; what the budget leaves goes to the backlog.
    fn serve(&mut self, py: Python<'_>, replica: &Arc<Replica>, link: &Arc<Link>, budget: &mut Budget) -> PyResult<()> {
        let (mut buf, ended) = {
            let mut input = lock(&link.input);
            (std::mem::take(&mut input.buf), input.ended)
        };
        let mut fed = Vec::new();
        let (mut decoded, read) = loop {
            let read = link.read(py, &mut buf, &mut fed);
            let decoded = self.decode(py, replica, link, &mut buf, budget, &mut fed);
            // The socket has more of a body.
            let goes_on =
                matches!((&decoded, &read), (Ok(true), Ok(true))) && lock(&link.input).decoder.piece().is_some();
            if !goes_on || budget.is_spent() {
                break (decoded, read);
            }
        };
        lock(&link.input).buf = buf;
        for stream in fed {
            let woken = receive::wake_readers(py, &stream).map_err(Broken::from);
            decoded = decoded.and_then(|all| woken.map(|()| all));
        }
        match (decoded, read) {
            (Err(Broken::Python(error)), _) => {
                self.backlog.push_back(link.clone());
                Err(error)
            }
            (Err(Broken::Peer), _) | (Ok(true), Err(_)) => replica.lost(py, link),
            (Ok(true), Ok(false)) if !ended => Ok(()),
            // Not everything is decoded, or the socket holds more than was read; of the end the kernel tells only once.
            _ => {
                self.backlog.push_back(link.clone());
                Ok(())
            }
        }
    }

    /// Whether every whole frame was handled.
    fn decode(
        &self,
        py: Python<'_>,
        replica: &Arc<Replica>,
        link: &Arc<Link>,
        buf: &mut BytesMut,
        budget: &mut Budget,
        fed: &mut Vec<Arc<Stream>>,
    ) -> Result<bool, Broken> {
        loop {
            if budget.is_spent() {
                return Ok(false);
            }
            let frame = lock(&link.input).decoder.next(buf)?;
            let Some(frame) = frame else { return Ok(true) };
            budget.frames += 1;
            if lock(&link.input).callee.is_some() {
                self.greet(replica, link, &frame)?;
            } else {
                handle(py, replica, link, frame, fed)?;
            }
            if replica.outgoing.since().is_some_and(|since| since.elapsed() >= STALE) {
                replica.flush_answers(py)?;
            }
        }
    }

    fn greet(&self, replica: &Replica, link: &Arc<Link>, frame: &Frame) -> Result<(), Broken> {
        let limit = u32::try_from(replica.with_limit(|limit| limit.limit())).unwrap_or(u32::MAX);
        let mut out = BytesMut::new();
        let mut input = lock(&link.input);
        let Some(callee) = &mut input.callee else { return Ok(()) };
        let step = callee.feed(frame, &self.token, &self.replica_id, limit, &mut out)?;
        if step != Step::Continue {
            input.callee = None;
            input.decoder = Decoder::new(MAX_PAYLOAD);
        }
        drop(input);
        link.put_with(|to| to.extend_from_slice(&out));
        if step != Step::Continue && replica.has_models() {
            replica.tell_models(link);
        }
        if step != Step::Continue && replica.is_draining() {
            link.put(Header::new(Kind::Drain, 0), &[]);
        }
        Ok(())
    }
}

impl Budget {
    fn is_spent(&self) -> bool {
        self.frames >= FRAMES || self.start.elapsed() >= TIME
    }
}

/// The poller for the length of a tick; a panic does not lose it.
pub(crate) struct Taken<'w> {
    home: &'w Mutex<Option<Poller>>,
    replica: &'w Replica,
    poller: Option<Poller>,
}

impl<'w> Taken<'w> {
    /// None: a handler runs the loop from within a tick, or the worker is closed.
    pub(crate) fn take(home: &'w Mutex<Option<Poller>>, replica: &'w Replica) -> Option<Self> {
        let poller = Some(lock(home).take()?);
        replica.ticking.store(true, Ordering::Relaxed);
        Some(Self { home, replica, poller })
    }

    pub(crate) fn poller(&mut self) -> &mut Poller {
        self.poller.as_mut().expect("only drop takes it out")
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.replica.ticking.store(false, Ordering::Relaxed);
        *lock(self.home) = self.poller.take();
    }
}

/// Runs a tick and what belongs after it.
pub(crate) fn run(py: Python<'_>, replica: &Arc<Replica>, poller: &mut Poller) -> PyResult<After> {
    count(&replica.counters.wakes);
    let after = poller.tick(py, replica);
    // The last request's head would live as long as the loop's own context.
    replica.hooks.context.bind(py).call_method1(intern!(py, "set"), (py.None(),))?;
    replica.flush_turn(py)?;
    after
}
