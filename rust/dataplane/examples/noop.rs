//! A proxy and a replica without Python, to load with an HTTP client and to count what the relay path costs.
//!
//! `noop replica SOCKET` answers every request with two bytes, many frames a system call, and `/big` with 1 MiB in chunks;
//! bodies of requests are read to their end first. `noop proxy PORT SOCKET [SHARDS]`
//! serves it at `/`, and prints its counters when standard input ends.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use rayserve_dataplane::{
    proxy::{Config, Proxy},
    wire::{
        Decoder, Frame, Header, Kind, MAX_CHUNK, MAX_PAYLOAD, RequestHeadView, WINDOW, flag,
        frame::put_with,
        head::put_response_head,
        hello::{Callee, Step},
        put,
    },
};

const TOKEN: &str = "00112233445566778899aabbccddeeff";
const MAX_ONGOING: u32 = 100;
const BIG: usize = 1024 * 1024;
static ZEROS: [u8; MAX_CHUNK] = [0; MAX_CHUNK];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["replica", socket] => replica(socket)?,
        ["proxy", port, socket] => proxy(port, socket, "1")?,
        ["proxy", port, socket, shards] => proxy(port, socket, shards)?,
        _ => eprintln!("noop replica SOCKET | noop proxy PORT SOCKET [SHARDS]"),
    }
    Ok(())
}

fn proxy(port: &str, socket: &str, shards: &str) -> Result<(), Box<dyn std::error::Error>> {
    let config = format!(
        r#"{{"host": "127.0.0.1", "port": {port}, "root_path": "", "request_timeout_s": null, "shards": {shards},
            "keep_alive_timeout_s": 90, "max_head_bytes": 65536, "max_body_bytes": null, "node_id": "n",
            "token": "{TOKEN}", "snapshot_path": null, "session_header": "x-session-id"}}"#
    );
    let proxy = Proxy::new(Config::parse(config.as_bytes())?);
    let address = proxy.start()?;
    let snapshot = format!(
        r#"{{"version": [1, 1], "routes": [{{"prefix": "/", "app": "default", "deployment": "default#D"}}],
            "deployments": {{"default#D": {{"app": "default", "name": "D", "max_ongoing_requests": {MAX_ONGOING},
            "replicas": [{{"id": "r", "node_id": "n", "unix": "{socket}"}}]}}}}}}"#
    );
    proxy.publish(snapshot.as_bytes())?;
    println!("{address}, missing links: {:?}", proxy.wait_linked(&["r".to_owned()], Duration::from_secs(5)));
    io::copy(&mut io::stdin(), &mut io::sink())?;
    println!("{:?}", proxy.counters());
    proxy.shutdown(Duration::from_secs(1));
    Ok(())
}

fn replica(socket: &str) -> io::Result<()> {
    // A socket file that a predecessor left would refuse the bind; that there is none is the usual case.
    let _ = std::fs::remove_file(socket);
    for link in UnixListener::bind(socket)?.incoming() {
        let link = link?;
        std::thread::spawn(move || answer(link).map_err(|error| eprintln!("link: {error}")));
    }
    Ok(())
}

fn answer(mut link: UnixStream) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let token: Vec<u8> = (0..16).map(|i| i * 0x11).collect();
    let (mut callee, mut trusted) = (Callee::default(), false);
    let (mut buf, mut out, mut decoder) = (BytesMut::new(), BytesMut::new(), Decoder::new(MAX_PAYLOAD));
    let (mut chunk, mut left) = (vec![0; 64 * 1024], HashMap::new());
    loop {
        let n = link.read(&mut chunk)?;
        if n == 0 {
            return Ok(());
        }
        buf.extend_from_slice(&chunk[..n]);
        while let Some(frame) = decoder.next(&mut buf)? {
            if trusted {
                respond(&frame, &mut left, &mut out);
            } else {
                trusted = matches!(callee.feed(&frame, &token, "r", MAX_ONGOING, &mut out)?, Step::Done(_));
            }
        }
        link.write_all(&out)?;
        out.advance(out.len());
    }
}

/// Answers one frame; `left` holds what large answers have still to send.
fn respond(frame: &Frame, left: &mut HashMap<u32, usize>, out: &mut BytesMut) {
    let Header { kind, stream, aux, .. } = frame.header;
    let head = |out: &mut BytesMut, flags, body: &[u8]| {
        put_with(out, Header::new(Kind::Response, stream).with(flags).aux(200), |out| {
            put_response_head(out, [(&b"content-type"[..], &b"text/plain"[..])].into_iter());
            out.extend_from_slice(body);
        });
    };
    match kind {
        Kind::Request if RequestHeadView::parse(frame.payload.clone()).is_ok_and(|head| head.path() == b"/big") => {
            head(out, 0, b"");
            left.insert(stream, BIG);
            chunks(stream, WINDOW as usize, left, out);
        }
        Kind::Ping => put(out, Header::new(Kind::Pong, 0).aux(aux), &[]),
        Kind::Window => chunks(stream, aux as usize, left, out),
        Kind::Cancel => drop(left.remove(&stream)),
        Kind::Body if !frame.header.has(flag::FIN) => {
            put(out, Header::new(Kind::Window, stream).aux(frame.payload.len() as u32), &[]);
        }
        Kind::Request if !frame.header.has(flag::FIN) => {}
        Kind::Request | Kind::Body => head(out, flag::FIN | flag::FAST, b"ok"),
        _ => {}
    }
}

fn chunks(stream: u32, mut room: usize, left: &mut HashMap<u32, usize>, out: &mut BytesMut) {
    let Some(rest) = left.get_mut(&stream) else { return };
    while room > 0 && *rest > 0 {
        let n = room.min(*rest).min(MAX_CHUNK);
        (room, *rest) = (room - n, *rest - n);
        let fin = if *rest == 0 { flag::FIN } else { 0 };
        put(out, Header::new(Kind::Chunk, stream).with(fin), &[&ZEROS[..n]]);
    }
    if *rest == 0 {
        left.remove(&stream);
    }
}
