//! A proxy and a replica without Python, to load with an HTTP client and to count what the relay path costs.
//!
//! `noop replica SOCKET [ID]` answers every request with two bytes, many frames a system call, and `/big` with 1 MiB in
//! chunks; bodies of requests are read to their end first. `noop proxy PORT SOCKET [SHARDS]` serves the replica `r` at `/`,
//! and prints its counters when standard input ends. `noop split PORT SHARE SOCKET...` serves several, `r0`, `r1`, ..., as
//! equal targets of `/`; with a SHARE above 0 the last of them gets copies of that share instead.

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
use serde_json::{Map, Value, json};

const TOKEN: &str = "00112233445566778899aabbccddeeff";
const MAX_ONGOING: u32 = 100;
const BIG: usize = 1024 * 1024;
static ZEROS: [u8; MAX_CHUNK] = [0; MAX_CHUNK];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["replica", socket] => replica(socket, "r")?,
        ["replica", socket, id] => replica(socket, id)?,
        ["proxy", port, socket] => proxy(port, "1", &plain(socket))?,
        ["proxy", port, socket, shards] => proxy(port, shards, &plain(socket))?,
        ["split", port, share, ref sockets @ ..] => proxy(port, "1", &split(share.parse()?, sockets))?,
        _ => eprintln!("noop replica SOCKET [ID] | proxy PORT SOCKET [SHARDS] | split PORT SHARE SOCKET..."),
    }
    Ok(())
}

fn deployment(id: &str, socket: &str) -> Value {
    json!({"app": id, "name": "D", "max_ongoing_requests": MAX_ONGOING,
        "replicas": [{"id": id, "node_id": "n", "unix": socket}]})
}

fn plain(socket: &str) -> Value {
    json!({"version": [1, 1], "routes": [{"prefix": "/", "app": "r", "deployment": "r#D"}],
        "deployments": {"r#D": deployment("r", socket)}})
}

fn split(share: f64, sockets: &[&str]) -> Value {
    let ids: Vec<_> = (0..sockets.len()).map(|at| format!("r{at}")).collect();
    let mut targets: Vec<_> = ids
        .iter()
        .map(|id| json!({"name": id, "deployment": format!("{id}#D"), "weight": 1.0, "share": share}))
        .collect();
    let shadows: Vec<_> = if share > 0.0 { targets.pop().into_iter().collect() } else { Vec::new() };
    let deployments: Map<_, _> =
        ids.iter().zip(sockets).map(|(id, socket)| (format!("{id}#D"), deployment(id, socket))).collect();
    json!({"version": [1, 1], "routes": [{"prefix": "/", "app": "r0", "deployment": "", "split": "/"}],
        "splits": {"/": {"targets": targets, "shadows": shadows}}, "deployments": deployments})
}

fn proxy(port: &str, shards: &str, snapshot: &Value) -> Result<(), Box<dyn std::error::Error>> {
    let config = format!(
        r#"{{"host": "127.0.0.1", "port": {port}, "root_path": "", "request_timeout_s": null, "shards": {shards},
            "keep_alive_timeout_s": 90, "max_head_bytes": 65536, "max_body_bytes": null, "node_id": "n",
            "token": "{TOKEN}", "snapshot_path": null, "session_header": "x-session-id", "prefer_local_node": true,
            "forwarded_allow_ips": ""}}"#
    );
    let proxy = Proxy::new(Config::parse(config.as_bytes())?);
    let address = proxy.start()?;
    proxy.publish(snapshot.to_string().as_bytes())?;
    let deployments = snapshot["deployments"].as_object().into_iter().flat_map(Map::values);
    let ids: Vec<_> = deployments.map(|it| it["app"].as_str().unwrap_or_default().to_owned()).collect();
    println!("{address}, missing links: {:?}", proxy.wait_linked(&ids, Duration::from_secs(5)));
    io::copy(&mut io::stdin(), &mut io::sink())?;
    println!("{:?}\n{}", proxy.counters(), proxy.traffic());
    proxy.shutdown(Duration::from_secs(1));
    Ok(())
}

fn replica(socket: &str, id: &str) -> io::Result<()> {
    // A socket file that a predecessor left would refuse the bind; that there is none is the usual case.
    let _ = std::fs::remove_file(socket);
    for link in UnixListener::bind(socket)?.incoming() {
        let (link, id) = (link?, id.to_owned());
        std::thread::spawn(move || answer(link, &id).map_err(|error| eprintln!("link: {error}")));
    }
    Ok(())
}

fn answer(mut link: UnixStream, id: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
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
                trusted = matches!(callee.feed(&frame, &token, id, MAX_ONGOING, &mut out)?, Step::Done(_));
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
