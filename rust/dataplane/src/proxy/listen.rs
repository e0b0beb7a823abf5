//! Sockets of clients: binding, accepting, and when a connection has lived long enough.
//!
//! The port is bound exclusively, never with `SO_REUSEPORT`: a stranger or a leftover cannot share it. Connections carry no
//! timers; one sweep a shard looks at all of them.

use std::{
    cell::{Cell, RefCell},
    io,
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use hyper::{
    rt::{Read, ReadBufCursor, Write},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{net::TcpStream, time::sleep};

use super::{http::answer, shard::Shard};
use crate::metrics::Metrics;

const BACKLOG: i32 = 4096;
/// Largest piece of a body that hyper reads or writes at once. The kernel's TCP costs a quarter less than at 64 KiB.
const PIECE: usize = 256 * 1024;
/// Responses up to this size are written in one piece.
const SMALL: usize = 1024;
/// A client has this long to send a whole head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// When accepting fails, descriptors have run out; some will be free after a moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Binds `host:port` for this process alone.
///
/// # Errors
/// The text names the address and what to do about it.
pub(super) fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    let explain = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => {
                format!(
                    "; another process listens there: `ss -ltnp 'sport = :{port}'` names it. Stop it or choose another `HTTPOptions.port`"
                )
            }
            io::ErrorKind::PermissionDenied => {
                "; ports below 1024 need privileges, choose another `HTTPOptions.port`".into()
            }
            _ => "; check `HTTPOptions.host` and `HTTPOptions.port`".into(),
        };
        io::Error::new(error.kind(), format!("the proxy cannot listen on {host}:{port}: {error}{hint}"))
    };
    let addresses: Vec<_> = (host, port).to_socket_addrs().map_err(explain)?.collect();
    // `localhost` resolves to both families; clients of Ray Serve use 127.0.0.1.
    let address = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    let address = *address.ok_or_else(|| explain(io::ErrorKind::AddrNotAvailable.into()))?;
    listen(address).map_err(explain)
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of a predecessor in TIME_WAIT must not keep its port; a listener still does.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Lets this process hold as many connections as the system allows.
pub(super) fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // A limit that cannot be raised stays; accepting then meets EMFILE, and survives it.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Accepts until it is dropped.
pub(super) async fn accept(shard: Rc<Shard>, listener: tokio::net::TcpListener) {
    let config = &shard.shared.config;
    let mut http = http1::Builder::new();
    // Not `pipeline_flush`: with it hyper buffers a response without end for a client that does not read.
    http.half_close(false)
        .keep_alive(config.keep_alive_timeout_s > 0.0)
        .header_read_timeout(None)
        .max_buf_size(config.max_head_bytes.max(PIECE))
        .max_header_size(config.max_head_bytes);
    loop {
        let Ok((socket, peer)) = listener.accept().await else {
            shard.metrics.accept_errors.up();
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        shard.metrics.accepted.up();
        if let Ok(local) = socket.local_addr() {
            let _ = socket.set_nodelay(true);
            tokio::task::spawn_local(serve(Rc::clone(&shard), http.clone(), socket, peer, local));
        }
    }
}

async fn serve(shard: Rc<Shard>, http: http1::Builder, socket: TcpStream, peer: SocketAddr, local: SocketAddr) {
    let conn = Rc::new(Conn {
        client: (peer.ip().to_string(), peer.port()),
        server: (local.ip().to_string(), local.port()),
        open: Cell::new(0),
        last_io: Cell::new(shard.tick.get()),
        head_since: Cell::new(Some(shard.tick.get())),
        verdict: Cell::new(Verdict::Stay),
        waker: RefCell::default(),
        shard: Rc::clone(&shard),
    });
    let _listed = Listed { key: shard.conns.borrow_mut().insert(Rc::clone(&conn)), shard: &shard };
    shard.metrics.connections.up();
    let io = Watched { inner: TokioIo::new(socket), conn: Rc::clone(&conn) };
    let service = {
        let conn = Rc::clone(&conn);
        service_fn(move |request| answer(Rc::clone(&conn), request))
    };
    let mut connection = pin!(http.serve_connection(io, service));
    std::future::poll_fn(|cx| {
        if conn.waker.borrow().is_none() {
            *conn.waker.borrow_mut() = Some(cx.waker().clone());
        }
        match conn.verdict.get() {
            Verdict::Drop => return Poll::Ready(()),
            Verdict::Retire => {
                conn.verdict.set(Verdict::Retired);
                connection.as_mut().graceful_shutdown();
            }
            Verdict::Stay | Verdict::Retired => {}
        }
        // What ends a connection is the client's business; hyper has answered what can be answered.
        connection.as_mut().poll(cx).map(drop)
    })
    .await;
}

struct Listed<'s> {
    key: usize,
    shard: &'s Shard,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shard.metrics.panics.up();
        }
        self.shard.conns.borrow_mut().remove(self.key);
        self.shard.metrics.connections.down();
    }
}

/// What the sweep has decided about a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Stay,
    /// To end after the present request.
    Retire,
    /// hyper has been told.
    Retired,
    /// To end now.
    Drop,
}

/// A client's connection.
pub(super) struct Conn {
    pub(super) shard: Rc<Shard>,
    pub(super) client: (String, u16),
    pub(super) server: (String, u16),
    /// Requests whose response is not through.
    open: Cell<u32>,
    /// Tick of the last byte in either direction.
    last_io: Cell<u64>,
    /// Tick since which a head is awaited in parts.
    head_since: Cell<Option<u64>>,
    verdict: Cell<Verdict>,
    waker: RefCell<Option<Waker>>,
}

impl Conn {
    fn judge(&self, verdict: Verdict) {
        self.verdict.set(verdict);
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Ends after the present request.
    pub(super) fn retire(&self) {
        if self.verdict.get() == Verdict::Stay {
            self.judge(Verdict::Retire);
        }
    }

    fn sweep(&self, now: u64, keep_alive: u64, head: u64) {
        if self.open.get() > 0 {
            return;
        }
        let idle = now - self.last_io.get();
        if self.head_since.get().is_some_and(|since| now - since >= head) || idle >= 2 * keep_alive {
            self.judge(Verdict::Drop);
        } else if idle >= keep_alive {
            self.retire();
        }
    }
}

/// Counts a request as open while it lives.
pub(super) struct Open(Rc<Conn>);

impl Open {
    pub(super) fn new(conn: &Rc<Conn>) -> Self {
        conn.open.set(conn.open.get() + 1);
        conn.head_since.set(None);
        conn.shard.metrics.requests.up();
        conn.shard.metrics.requests_open.up();
        Self(Rc::clone(conn))
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.shard.metrics
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.last_io.set(self.0.shard.tick.get());
        self.0.shard.metrics.requests_open.down();
    }
}

/// Looks at every connection four times in a keep-alive time, and at least once a second.
pub(super) async fn sweep(shard: Rc<Shard>) {
    let keep_alive = match shard.shared.config.keep_alive_timeout_s {
        seconds if seconds > 0.0 => seconds,
        _ => HEAD_TIMEOUT.as_secs_f64(), // an answer ends its connection; what is idle has not asked yet
    };
    let period = (keep_alive / 4.0).clamp(0.01, 1.0);
    #[expect(clippy::cast_sign_loss, reason = "times are positive")]
    let ticks = |seconds: f64| (seconds / period).ceil() as u64;
    let (keep_alive, head) = (ticks(keep_alive), ticks(HEAD_TIMEOUT.as_secs_f64()));
    loop {
        sleep(Duration::from_secs_f64(period)).await;
        let now = shard.tick.get() + 1;
        shard.tick.set(now);
        for (_, conn) in shard.conns.borrow().iter() {
            conn.sweep(now, keep_alive, head);
        }
    }
}

/// The socket, noting when bytes move.
struct Watched {
    inner: TokioIo<TcpStream>,
    conn: Rc<Conn>,
}

impl Watched {
    fn note(&self, read: bool) {
        let now = self.conn.shard.tick.get();
        self.conn.last_io.set(now);
        if read && self.conn.open.get() == 0 && self.conn.head_since.get().is_none() {
            self.conn.head_since.set(Some(now));
        }
    }
}

impl Read for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_read(cx, buf);
        if result.is_ready() {
            self.conn.shard.events.up();
            self.note(true);
        }
        result
    }
}

impl Write for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        if result.is_ready() {
            self.note(false);
        }
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let inner = Pin::new(&mut self.inner);
        let result = if bufs.iter().map(|buf| buf.len()).sum::<usize>() > SMALL {
            inner.poll_write_vectored(cx, bufs)
        } else {
            // Joining them costs less than what the kernel spends on a list.
            let (mut joined, mut end) = ([0; SMALL], 0);
            for buf in bufs {
                joined[end..end + buf.len()].copy_from_slice(buf);
                end += buf.len();
            }
            inner.poll_write(cx, &joined[..end])
        };
        if result.is_ready() {
            self.note(false);
        }
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::{
        io::AsyncWriteExt,
        runtime::{Builder, LocalOptions},
    };

    use super::{
        super::{Config, Proxy},
        *,
    };

    const CONFIG: &str = r#"{"host": "127.0.0.1", "port": 0, "root_path": "", "request_timeout_s": null, "shards": 1,
        "keep_alive_timeout_s": 90.0, "max_head_bytes": 65536, "max_body_bytes": null, "node_id": "n", "token": "00",
        "snapshot_path": null, "session_header": "x-session-id", "prefer_local_node": true, "forwarded_allow_ips": ""}"#;
    const ALLOWED: u64 = 5;

    /// Sends one part a tick; after how many of them the connection is cut, if it is.
    async fn cut_after(parts: impl Iterator<Item = &[u8]>) -> Option<u64> {
        let proxy = Proxy::new(Config::parse(CONFIG.as_bytes()).expect("valid"));
        let shard = Shard::new(Arc::clone(&proxy.shared), Arc::default());
        let listener = bind("127.0.0.1", 0).expect("port 0 is free");
        let address = listener.local_addr().expect("bound");
        let listener = tokio::net::TcpListener::from_std(listener).expect("non-blocking");
        let accepting = tokio::task::spawn_local(accept(Rc::clone(&shard), listener));
        let mut client = TcpStream::connect(address).await.expect("it listens");
        while shard.conns.borrow().is_empty() {
            sleep(Duration::from_millis(1)).await;
        }
        let conn = shard.conns.borrow().iter().next().map(|(_, conn)| Rc::clone(conn)).expect("it is there");
        for part in parts {
            const UNSEEN: u64 = u64::MAX;
            conn.last_io.set(UNSEEN);
            client.write_all(part).await.expect("an open connection");
            while conn.last_io.get() == UNSEEN || conn.open.get() > 0 {
                sleep(Duration::from_millis(1)).await;
            }
            shard.tick.set(shard.tick.get() + 1);
            conn.sweep(shard.tick.get(), 1000, ALLOWED);
            if conn.verdict.get() == Verdict::Drop {
                accepting.abort();
                return Some(shard.tick.get());
            }
        }
        accepting.abort();
        None
    }

    #[test]
    fn a_head_that_trickles_in_is_cut_and_a_client_of_many_whole_ones_is_not() {
        let runtime =
            Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).expect("a runtime");
        let trickle = b"GET / HTTP/1.1\r\nhost: h".chunks(1);
        assert_eq!(runtime.block_on(cut_after(trickle)), Some(ALLOWED));
        let whole = std::iter::repeat_n(&b"GET /-/healthz HTTP/1.1\r\nhost: h\r\n\r\n"[..], 12);
        assert_eq!(runtime.block_on(cut_after(whole)), None);
    }
}
