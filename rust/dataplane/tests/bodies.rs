//! Bodies in both directions: inline, chunked, larger than the window, and both at once.

mod support;

use rayserve_dataplane::wire::{
    BODY_WINDOW, Header, Kind, MAX_CHUNK, MAX_INLINE, PIECE, RequestHeadView, WINDOW, flag,
};
use serde_json::json;
use support::{Client, Served, replica::Got};

fn start_chunked(client: &mut Client) {
    client.send("POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n");
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn a_small_body_travels_in_its_request_and_a_larger_one_after_it() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    for (len, inline) in [(1, true), (MAX_INLINE, true), (MAX_INLINE + 1, false)] {
        client.post("/", &pattern(len));
        let got = replica.request();
        assert_eq!(got.is_whole(), inline, "{len}");
        let body = if inline { got.head.body().to_vec() } else { replica.body(&got) };
        assert!(body == pattern(len), "{len}");
        replica.answer(&got, "");
        assert_eq!(client.response().status, 200);
    }
}

#[test]
fn a_chunked_body_reaches_the_handler_as_it_arrives() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    start_chunked(&mut client);
    let got = replica.request();
    assert!(!got.is_whole());
    for part in [&b"one"[..], b"two"] {
        client.chunk(part);
        assert_eq!(&replica.expect(Kind::Body).payload[..], part);
    }
    client.send("0\r\n\r\n");
    assert!(replica.expect(Kind::Body).header.has(flag::FIN));
    replica.answer(&got, "thanks");
    assert_eq!(client.response().text(), "thanks");
}

#[test]
fn the_answer_may_begin_before_the_request_ends() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    start_chunked(&mut client);
    let got = replica.request();
    replica.head(&got, 200, &[], 0, b"");
    assert_eq!(client.head().status, 200);
    for part in [&b"ping"[..], b"pong"] {
        client.chunk(part);
        let frame = replica.expect(Kind::Body);
        replica.chunk(&got, &frame.payload, 0);
        assert_eq!(client.next_chunk(), part);
    }
    client.send("0\r\n\r\n");
    replica.expect(Kind::Body);
    replica.chunk(&got, b"", flag::FIN);
    assert_eq!(client.next_chunk(), b"");
    served.settles("streams", 0);
}

#[test]
fn an_upload_stops_at_the_window_and_goes_on_when_it_is_given_back() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    let len = BODY_WINDOW as usize + 100_000;
    let sending = std::thread::spawn(move || {
        client.post("/", &pattern(len));
        client
    });
    let got = replica.request();
    let mut body = Vec::new();
    while body.len() < BODY_WINDOW as usize {
        let frame = replica.expect(Kind::Body);
        assert!(frame.payload.len() <= PIECE);
        body.extend_from_slice(&frame.payload);
    }
    assert_eq!(body.len(), BODY_WINDOW as usize);
    replica.is_quiet();
    replica.send(&got, Kind::Window, 0, BODY_WINDOW, b"");
    body.extend(replica.body(&got));
    assert!(body == pattern(len));
    replica.answer(&got, "");
    assert_eq!(sending.join().expect("sent").response().status, 200);
}

#[test]
fn a_large_answer_gives_window_back_as_the_client_reads() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    let body = pattern(4 * 1024 * 1024);
    let length = body.len().to_string();
    replica.head(&got, 200, &[("content-length", &length)], 0, b"");
    let expected = body.clone();
    let reading = std::thread::spawn(move || assert!(client.response().body == expected));
    let (mut room, mut rest) = (WINDOW as usize, &body[..]);
    while !rest.is_empty() {
        while room < MAX_CHUNK.min(rest.len()) {
            room += replica.expect(Kind::Window).header.aux as usize;
        }
        let (chunk, after) = rest.split_at(MAX_CHUNK.min(rest.len()));
        (room, rest) = (room - chunk.len(), after);
        replica.chunk(&got, chunk, if rest.is_empty() { flag::FIN } else { 0 });
    }
    reading.join().expect("the whole body");
}

#[test]
fn a_client_that_does_not_read_holds_the_replica_at_the_window() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[], 0, b"");
    let mut sent = 0;
    let chunk = vec![0; MAX_CHUNK];
    let mut room = WINDOW as usize;
    // What the kernel buffers between proxy and client is given back; then it ends.
    loop {
        while room >= MAX_CHUNK {
            replica.chunk(&got, &chunk, 0);
            (room, sent) = (room - MAX_CHUNK, sent + MAX_CHUNK);
        }
        match replica.try_next() {
            Some((_, frame)) => room += frame.header.aux as usize,
            None => break,
        }
        assert!(sent < 64 * 1024 * 1024, "nothing holds the replica back");
    }
    client.hang_up();
    while replica.next().1.header.kind != Kind::Cancel {}
    replica.chunk(&got, b"", flag::FIN);
    served.settles("streams", 0);
}

#[test]
fn a_small_request_stands_behind_a_bounded_part_of_large_bodies() {
    const UPLOADS: usize = 16;
    const LEN: usize = 1024 * 1024;
    let (served, replicas) = Served::with(json!({}), json!({"max_ongoing_requests": 100}), 1);
    let replica = &replicas[0];
    replica.stop_reading();
    let uploads: Vec<_> = (0..UPLOADS)
        .map(|_| {
            let mut client = served.client();
            std::thread::spawn(move || {
                client.post("/", &pattern(LEN));
                assert_eq!(client.response().text(), "done");
            })
        })
        .collect();
    served.settles("streams", UPLOADS as u64);
    let mut client = served.client();
    client.get("/small");
    served.settles("streams", UPLOADS as u64 + 1);
    replica.go_on_reading();
    let (mut body, mut before, mut small, mut finished) = (0, 0, None, 0);
    let mut requests = std::collections::HashMap::new();
    while finished < UPLOADS {
        let (link, frame) = replica.next();
        if frame.header.kind == Kind::Request {
            let head = RequestHeadView::parse(frame.payload).expect("a head");
            let got = Got { link, header: frame.header, head };
            if got.head.path() == b"/small" {
                (before, small) = (body, Some(got));
            } else {
                requests.insert(got.header.stream, got);
            }
            continue;
        }
        assert_eq!(frame.header.kind, Kind::Body);
        body += frame.payload.len();
        let upload = &requests[&frame.header.stream];
        if frame.header.has(flag::FIN) {
            replica.answer(upload, "done");
            finished += 1;
        } else {
            replica.send(upload, Kind::Window, 0, frame.payload.len() as u32, b"");
        }
    }
    assert_eq!(body, UPLOADS * LEN);
    assert!(before < 2 * LEN, "{before} bytes went before it");
    replica.answer(&small.expect("it came"), "small");
    assert_eq!(client.response().text(), "small");
    for upload in uploads {
        upload.join().expect("an answer");
    }
}

#[test]
fn expect_100_continue_is_answered_before_the_body() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n");
    assert_eq!(client.head().status, 100);
    let got = replica.request();
    client.send("ok");
    assert_eq!(replica.body(&got), b"ok");
    replica.answer(&got, "");
    assert_eq!(client.response().status, 200);
}

#[test]
fn a_handler_does_not_wait_for_a_small_body() {
    let (served, replica) = Served::one();
    for expect in ["", "expect: 100-continue\r\n"] {
        let mut client = served.client();
        client.send(format!("POST / HTTP/1.1\r\nhost: h\r\n{expect}content-length: 10\r\n\r\n"));
        let got = replica.request();
        assert!(!got.is_whole());
        if !expect.is_empty() {
            assert_eq!(client.head().status, 100);
        }
        replica.head(&got, 401, &[], flag::FIN, b"no");
        let response = client.response();
        assert_eq!((response.status, response.text().as_str()), (401, "no"));
        client.send("0123456789");
        client.get("/after");
        let got = replica.request();
        assert_eq!(got.head.path(), b"/after");
        replica.answer(&got, "");
        assert_eq!(client.response().status, 200);
    }
    served.settles("streams", 0);
}

#[test]
fn a_small_body_that_is_late_is_streamed_and_what_came_before_goes_first() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 10\r\n\r\n012");
    let got = replica.request();
    assert_eq!(&replica.expect(Kind::Body).payload[..], b"012");
    replica.head(&got, 200, &[], 0, b"");
    assert_eq!(client.head().status, 200);
    for part in [&b"3456"[..], b"789"] {
        client.send(part);
        assert_eq!(&replica.expect(Kind::Body).payload[..], part);
    }
    assert!(replica.expect(Kind::Body).header.has(flag::FIN));
    replica.chunk(&got, b"", flag::FIN);
    assert_eq!(client.next_chunk(), b"");
}

#[test]
fn a_late_body_that_is_refused_is_sent_once_more_from_its_beginning() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 10\r\n\r\n012");
    let got = replica.request();
    assert_eq!(&replica.expect(Kind::Body).payload[..], b"012");
    client.send("345");
    assert_eq!(&replica.expect(Kind::Body).payload[..], b"345");
    replica.send(&got, Kind::Busy, flag::FIN, 0, b"");
    replica.write(got.link, Header::new(Kind::Credit, 0).aux(1), b"");
    let got = replica.request();
    client.send("6789");
    assert_eq!(replica.body(&got), b"0123456789");
    replica.answer(&got, "");
    assert_eq!(client.response().status, 200);
}

#[test]
fn streamed_answers_arrive_item_by_item() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[("content-type", "text/event-stream")], 0, b"first");
    assert_eq!(client.head().header("transfer-encoding"), Some("chunked"));
    assert_eq!(client.next_chunk(), b"first");
    for item in ["a", "b", "c"] {
        replica.chunk(&got, item.as_bytes(), 0);
        assert_eq!(client.next_chunk(), item.as_bytes());
    }
    replica.chunk(&got, b"last", flag::FIN);
    assert_eq!((client.next_chunk(), client.next_chunk()), (b"last".to_vec(), Vec::new()));
}

#[test]
fn a_body_above_the_configured_limit_is_refused() {
    let (served, replicas) = Served::with(json!({"max_body_bytes": 100_000}), json!({}), 1);
    let mut client = served.client();
    client.send("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 100001\r\n\r\n");
    let response = client.response();
    assert_eq!((response.status, response.header("connection")), (413, Some("close")));
    replicas[0].is_quiet();
    let mut client = served.client();
    start_chunked(&mut client);
    let got = replicas[0].request();
    client.chunk(&pattern(100_001));
    assert_eq!(client.response().status, 413);
    while replicas[0].next().1.header.kind != Kind::Cancel {}
    replicas[0].chunk_end(&got);
    served.settles("streams", 0);
}

#[test]
fn an_answer_before_the_body_was_read_does_not_wait_for_it() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    start_chunked(&mut client);
    let got = replica.request();
    replica.head(&got, 401, &[], flag::FIN, b"no");
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (401, "no"));
    served.settles("streams", 0);
    served.settles("requests_open", 0);
}
