//! Batches as a replica sees them: what goes together, what is left out, and where each request of one ends up.

mod support;

use rayserve_dataplane::wire::{Header, Kind, MAX_INLINE, flag};
use serde_json::{Value, json};
use support::{Client, Served, replica::Got, replica::Replica};

fn batched(max_size: usize, wait_s: f64) -> Value {
    json!({"batch": {"max_size": max_size, "wait_s": wait_s, "concurrent": 1}})
}

/// A deployment whose only slot is taken by the request that comes back.
fn busy(changes: Value, deployment: Value) -> (Served, Replica, Client, Got) {
    let (served, mut replicas) = Served::with(changes, deployment, 1);
    let mut client = served.client();
    client.get("/first");
    let mut first = replicas[0].batch();
    assert_eq!(first.len(), 1, "nothing to wait for");
    (served, replicas.remove(0), client, first.remove(0))
}

fn paths(batch: &[Got]) -> Vec<String> {
    batch.iter().map(|got| String::from_utf8_lossy(got.head.path()).into_owned()).collect()
}

/// Clients whose requests wait, in the order of their paths `/0`, `/1`, ...
fn waiting(served: &Served, count: usize) -> Vec<Client> {
    (0..count)
        .map(|i| {
            let before = served.counter("queued");
            let mut client = served.client();
            client.get(&format!("/{i}"));
            served.settles("queued", before + 1);
            client
        })
        .collect()
}

#[test]
fn what_has_waited_for_a_slot_goes_together_and_each_gets_its_own_answer() {
    let (served, replica, mut first, got) = busy(json!({}), batched(3, 0.0));
    let clients = waiting(&served, 4);
    replica.is_quiet();
    replica.answer(&got, "first");
    assert_eq!(first.response().text(), "first");
    let batch = replica.batch();
    assert_eq!(paths(&batch), ["/0", "/1", "/2"]);
    for got in batch.iter().rev() {
        replica.is_quiet();
        replica.answer(got, &paths(std::slice::from_ref(got))[0]);
    }
    let last = replica.batch();
    replica.answer(&last[0], "/3");
    for (i, mut client) in clients.into_iter().enumerate() {
        assert_eq!(client.response().text(), format!("/{i}"));
    }
    let told: serde_json::Value = serde_json::from_str(&served.proxy.batches()).expect("JSON");
    let tally = &told["default#D"];
    assert_eq!((&tally["batches"], &tally["requests"]), (&json!(3), &json!(5)));
    assert_eq!(tally["released"], json!({"full": 1, "waited": 2}));
    assert_eq!(tally["size"], json!([[1, 2], [4, 1]]));
    let page = served.proxy.metrics_text();
    let labels = "application=\"default\",deployment=\"D\"";
    for line in [
        format!("ray_serve_router_batches_total{{{labels},reason=\"full\"}} 1"),
        format!("ray_serve_router_batch_size_sum{{{labels}}} 5.0"),
        format!("ray_serve_router_batch_size_bucket{{le=\"2.0\",{labels}}} 2"),
        format!("ray_serve_router_batch_wait_ms_count{{{labels}}} 3"),
    ] {
        assert!(page.lines().any(|known| known == line), "{line} in {page}");
    }
}

#[test]
fn a_batch_waits_its_window_for_others_and_no_longer() {
    let (served, replicas) = Served::with(json!({}), batched(3, 1.0), 1);
    let began = std::time::Instant::now();
    let mut clients = waiting(&served, 2);
    let batch = replicas[0].batch();
    assert!(began.elapsed().as_secs_f64() >= 1.0);
    assert_eq!(paths(&batch), ["/0", "/1"]);
    for got in &batch {
        replicas[0].answer(got, "");
    }
    for client in &mut clients {
        assert_eq!(client.response().status, 200);
    }
    let (served, replicas) = Served::with(json!({}), batched(3, 3600.0), 1);
    let _clients = waiting(&served, 3);
    assert_eq!(replicas[0].batch().len(), 3, "full");
}

#[test]
fn those_who_have_left_or_are_late_are_not_in_the_batch() {
    let (served, replica, _first, got) = busy(json!({}), batched(8, 0.0));
    let mut clients = waiting(&served, 3);
    clients.remove(1).hang_up();
    served.settles("connections", 3);
    let mut late = served.client();
    late.send("GET /late HTTP/1.1\r\nhost: h\r\nx-request-timeout-seconds: 0.05\r\n\r\n");
    assert_eq!(late.response().status, 408);
    replica.answer(&got, "");
    assert_eq!(paths(&replica.batch()), ["/0", "/2"]);
}

#[test]
fn one_request_of_a_batch_is_cancelled_alone_and_its_slot_stays_taken() {
    let (served, replica, _first, got) = busy(json!({}), batched(8, 0.0));
    let mut clients = waiting(&served, 2);
    replica.answer(&got, "");
    let batch = replica.batch();
    clients.remove(0).hang_up();
    assert_eq!(replica.expect(Kind::Cancel).header.stream, batch[0].header.stream);
    let mut next = served.client();
    next.get("/next");
    replica.answer(&batch[1], "alone");
    assert_eq!(clients[0].response().text(), "alone");
    replica.is_quiet();
    replica.chunk_end(&batch[0]);
    assert_eq!(paths(&replica.batch()), ["/next"]);
}

#[test]
fn a_refused_batch_goes_again_with_one_credit() {
    let (served, replica, _first, got) = busy(json!({}), batched(8, 0.0));
    let mut clients = waiting(&served, 2);
    replica.answer(&got, "");
    let refused = replica.batch();
    for got in &refused {
        replica.send(got, Kind::Busy, flag::FIN, 0, b"");
    }
    served.settles("busy", 2);
    replica.is_quiet();
    replica.write(got.link, Header::new(Kind::Credit, 0).aux(1), b"");
    let mut batch = Vec::new();
    for _ in 0..2 {
        batch.push(replica.request());
    }
    assert!(replica.expect(Kind::Batch).header.has(flag::GRANTED));
    assert!(batch.iter().all(|got| got.header.has(flag::BATCHED) && !got.header.has(flag::GRANTED)));
    assert_eq!(paths(&batch), ["/0", "/1"]);
    for got in &batch {
        replica.answer(got, "");
    }
    for client in &mut clients {
        assert_eq!(client.response().status, 200);
    }
    replica.is_quiet();
}

#[test]
fn a_returned_batch_goes_elsewhere() {
    let (served, mut replicas) = Served::with(json!({}), batched(2, 30.0), 1);
    let leaving = replicas.remove(0);
    let mut clients = waiting(&served, 2);
    let batch = leaving.batch();
    let other = Replica::start(served.dir.path(), "other", 5);
    served.publish(batched(2, 30.0), &[&leaving, &other]);
    served.linked(&[&other]);
    leaving.write(batch[0].link, Header::new(Kind::Drain, 0), b"");
    for got in &batch {
        leaving.send(got, Kind::Returned, flag::FIN, 0, b"");
    }
    let batch = other.batch();
    assert_eq!(paths(&batch), ["/0", "/1"]);
    for got in &batch {
        other.answer(got, "moved");
    }
    for client in &mut clients {
        assert_eq!(client.response().text(), "moved");
    }
}

#[test]
fn when_a_replica_dies_with_a_batch_only_what_may_be_done_twice_is_tried_again() {
    let (served, mut replicas) = Served::with(json!({}), batched(8, 1.0), 1);
    let mut dying = replicas.remove(0);
    let (mut idempotent, mut other) = (served.client(), served.client());
    idempotent.get("/get");
    other.post("/post", b"x");
    assert_eq!(dying.batch().len(), 2);
    let successor = Replica::start(served.dir.path(), "next", 5);
    served.publish(batched(8, 1.0), &[&successor]);
    dying.kill();
    assert_eq!(other.response().status, 500);
    let batch = successor.batch();
    assert_eq!(paths(&batch), ["/get"]);
    successor.answer(&batch[0], "again");
    assert_eq!(idempotent.response().text(), "again");
}

#[test]
fn a_batch_waits_for_no_body_however_it_comes() {
    let long = vec![b'x'; MAX_INLINE];
    for (framing, begins, ends, body) in [
        ("content-length: 4", &b"bo"[..], &b"dy"[..], &b"body"[..]),
        ("transfer-encoding: chunked", b"1\r\nb\r\n", b"3\r\nody\r\n0\r\n\r\n", b"body"),
        (&format!("content-length: {}", MAX_INLINE + 4), b"body", &long, &[b"body", &long[..]].concat()),
    ] {
        let (served, replica, _first, got) = busy(json!({}), batched(8, 0.0));
        let mut late = served.client();
        late.send(format!("POST /late HTTP/1.1\r\nhost: h\r\n{framing}\r\n\r\n"));
        late.send(begins);
        served.settles("requests_open", 2);
        let mut clients = waiting(&served, 1);
        replica.answer(&got, "");
        let batch = replica.batch();
        assert_eq!(batch.len(), 1);
        replica.answer(&batch[0], "");
        assert_eq!(clients[0].response().status, 200);
        late.send(ends);
        let batch = replica.batch();
        let sent = if batch[0].is_whole() { batch[0].head.body().to_vec() } else { replica.body(&batch[0]) };
        assert_eq!(sent, body);
        replica.answer(&batch[0], "");
        assert_eq!(late.response().status, 200);
    }
}

#[test]
fn who_breaks_off_in_the_body_is_in_no_batch() {
    let (served, replica, _first, got) = busy(json!({}), batched(8, 0.0));
    let mut clients = waiting(&served, 1);
    let mut garbled = served.client();
    garbled.send("POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1\r\nb\r\nnot a chunk\r\n");
    assert_eq!(garbled.response().status, 400);
    let mut leaves = served.client();
    leaves.send(format!("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\nb", 2 * MAX_INLINE));
    served.settles("requests_open", 3);
    leaves.hang_up();
    served.settles("requests_open", 2);
    replica.answer(&got, "");
    let batch = replica.batch();
    assert_eq!(paths(&batch), ["/0"]);
    replica.answer(&batch[0], "");
    assert_eq!(clients[0].response().status, 200);
}

#[test]
fn a_batch_takes_a_body_of_any_length_once_most_can_be_held() {
    const LENGTH: usize = 17 * 1024 * 1024;
    let (served, replica, _first, got) = busy(json!({}), batched(8, 0.0));
    let (mut upload, before) = (served.client(), served.counter("queued"));
    upload.send(format!("POST /long HTTP/1.1\r\nhost: h\r\ncontent-length: {LENGTH}\r\n\r\n"));
    upload.send(vec![b'x'; LENGTH - 1]);
    served.settles("queued", before + 1);
    replica.answer(&got, "");
    let batch = replica.batch();
    assert!(!batch[0].is_whole());
    upload.send("x");
    assert_eq!(replica.body(&batch[0]).len(), LENGTH);
    replica.answer(&batch[0], "done");
    assert_eq!(upload.response().text(), "done");
}

#[test]
fn those_who_wait_when_their_deployment_begins_to_batch_go_in_one() {
    let (served, replicas) = Served::with(json!({}), json!({"max_ongoing_requests": 1}), 1);
    let mut first = served.client();
    first.get("/first");
    let got = replicas[0].request();
    let mut clients = waiting(&served, 2);
    served.publish(batched(8, 0.1), &[&replicas[0]]);
    replicas[0].answer(&got, "");
    let mut batches = Vec::new();
    while batches.len() < 2 {
        let batch = replicas[0].batch();
        for got in &batch {
            replicas[0].answer(got, "in a batch");
        }
        batches.extend(batch);
    }
    for client in &mut clients {
        assert_eq!(client.response().text(), "in a batch");
    }
}
