//! A proxy and a replica without Python, to load with an HTTP client and to count what the relay path costs.
//!
//! `noop replica SOCKET` answers every request with two bytes, many frames a system call. `noop proxy PORT SOCKET [SHARDS]`
//! serves it at `/`, and prints its counters when standard input ends.

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use rayserve_dataplane::{
    proxy::{Config, Proxy},
    wire::{
        Decoder, Header, Kind, MAX_PAYLOAD, flag,
        frame::put_with,
        head::put_response_head,
        hello::{Callee, Step},
    },
};

const TOKEN: &str = "00112233445566778899aabbccddeeff";
const MAX_ONGOING: u32 = 100;

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
            "token": "{TOKEN}", "snapshot_path": null}}"#
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
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let n = link.read(&mut chunk)?;
        if n == 0 {
            return Ok(());
        }
        buf.extend_from_slice(&chunk[..n]);
        while let Some(frame) = decoder.next(&mut buf)? {
            if !trusted {
                trusted = matches!(callee.feed(&frame, &token, "r", MAX_ONGOING, &mut out)?, Step::Done(_));
            } else if frame.header.kind == Kind::Request {
                let header = Header::new(Kind::Response, frame.header.stream).with(flag::FIN | flag::FAST).aux(200);
                put_with(&mut out, header, |out| {
                    put_response_head(out, [(&b"content-type"[..], &b"text/plain"[..])].into_iter());
                    out.extend_from_slice(b"ok");
                });
            }
        }
        link.write_all(&out)?;
        out.advance(out.len());
    }
}
