//! Copies of a share of the requests: whatever becomes of them, clients do not notice, and it is counted.

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use rayserve_dataplane::wire::{Fault, Header, Kind, flag};
use serde_json::{Value, json};
use support::{Client, Replica, Served, auto::Auto, eventually, replica::Got};

/// Copies of one shadow on one shard, as `proxy/shadow.rs` has it.
const OPEN: u64 = 256;

fn shadowed(share: f64) -> Value {
    json!({"targets": [{"name": "a", "deployment": "a#D", "weight": 1.0}],
        "shadows": [{"name": "c", "deployment": "c#D", "share": share}]})
}

/// A proxy, a target that answers, and a shadow that does what the test says.
fn serve(share: f64, config: Value) -> (Served, Auto, Replica) {
    let served = Served::empty(config);
    let (a, c) = (Auto::start(served.dir.path(), "a", 100), Replica::start(served.dir.path(), "c", 5));
    let deployments =
        [("a", json!({"max_ongoing_requests": 100}), vec![a.address.clone()]), ("c", json!({}), vec![c.address()])];
    served.publish_split(&shadowed(share), &deployments);
    served.linked_ids(&["a", "c"]);
    (served, a, c)
}

fn ask(client: &mut Client, count: usize) {
    for _ in 0..count {
        client.get("/x");
        assert_eq!(client.response().text(), "a");
    }
}

#[test]
fn a_copy_is_the_request_and_its_answer_is_thrown_away() {
    let (served, _a, c) = serve(1.0, json!({}));
    let mut client = served.client();
    client.send("POST /x/y?q=1 HTTP/1.1\r\nhost: h\r\nx-a: 1\r\nx-request-id: mine\r\ncontent-length: 4\r\n\r\nbody");
    assert_eq!(client.response().text(), "a");
    let got = c.request();
    let head = &got.head;
    assert_eq!(
        (head.method(), head.path(), head.query(), head.root_path()),
        (&b"POST"[..], &b"/x/y"[..], &b"q=1"[..], &b"/x"[..])
    );
    assert_eq!((head.request_id(), &head.body()[..], got.is_whole()), (&b"mine"[..], &b"body"[..], true));
    assert_eq!(&got.headers()["x-a"][..], b"1");
    // A large answer is read to its end, and the window given back.
    c.head(&got, 200, &[], 0, b"");
    for _ in 0..4 {
        c.chunk(&got, &vec![0; 32 * 1024], 0);
    }
    assert_eq!(c.expect(Kind::Window).header.aux, 128 * 1024);
    c.chunk(&got, b"", flag::FIN);
    served.counts("shadows", "c", "/answered", 1);
    ask(&mut client, 1);
    let got = c.request();
    c.answer(&got, "c");
    served.counts("shadows", "c", "/answered", 2);
    served.settles("streams", 0);
}

#[test]
fn the_share_is_exact_and_goes_on_over_snapshots() {
    let served = Served::empty(json!({}));
    let copies = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&copies);
    let a = Auto::start(served.dir.path(), "a", 5);
    let c = Auto::with(served.dir.path(), "c", 5, move |replica, got| {
        counted.fetch_add(1, Ordering::SeqCst);
        replica.answer(got, "c");
    });
    let publish = |share| {
        let deployments = [("a", json!({}), vec![a.address.clone()]), ("c", json!({}), vec![c.address.clone()])];
        served.publish_split(&shadowed(share), &deployments);
    };
    publish(0.1);
    served.linked_ids(&["a", "c"]);
    let mut client = served.client();
    for _ in 0..20 {
        ask(&mut client, 5);
        publish(0.1);
    }
    served.counts("shadows", "c", "/answered", 10);
    publish(0.0);
    ask(&mut client, 20);
    served.counts("shadows", "c", "/copied", 10);
    assert_eq!(copies.load(Ordering::SeqCst), 10);
}

#[test]
fn a_shadow_that_hangs_is_given_up_and_costs_clients_nothing_and_a_bounded_number_of_copies() {
    let (served, _a, c) = serve(1.0, json!({}));
    let mut client = served.client();
    // 5 at the replica, the others wait for its slots; beyond that they are dropped.
    ask(&mut client, OPEN as usize + 20);
    served.counts("shadows", "c", "/copied", 5);
    served.counts("shadows", "c", "/dropped/in_flight", 20);
    assert_eq!(served.traffic("targets", "a")["errors"], 0);
    let got: Vec<_> = (0..5).map(|_| c.request()).collect();
    // It comes to itself: what waited follows.
    c.answer(&got[0], "");
    served.counts("shadows", "c", "/copied", 6);
    ask(&mut client, 1);
    served.counts("shadows", "c", "/dropped/in_flight", 20);
}

#[test]
fn a_copy_has_no_more_time_than_its_request() {
    let (served, _a, c) = serve(1.0, json!({"request_timeout_s": 1.0}));
    let mut client = served.client();
    ask(&mut client, 7);
    let got: Vec<_> = (0..5).map(|_| c.request()).collect();
    assert!(got.iter().all(|got| (1..=1000).contains(&got.header.aux)));
    for _ in 0..5 {
        c.expect(Kind::Cancel);
    }
    served.counts("shadows", "c", "/dropped/timeout", 7);
    // Their slots stay taken until it says so: it gets nothing more.
    ask(&mut client, 1);
    c.is_quiet();
    for got in &got {
        c.chunk_end(got);
    }
    c.request();
}

#[test]
fn a_shadow_without_a_replica_or_with_a_full_queue_gets_nothing() {
    let (served, a, mut c) = serve(1.0, json!({}));
    let mut client = served.client();
    let limited = json!({"max_ongoing_requests": 1, "max_queued_requests": 1});
    let publish = |addresses| {
        let deployments = [("a", json!({}), vec![a.address.clone()]), ("c", limited.clone(), addresses)];
        served.publish_split(&shadowed(1.0), &deployments);
    };
    publish(vec![c.address()]);
    ask(&mut client, 1);
    c.request();
    eventually(
        "the limit is applied",
        || {
            ask(&mut client, 1);
            served.traffic("shadows", "c")["dropped"]["refused"] != 0
        },
        || served.proxy.traffic(),
    );
    c.kill();
    served.settles("links", 1);
    let before = served.traffic("shadows", "c")["dropped"]["not_ready"].as_u64().expect("a number");
    ask(&mut client, 3);
    served.counts("shadows", "c", "/dropped/not_ready", before + 3);
    publish(vec![]);
    ask(&mut client, 1);
    served.counts("shadows", "c", "/dropped/not_ready", before + 4);
}

#[test]
fn what_fails_at_the_shadow_is_an_error_there_and_nowhere_else() {
    let (served, _a, c) = serve(1.0, json!({}));
    let mut client = served.client();
    ask(&mut client, 3);
    let got: Vec<_> = (0..3).map(|_| c.request()).collect();
    c.head(&got[0], 500, &[], flag::FIN, b"");
    c.send(&got[1], Kind::Error, flag::FIN, Fault::User as u32, b"");
    c.head(&got[2], 200, &[], 0, b"part");
    served.counts("shadows", "c", "/errors", 2);
    c.break_links();
    served.counts("shadows", "c", "/errors", 3);
    assert_eq!(served.counter("errors"), 0);
    let target = served.traffic("targets", "a");
    assert_eq!((&target["errors"], &target["requests"]), (&json!(0), &json!(3)));
}

/// The same with a target that does what the test says, too.
fn serve_uploads(shadow: Value) -> (Served, Replica, Replica) {
    let served = Served::empty(json!({}));
    let (a, c) = (Replica::start(served.dir.path(), "a", 5), Replica::start(served.dir.path(), "c", 5));
    served.publish_split(&shadowed(1.0), &[("a", json!({}), vec![a.address()]), ("c", shadow, vec![c.address()])]);
    served.linked(&[&a, &c]);
    (served, a, c)
}

/// The target takes a request with its whole body, and the client has its answer.
fn taken(client: &mut Client, a: &Replica, got: &Got) -> Vec<u8> {
    let body = a.body(got);
    a.answer(got, "");
    assert_eq!(client.response().status, 200);
    body
}

#[test]
fn a_large_body_is_copied_when_it_has_come() {
    let (served, a, c) = serve_uploads(json!({}));
    let mut client = served.client();
    let body: Vec<_> = (0..2_000_000_u32).map(|i| i as u8).collect();
    client.post("/x", &body);
    let got = a.request();
    c.is_quiet();
    assert!(taken(&mut client, &a, &got) == body);
    let copy = c.request();
    assert!(!copy.is_whole());
    assert_eq!(copy.headers()["content-length"], b"2000000");
    assert!(c.body(&copy) == body);
    c.answer(&copy, "");
    served.counts("shadows", "c", "/answered", 1);
    served.settles("streams", 0);
}

#[test]
fn a_body_of_unknown_length_travels_in_the_copy_s_request_if_it_is_small() {
    let (served, a, c) = serve_uploads(json!({}));
    let mut client = served.client();
    client.send("POST /x HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n");
    client.chunk(&[1; 8192]);
    let got = a.request();
    client.chunk(&[2; 8192]);
    client.send("0\r\n\r\n");
    let body = taken(&mut client, &a, &got);
    let copy = c.request();
    assert_eq!((copy.is_whole(), &copy.head.body()[..]), (true, &body[..]));
    c.answer(&copy, "");
    served.counts("shadows", "c", "/answered", 1);
}

#[test]
fn the_copy_of_an_upload_goes_elsewhere_if_it_comes_back() {
    let (served, a, c) = serve_uploads(json!({}));
    let mut client = served.client();
    client.post("/x", &vec![3; 100_000]);
    let got = a.request();
    taken(&mut client, &a, &got);
    let copy = c.request();
    assert_eq!(c.body(&copy).len(), 100_000);
    c.send(&copy, Kind::Busy, flag::FIN, 0, b"");
    c.write(copy.link, Header::new(Kind::Credit, 0).aux(1), b"");
    let copy = c.request();
    assert_eq!(c.body(&copy).len(), 100_000);
    c.answer(&copy, "");
    served.counts("shadows", "c", "/answered", 1);
}

#[test]
fn a_batched_shadow_has_its_uploads_too() {
    let (served, a, c) = serve_uploads(batched());
    let mut client = served.client();
    client.post("/x", &vec![3; 100_000]);
    let got = a.request();
    taken(&mut client, &a, &got);
    let batch = c.batch();
    assert_eq!(c.body(&batch[0]).len(), 100_000);
    c.answer(&batch[0], "c");
    served.counts("shadows", "c", "/answered", 1);
}

#[test]
fn a_body_that_does_not_come_to_its_end_is_not_copied() {
    let (served, a, c) = serve_uploads(json!({}));
    let mut client = served.client();
    client.send("POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 100000\r\n\r\nbeginning");
    let got = a.request();
    drop(client);
    served.counts("shadows", "c", "/dropped/body", 1);
    a.chunk_end(&got);
    c.is_quiet();
    served.settles("streams", 0);
}

#[test]
fn a_body_that_the_target_does_not_want_is_not_copied() {
    let (served, a, c) = serve_uploads(json!({}));
    let mut client = served.client();
    client.send("POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 100000\r\n\r\n");
    let got = a.request();
    a.answer(&got, "enough");
    assert_eq!(client.response().text(), "enough");
    served.counts("shadows", "c", "/dropped/body", 1);
    c.is_quiet();
}

#[test]
fn a_body_that_is_too_large_to_be_kept_is_not_copied() {
    let (served, a, c) = serve_uploads(json!({}));
    let mut client = served.client();
    client.send("POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 17000000\r\n\r\n");
    let got = a.request();
    served.counts("shadows", "c", "/dropped/bytes", 1);
    a.answer(&got, "");
    assert_eq!(client.response().status, 200);
    c.is_quiet();
}

#[test]
fn copies_hold_a_bounded_number_of_bytes() {
    let (served, _a, _c) = serve(1.0, json!({"max_head_bytes": 400_000}));
    let mut client = served.client();
    // Large heads count too: 200 of 160 KiB would be 32 MiB.
    let head = format!("x-large: {}\r\n", "x".repeat(100_000));
    for _ in 0..200 {
        client
            .send(format!("POST /x HTTP/1.1\r\nhost: h\r\n{head}content-length: 60000\r\n\r\n{}", "y".repeat(60_000)));
        assert_eq!(client.response().text(), "a");
    }
    let dropped = served.traffic("shadows", "c")["dropped"]["bytes"].as_u64().expect("a number");
    assert!((90..=110).contains(&dropped), "{dropped}");
}

#[test]
fn a_shadow_that_does_not_read_its_socket_slows_nobody() {
    let (served, _a, c) = serve(1.0, json!({}));
    c.stop_reading();
    let mut client = served.client();
    // In one write: a client that sends the body after the head waits for an acknowledgement in between.
    let request = format!("POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 60000\r\n\r\n{}", "y".repeat(60_000));
    for _ in 0..300 {
        client.send(&request);
        assert_eq!(client.response().text(), "a");
    }
    served.counts("targets", "a", "/requests", 300);
    let open = 300
        - served.traffic("shadows", "c")["dropped"]
            .as_object()
            .expect("reasons")
            .values()
            .filter_map(Value::as_u64)
            .sum::<u64>();
    assert!(open <= OPEN, "{open}");
}

fn batched() -> Value {
    json!({"batch": {"max_size": 4, "wait_s": 0.0, "concurrent": 1}})
}

#[test]
fn the_shadow_of_a_batched_target_has_its_copy_while_the_client_still_waits() {
    let served = Served::empty(json!({}));
    let (a, c) = (Replica::start(served.dir.path(), "a", 5), Replica::start(served.dir.path(), "c", 5));
    served.publish_split(&shadowed(1.0), &[("a", batched(), vec![a.address()]), ("c", json!({}), vec![c.address()])]);
    served.linked_ids(&["a", "c"]);
    let mut client = served.client();
    client.get("/x");
    let batch = a.batch();
    let copy = c.request();
    c.answer(&copy, "c");
    served.counts("shadows", "c", "/answered", 1);
    a.answer(&batch[0], "a");
    assert_eq!(client.response().text(), "a");
}

#[test]
fn a_copy_for_a_batched_shadow_counts_when_it_is_sent() {
    let served = Served::empty(json!({}));
    let (a, c) = (Auto::start(served.dir.path(), "a", 5), Replica::start(served.dir.path(), "c", 5));
    let deployments = [("a", json!({}), vec![a.address.clone()]), ("c", batched(), vec![c.address()])];
    served.publish_split(&shadowed(1.0), &deployments);
    served.linked_ids(&["a", "c"]);
    ask(&mut served.client(), 1);
    let batch = c.batch();
    served.counts("shadows", "c", "/copied", 1);
    served.counts("shadows", "c", "/answered", 0);
    c.answer(&batch[0], "c");
    served.counts("shadows", "c", "/answered", 1);
}
