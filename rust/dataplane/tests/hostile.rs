//! Bad input and bad luck: each gets its status or a closed connection, nothing else is disturbed, nothing stays behind.
//!
//! One process, one test: it counts the process's descriptors.

mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use rayserve_dataplane::wire::{Kind, flag};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use support::{Client, Served, eventually, replica::Replica};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// What was sent and the status that has to come; none: the connection just ends.
fn malformed() -> Vec<(Vec<u8>, Option<u16>)> {
    let long = |n: usize| "a".repeat(n);
    let many = "x-many: 1\r\n".repeat(200);
    let texts = [
        ("\r\n\r\n\r\nnonsense\r\n\r\n".to_owned(), Some(400)),
        ("GET / HTTP/9.9\r\nhost: h\r\n\r\n".to_owned(), Some(400)),
        ("GET /\x01 HTTP/1.1\r\nhost: h\r\n\r\n".to_owned(), Some(400)),
        ("GET / HTTP/1.1\r\nbad header\r\n\r\n".to_owned(), Some(400)),
        ("GET / HTTP/1.1\r\nx: \x00\r\n\r\n".to_owned(), Some(400)),
        ("POST / HTTP/1.1\r\ncontent-length: nine\r\n\r\n".to_owned(), Some(400)),
        ("POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".to_owned(), Some(400)),
        ("POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n".to_owned(), Some(400)),
        (format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", long(70_000)), Some(431)),
        (format!("GET / HTTP/1.1\r\n{many}\r\n"), Some(431)),
        (format!("GET /{} HTTP/1.1\r\nhost: h\r\n\r\n", long(66_000)), Some(431)),
        (long(200_000), None),
    ];
    let mut all: Vec<_> = texts.into_iter().map(|(text, status)| (text.into_bytes(), status)).collect();
    all.push((vec![0xff; 3000], Some(400)));
    all.push((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), Some(400)));
    all.push((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), None));
    all
}

fn malformed_requests_get_their_status_or_an_end(served: &Served) {
    for (bytes, status) in malformed() {
        let mut socket = TcpStream::connect(served.address).expect("the proxy listens");
        socket.set_read_timeout(Some(support::PATIENCE)).expect("a timeout");
        // The proxy may have closed before all was written.
        let _ = socket.write_all(&bytes);
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
        let line = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
        match status {
            Some(status) => assert_eq!(line, format!("HTTP/1.1 {status}"), "{shown:?}"),
            None => assert!(line.is_empty() || line.starts_with("HTTP/1.1 4"), "{shown:?}: {line}"),
        }
    }
}

/// Parts of requests, from clients that then leave, close one half, or reset.
fn clients_leave_everywhere(served: &Served, replica: &Replica) {
    let request = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    for cut in 1..request.len() {
        let mut client = served.client();
        client.send(&request[..cut]);
        if cut % 3 == 0 {
            socket2::SockRef::from(&client.socket).set_linger(Some(Duration::ZERO)).expect("a socket option");
            drop(client);
        } else if cut % 3 == 1 {
            client.hang_up();
        } else {
            client.socket.shutdown(std::net::Shutdown::Write).expect("an open socket");
            client.rest();
        }
    }
    // Those that had begun are cancelled or whole; the replica has the last word on each.
    while let Some((link, frame)) = replica.try_next() {
        if frame.header.kind == Kind::Request {
            let header = rayserve_dataplane::wire::Header::new(Kind::Error, frame.header.stream).with(flag::FIN).aux(4);
            replica.write(link, header, b"");
        }
    }
}

fn bad_chunks_cancel_the_request(served: &Served, replica: &Replica) {
    let mut client = served.client();
    client.send("POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n");
    let got = replica.request();
    client.rest();
    while replica.next().1.header.kind != Kind::Cancel {}
    replica.chunk_end(&got);
}

fn accepting_survives_the_lack_of_descriptors(served: &Served) {
    let limit = getrlimit(Resource::Nofile);
    let few = Rlimit { current: Some(descriptors() as u64 + 8), maximum: limit.maximum };
    setrlimit(Resource::Nofile, few).expect("a lower limit");
    let mut clients = Vec::new();
    // The process holds both ends; the kernel completes connections that the proxy cannot accept.
    while let Ok(socket) = TcpStream::connect(served.address) {
        clients.push(socket);
    }
    eventually("accepting failed", || served.counter("accept_errors") > 0, String::new);
    drop(clients);
    setrlimit(Resource::Nofile, limit).expect("the old limit");
    let mut client = served.client();
    client.get("/-/healthz");
    assert_eq!(client.response().status, 200);
}

fn a_request_works(client: &mut Client, replica: &Replica) {
    client.get("/");
    let got = replica.request();
    replica.answer(&got, "fine");
    assert_eq!(client.response().text(), "fine");
}

#[test]
fn a_storm_of_bad_input_disturbs_nobody_and_leaves_nothing() {
    let (served, replicas) = Served::with(json!({}), json!({"max_ongoing_requests": 1000}), 1);
    let replica = &replicas[0];
    let mut bystander = served.client();
    a_request_works(&mut bystander, replica);
    let before = descriptors();
    malformed_requests_get_their_status_or_an_end(&served);
    clients_leave_everywhere(&served, replica);
    bad_chunks_cancel_the_request(&served, replica);
    accepting_survives_the_lack_of_descriptors(&served);
    a_request_works(&mut bystander, replica);
    served.settles("connections", 1);
    served.settles("streams", 0);
    served.settles("requests_open", 0);
    eventually("descriptors are given back", || descriptors() == before, || format!("{before} {}", descriptors()));
    assert_eq!((served.counter("panics"), served.counter("links_lost")), (0, 0));
    drop(bystander);
    served.settles("connections", 0);
}
