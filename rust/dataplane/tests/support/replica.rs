//! A replica whose every frame the test reads and writes itself; only the handshake and PONG go by themselves.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use rayserve_dataplane::wire::{
    Decoder, Fault, Frame, Header, Kind, MAX_PAYLOAD, RequestHeadView,
    batch::batch,
    flag,
    head::put_response_head,
    hello::{Callee, Step},
    put,
};
use serde_json::{Value, json};

use super::PATIENCE;

/// Long enough for what was going to come, short enough to wait for what does not.
const MOMENT: Duration = Duration::from_millis(100);

type Links = Arc<Mutex<HashMap<u32, UnixStream>>>;

pub struct Replica {
    pub id: String,
    path: PathBuf,
    frames: Receiver<(u32, Frame)>,
    back: RefCell<VecDeque<(u32, Frame)>>,
    links: Links,
    listener: Option<UnixListener>,
    reading: Arc<AtomicBool>,
    pongs: Arc<AtomicBool>,
}

/// A request that came.
pub struct Got {
    pub link: u32,
    pub header: Header,
    pub head: RequestHeadView,
}

impl Got {
    pub fn is_whole(&self) -> bool {
        self.header.has(flag::FIN)
    }

    pub fn headers(&self) -> HashMap<String, Vec<u8>> {
        let text = |name: &[u8]| String::from_utf8(name.to_vec()).expect("names are ASCII");
        self.head.headers().map(|(name, value)| (text(name), value.to_vec())).collect()
    }
}

impl Replica {
    pub fn start(dir: &Path, id: &str, max_ongoing: u32) -> Self {
        let path = dir.join(id);
        let listener = UnixListener::bind(&path).expect("a socket");
        let (frames_in, frames) = channel();
        let links = Links::default();
        let reading = Arc::new(AtomicBool::new(true));
        let go_on = Arc::clone(&reading);
        let pongs = Arc::new(AtomicBool::new(true));
        let pong = Arc::clone(&pongs);
        let (accepting, known, name) = (listener.try_clone().expect("a descriptor"), Arc::clone(&links), id.to_owned());
        std::thread::spawn(move || {
            for (number, link) in accepting.incoming().enumerate() {
                let Ok(link) = link else { return };
                let (frames, known, name) = (frames_in.clone(), Arc::clone(&known), name.clone());
                let (go_on, pong) = (Arc::clone(&go_on), Arc::clone(&pong));
                std::thread::spawn(move || {
                    read(link, number as u32, &name, max_ongoing, &frames, &known, (&go_on, &pong))
                });
            }
        });
        Self { id: id.into(), path, frames, back: RefCell::default(), links, listener: Some(listener), reading, pongs }
    }

    pub fn address(&self) -> Value {
        json!({"id": self.id, "node_id": "n", "unix": self.path})
    }

    /// The next frame of any link.
    pub fn next(&self) -> (u32, Frame) {
        let pushed = self.back.borrow_mut().pop_front();
        pushed.unwrap_or_else(|| self.frames.recv_timeout(PATIENCE).expect("a frame"))
    }

    /// The next frame, which must be of this kind.
    pub fn expect(&self, kind: Kind) -> Frame {
        let (_, frame) = self.next();
        assert_eq!(frame.header.kind, kind, "{frame:?}");
        frame
    }

    pub fn request(&self) -> Got {
        let (link, frame) = self.next();
        assert_eq!(frame.header.kind, Kind::Request, "{frame:?}");
        Got { link, header: frame.header, head: RequestHeadView::parse(frame.payload).expect("a head") }
    }

    /// The requests of the next batch, in its order.
    pub fn batch(&self) -> Vec<Got> {
        let mut parked = Vec::new();
        loop {
            let (link, Frame { header, payload }) = self.next();
            if header.kind == Kind::Batch {
                let order: Vec<_> = batch(&payload).expect("a list of streams").collect();
                let came: Vec<_> = parked.iter().map(|got: &Got| got.header.stream).collect();
                assert_eq!(order, came, "all of a batch come in one go");
                return parked;
            }
            assert!(header.kind == Kind::Request && header.has(flag::BATCHED), "{header:?}");
            parked.push(Got { link, header, head: RequestHeadView::parse(payload).expect("a head") });
        }
    }

    /// The next frame, if one comes within a moment.
    pub fn try_next(&self) -> Option<(u32, Frame)> {
        if let Some(frame) = self.back.borrow_mut().pop_front() {
            return Some(frame);
        }
        self.frames.recv_timeout(MOMENT).ok()
    }

    /// Lets a frame be read once more.
    pub fn push_back(&self, link: u32, frame: Frame) {
        self.back.borrow_mut().push_back((link, frame));
    }

    pub fn try_request(&self) -> Option<Got> {
        let (link, frame) = self.try_next()?;
        self.push_back(link, frame);
        Some(self.request())
    }

    /// Nothing comes for a moment.
    pub fn is_quiet(&self) {
        let came = self.try_next();
        assert!(came.is_none(), "a frame came: {came:?}");
    }

    /// The last frame of a request that was cancelled.
    pub fn chunk_end(&self, to: &Got) {
        self.send(to, Kind::Error, flag::FIN, Fault::Cancelled as u32, b"");
    }

    /// Leaves everything from now on in the socket.
    pub fn stop_reading(&self) {
        self.reading.store(false, Ordering::SeqCst);
    }

    pub fn go_on_reading(&self) {
        self.reading.store(true, Ordering::SeqCst);
    }

    pub fn stop_answering_pings(&self) {
        self.pongs.store(false, Ordering::SeqCst);
    }

    /// Ends every link; new ones are accepted.
    pub fn break_links(&self) {
        for (_, link) in self.links.lock().expect("unpoisoned").drain() {
            link.shutdown(Shutdown::Both).expect("an open link");
        }
    }

    /// All body bytes up to FIN, giving the window back.
    pub fn body(&self, to: &Got) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let frame = self.expect(Kind::Body);
            assert_eq!(frame.header.stream, to.header.stream);
            body.extend_from_slice(&frame.payload);
            if frame.header.has(flag::FIN) {
                return body;
            }
            self.send(to, Kind::Window, 0, frame.payload.len() as u32, b"");
        }
    }

    pub fn write(&self, link: u32, header: Header, payload: &[u8]) {
        let mut out = BytesMut::new();
        put(&mut out, header, &[payload]);
        let mut socket = &self.links.lock().expect("unpoisoned")[&link];
        socket.write_all(&out).expect("the proxy reads");
    }

    pub fn send(&self, to: &Got, kind: Kind, flags: u8, aux: u32, payload: &[u8]) {
        self.write(to.link, Header::new(kind, to.header.stream).with(flags).aux(aux), payload);
    }

    pub fn head(&self, to: &Got, status: u32, headers: &[(&str, &str)], flags: u8, body: &[u8]) {
        let mut payload = BytesMut::new();
        put_response_head(&mut payload, headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
        payload.extend_from_slice(body);
        self.send(to, Kind::Response, flags, status, &payload);
    }

    /// A whole response.
    pub fn answer(&self, to: &Got, body: &str) {
        self.head(to, 200, &[("content-type", "text/plain")], flag::FIN, body.as_bytes());
    }

    pub fn chunk(&self, to: &Got, bytes: &[u8], flags: u8) {
        self.send(to, Kind::Chunk, flags, 0, bytes);
    }

    /// Dies: nobody listens, every link ends.
    pub fn kill(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        self.listener = None;
        for (_, link) in self.links.lock().expect("unpoisoned").drain() {
            // The proxy may have closed it first.
            let _ = link.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.kill();
    }
}

fn read(
    mut link: UnixStream,
    number: u32,
    id: &str,
    max_ongoing: u32,
    frames: &Sender<(u32, Frame)>,
    known: &Links,
    (go_on, pong): (&AtomicBool, &AtomicBool),
) -> Option<()> {
    let token: Vec<u8> = (0..16).map(|i| i * 0x11).collect();
    let (mut callee, mut trusted, mut out) = (Callee::default(), false, BytesMut::new());
    let (mut buf, mut decoder, mut chunk) = (BytesMut::new(), Decoder::new(MAX_PAYLOAD), vec![0; 64 * 1024]);
    loop {
        if !go_on.load(Ordering::SeqCst) {
            std::thread::sleep(MOMENT);
            continue;
        }
        // The bound lets a reader notice that it is to stop; at that moment nothing is under way.
        link.set_read_timeout(Some(MOMENT)).ok()?;
        let n = match link.read(&mut chunk) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            read => read.ok().filter(|&n| n > 0)?,
        };
        buf.extend_from_slice(&chunk[..n]);
        while let Some(frame) = decoder.next(&mut buf).expect("the proxy's frames are valid") {
            if trusted && frame.header.kind == Kind::Ping {
                if pong.load(Ordering::SeqCst) {
                    put(&mut out, Header::new(Kind::Pong, 0), &[]);
                    link.write_all(&out).ok()?;
                    out.clear();
                }
                continue;
            }
            if trusted {
                let payload = Bytes::copy_from_slice(&frame.payload);
                frames.send((number, Frame { payload, ..frame })).ok()?;
                continue;
            }
            let step = callee.feed(&frame, &token, id, max_ongoing, &mut out).expect("the proxy knows the token");
            if matches!(step, Step::Done(_)) {
                trusted = true;
                known.lock().expect("unpoisoned").insert(number, link.try_clone().expect("a descriptor"));
            }
            link.write_all(&out).ok()?;
            out.clear();
        }
    }
}
