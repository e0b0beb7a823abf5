//! Clients that leave and deadlines that pass: who is told, and when the slot comes back.

mod support;

use rayserve_dataplane::wire::{BODY_WINDOW, Kind, flag};
use serde_json::json;
use support::{Client, Served};

#[test]
fn a_client_that_leaves_cancels_its_request_and_the_slot_comes_back_with_the_replicas_last_word() {
    let (served, replicas) = Served::with(json!({}), json!({"max_ongoing_requests": 1}), 1);
    let replica = &replicas[0];
    let (mut leaving, mut next) = (served.client(), served.client());
    leaving.get("/1");
    let first = replica.request();
    next.get("/2");
    served.settles("queued", 1);
    leaving.hang_up();
    assert_eq!(replica.expect(Kind::Cancel).header.stream, first.header.stream);
    replica.is_quiet();
    replica.chunk_end(&first);
    let second = replica.request();
    replica.answer(&second, "second");
    assert_eq!(next.response().text(), "second");
    served.settles("streams", 0);
}

#[test]
fn a_client_that_leaves_the_queue_is_never_sent() {
    let (served, replicas) = Served::with(json!({}), json!({"max_ongoing_requests": 1}), 1);
    let (mut first, mut leaving, mut last) = (served.client(), served.client(), served.client());
    first.get("/1");
    let got = replicas[0].request();
    leaving.get("/2");
    served.settles("queued", 1);
    last.get("/3");
    served.settles("queued", 2);
    leaving.hang_up();
    served.settles("requests_open", 2);
    replicas[0].answer(&got, "");
    let got = replicas[0].request();
    assert_eq!(got.head.path(), b"/3");
}

#[test]
fn a_client_may_ask_not_to_be_cancelled() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("GET / HTTP/1.1\r\nhost: h\r\nx-request-disconnect-disabled: ?1\r\n\r\n");
    let got = replica.request();
    client.hang_up();
    served.settles("connections", 0);
    assert!(replica.expect(Kind::Window).header.has(flag::LEFT));
    replica.answer(&got, "nobody reads this");
    served.settles("streams", 0);
    assert_eq!(served.counter("cancelled"), 0);
}

#[test]
fn a_replica_is_told_that_a_client_has_left_wherever_its_request_is_then() {
    let (served, replicas) = Served::with(json!({}), json!({"max_ongoing_requests": 1}), 1);
    let replica = &replicas[0];
    let start = |method: &str| {
        let mut client = served.client();
        client.send(format!("{method} / HTTP/1.1\r\nhost: h\r\nx-request-disconnect-disabled: ?1\r\n\r\n"));
        client
    };
    let streaming = |client: &mut Client| {
        let got = replica.request();
        replica.head(&got, 200, &[], 0, b"part");
        assert_eq!(client.head().status, 200);
        got
    };
    // Within its answer, and before it has a replica.
    let mut client = start("GET");
    let first = streaming(&mut client);
    let queued = start("GET");
    served.settles("queued", 1);
    queued.hang_up();
    client.hang_up();
    let told = replica.expect(Kind::Window).header;
    assert!(told.has(flag::LEFT) && told.stream == first.header.stream);
    served.settles("connections", 0);
    replica.chunk_end(&first);
    let second = replica.request();
    let told = replica.expect(Kind::Window).header;
    assert!(told.has(flag::LEFT) && told.stream == second.header.stream);
    replica.answer(&second, "");
    // A client that is still there has not left: neither with its answer nor when it gets no body of it.
    let mut client = start("GET");
    let got = streaming(&mut client);
    replica.chunk(&got, b"", flag::FIN);
    while !client.next_chunk().is_empty() {}
    let mut client = start("HEAD");
    let got = streaming(&mut client);
    client.get("/next");
    let given_back = replica.expect(Kind::Window).header;
    assert!(!given_back.has(flag::LEFT) && given_back.aux == 4);
    replica.chunk(&got, b"", flag::FIN);
    let got = replica.request();
    replica.answer(&got, "");
    assert_eq!(client.response().status, 200);
    assert_eq!((served.counter("cancelled"), served.counter("streams")), (0, 0));
}

#[test]
fn it_is_told_so_of_a_request_of_a_batch_while_that_runs() {
    let batched = json!({"batch": {"max_size": 2, "wait_s": 30.0}});
    let (served, replicas) = Served::with(json!({}), batched, 1);
    let replica = &replicas[0];
    let (mut stays, mut leaves) = (served.client(), served.client());
    stays.get("/stays");
    served.settles("queued", 1);
    leaves.send("GET /leaves HTTP/1.1\r\nhost: h\r\nx-request-disconnect-disabled: ?1\r\n\r\n");
    let batch = replica.batch();
    leaves.hang_up();
    let told = replica.expect(Kind::Window).header;
    assert!(told.has(flag::LEFT) && told.stream == batch[1].header.stream);
    for got in &batch {
        replica.answer(got, "");
    }
    assert_eq!(stays.response().status, 200);
    served.settles("streams", 0);
}

#[test]
fn a_client_that_leaves_within_its_body_cancels_the_request() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 100000\r\n\r\npart");
    let got = replica.request();
    replica.expect(Kind::Body);
    client.hang_up();
    replica.expect(Kind::Cancel);
    replica.chunk_end(&got);
    served.settles("streams", 0);
}

#[test]
fn a_late_handler_is_answered_408_and_cancelled() {
    let (served, replicas) = Served::with(json!({"request_timeout_s": 1.0}), json!({}), 1);
    let mut client = served.client();
    client.send("GET / HTTP/1.1\r\nhost: h\r\nx-request-id: r7\r\n\r\n");
    let got = replicas[0].request();
    assert!((1..=1000).contains(&got.header.aux), "remaining time travels: {}", got.header.aux);
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (408, "Request r7 timed out after 1.0s."));
    replicas[0].expect(Kind::Cancel);
    replicas[0].chunk_end(&got);
    served.settles("streams", 0);
    client.get("/again");
    let got = replicas[0].request();
    replicas[0].answer(&got, "on the same connection");
    assert_eq!(client.response().status, 200);
}

#[test]
fn the_deadline_covers_the_queue() {
    let (served, _) = Served::with(json!({"request_timeout_s": 0.1}), json!({}), 0);
    let mut client = served.client();
    client.get("/");
    assert_eq!(client.response().status, 408);
    served.settles("requests_open", 0);
}

#[test]
fn a_request_may_choose_its_own_deadline() {
    let (served, replicas) = Served::with(json!({"request_timeout_s": 1.0}), json!({}), 1);
    let ask = |seconds: &str| {
        let mut client = served.client();
        client.send(format!("GET / HTTP/1.1\r\nhost: h\r\nx-request-timeout-seconds: {seconds}\r\n\r\n"));
        (client, replicas[0].request())
    };
    let (_longer, got) = ask("100");
    assert!(got.header.aux > 90_000);
    let (_none, got) = ask("0");
    assert_eq!(got.header.aux, 0);
    let (mut malformed, got) = ask("soon");
    assert!((1..=1000).contains(&got.header.aux));
    assert_eq!(malformed.response().status, 408);
}

#[test]
fn a_deadline_after_the_head_cuts_the_answer() {
    let (served, replicas) = Served::with(json!({"request_timeout_s": 1.0}), json!({}), 1);
    let mut client = served.client();
    client.get("/");
    let got = replicas[0].request();
    replicas[0].head(&got, 200, &[], 0, b"begun");
    assert_eq!(client.head().status, 200);
    assert_eq!(client.next_chunk(), b"begun");
    assert!(client.is_closed(), "without the last chunk");
    replicas[0].expect(Kind::Cancel);
}

#[test]
fn a_handler_goes_on_when_its_client_has_all_that_it_declared() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    for (length, first, rest) in [("2", "", "hi"), ("2", "hi", ""), ("2", "h", "i"), ("0", "", "")] {
        client.get("/");
        let got = replica.request();
        replica.head(&got, 200, &[("content-length", length)], 0, first.as_bytes());
        if !rest.is_empty() {
            replica.chunk(&got, rest.as_bytes(), 0);
        }
        assert_eq!(client.response().text(), format!("{first}{rest}"));
        served.settles("requests_open", 0);
        replica.is_quiet();
        replica.chunk(&got, b"", flag::FIN);
        served.settles("streams", 0);
    }
    client.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[("content-length", "2")], 0, b"hi");
    assert_eq!(client.response().text(), "hi");
    client.hang_up();
    served.settles("connections", 0);
    replica.is_quiet();
    replica.chunk(&got, b"", flag::FIN);
    served.settles("streams", 0);
    assert_eq!(served.counter("cancelled"), 0);
}

#[test]
fn a_handler_that_sends_more_than_it_declared_is_cancelled() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[("content-length", "2")], 0, b"hi");
    assert_eq!(client.response().text(), "hi");
    served.settles("requests_open", 0);
    replica.chunk(&got, b"more", 0);
    replica.expect(Kind::Cancel);
    replica.expect(Kind::Window);
    replica.chunk_end(&got);
    served.settles("streams", 0);
}

#[test]
fn a_deadline_ends_what_goes_on_without_its_client_too() {
    let (served, replicas) = Served::with(json!({"request_timeout_s": 0.3}), json!({}), 1);
    let replica = &replicas[0];
    for method in ["HEAD", "GET"] {
        let mut client = served.client();
        client.send(format!("{method} / HTTP/1.1\r\nhost: h\r\nx-request-disconnect-disabled: ?1\r\n\r\n"));
        let got = replica.request();
        replica.head(&got, 200, &[], 0, b"without end");
        assert_eq!(client.head().status, 200);
        if method == "GET" {
            client.hang_up();
        }
        replica.expect(Kind::Window);
        assert_eq!(replica.expect(Kind::Cancel).header.stream, got.header.stream);
        replica.chunk_end(&got);
        served.settles("streams", 0);
    }
}

#[test]
fn an_upload_goes_on_behind_an_answer_without_a_body() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    let length = 2 * BODY_WINDOW as usize;
    let sending = std::thread::spawn(move || {
        client.post("/", &vec![0; length]);
        client
    });
    let got = replica.request();
    let mut came = 0;
    while came < BODY_WINDOW as usize {
        came += replica.expect(Kind::Body).payload.len();
    }
    replica.head(&got, 204, &[], 0, b"");
    replica.is_quiet();
    replica.send(&got, Kind::Window, 0, BODY_WINDOW, b"");
    assert_eq!(came + replica.body(&got).len(), length);
    replica.chunk(&got, b"", flag::FIN);
    assert_eq!(sending.join().expect("it is read").head().status, 204);
    served.settles("streams", 0);
}
