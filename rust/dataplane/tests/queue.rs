//! Who waits, who is refused, and what comes back unbegun.

mod support;

use std::os::unix::net::UnixListener;

use rayserve_dataplane::wire::{Header, Kind, flag};
use serde_json::json;
use support::{Served, either, replica::Replica};

#[test]
fn a_full_queue_is_refused_as_the_deployment_wants_it() {
    let deployment = json!({"max_ongoing_requests": 1, "max_queued_requests": 1,
        "backpressure": {"status_code": 429, "retry_after_s": 1.5}});
    let (served, replicas) = Served::with(json!({}), deployment, 1);
    let (mut runs, mut waits, mut refused) = (served.client(), served.client(), served.client());
    runs.get("/");
    let got = replicas[0].request();
    waits.get("/");
    served.settles("queued", 1);
    refused.get("/");
    let response = refused.response();
    assert_eq!((response.status, response.header("retry-after")), (429, Some("2")));
    assert_eq!(response.text(), "Request dropped due to backpressure (num_queued_requests=1, max_queued_requests=1).");
    replicas[0].answer(&got, "");
    let got = replicas[0].request();
    replicas[0].answer(&got, "");
    assert_eq!((runs.response().status, waits.response().status), (200, 200));
}

#[test]
fn a_failed_deployment_answers_503_with_its_sentence_to_those_who_wait_too() {
    let (served, _) = Served::with(json!({}), json!({}), 0);
    let mut client = served.client();
    client.get("/");
    served.settles("queued", 1);
    served.publish(json!({"unavailable": "It failed to deploy."}), &[]);
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (503, "It failed to deploy."));
}

#[test]
fn a_request_waits_for_a_replica_that_is_still_starting() {
    let (served, _) = Served::with(json!({}), json!({}), 0);
    let mut client = served.client();
    client.get("/");
    served.settles("queued", 1);
    let replica = Replica::start(served.dir.path(), "late", 5);
    served.publish(json!({}), &[&replica]);
    let got = replica.request();
    replica.answer(&got, "here");
    assert_eq!(client.response().text(), "here");
}

fn route_to(deployment: &str) -> serde_json::Value {
    json!([{"prefix": "/", "app": "default", "deployment": format!("default#{deployment}")}])
}

#[test]
fn those_who_wait_at_an_ingress_that_is_renamed_go_to_the_new_one() {
    let one = json!({"max_ongoing_requests": 1});
    let (served, replicas) = Served::with(json!({}), one.clone(), 1);
    let (mut runs, mut waits, mut later) = (served.client(), served.client(), served.client());
    runs.get("/1");
    let old = replicas[0].request();
    waits.send("POST /2 HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\nbody");
    served.settles("queued", 1);
    served.publish_all(&route_to("E"), [("D", one.clone(), &[&replicas[0]]), ("E", one.clone(), &[])]);
    later.get("/3");
    served.settles("queued", 2);
    let renamed = Replica::start(served.dir.path(), "e0", 1);
    served.publish_all(&route_to("E"), [("E", one, &[&renamed])]);
    let mut paths = Vec::new();
    for _ in 0..2 {
        let got = renamed.request();
        paths.push(String::from_utf8_lossy(got.head.path()).into_owned());
        if got.head.path() == b"/2" {
            assert_eq!(&got.head.body()[..], b"body");
        }
        renamed.answer(&got, "new");
    }
    replicas[0].answer(&old, "old");
    paths.sort_unstable();
    assert_eq!(paths, ["/2", "/3"]);
    assert_eq!([runs, waits, later].map(|mut client| client.response().text()), ["old", "new", "new"]);
}

#[test]
fn a_request_that_comes_back_from_a_deployment_that_is_gone_follows_its_route() {
    let (served, replicas) = Served::with(json!({}), json!({}), 1);
    let mut client = served.client();
    client.get("/");
    let got = replicas[0].request();
    let renamed = Replica::start(served.dir.path(), "e0", 1);
    served.publish_all(&route_to("E"), [("E", json!({}), &[&renamed])]);
    served.linked(&[&renamed]);
    replicas[0].send(&got, Kind::Returned, flag::FIN, 0, b"");
    let got = renamed.request();
    renamed.answer(&got, "moved");
    assert_eq!(client.response().text(), "moved");
}

#[test]
fn whoever_moves_to_a_new_ingress_keeps_the_deadline() {
    let (served, _) = Served::with(json!({"request_timeout_s": 0.3}), json!({}), 0);
    let mut client = served.client();
    client.get("/");
    served.settles("queued", 1);
    served.publish_all(&route_to("E"), [("E", json!({}), &[])]);
    served.settles("queued", 2);
    assert_eq!(client.response().status, 408);
}

#[test]
fn those_who_wait_at_an_application_that_is_deleted_are_told_so() {
    let (served, _) = Served::with(json!({}), json!({}), 0);
    let mut client = served.client();
    client.get("/");
    served.settles("queued", 1);
    served.publish_all(&json!([]), []);
    let response = client.response();
    let sentence = "Deployment(name='D', app='default') is unavailable because it was deleted.";
    assert_eq!((response.status, response.text().as_str()), (503, sentence));
}

#[test]
fn a_busy_replica_gets_the_request_again_with_its_credit() {
    let (served, replica) = Served::one();
    let (mut first, mut second) = (served.client(), served.client());
    first.get("/1");
    let refused = replica.request();
    replica.send(&refused, Kind::Busy, flag::FIN, 0, b"");
    served.settles("busy", 1);
    second.get("/2");
    served.settles("queued", 1);
    replica.is_quiet();
    replica.write(refused.link, Header::new(Kind::Credit, 0).aux(1), b"");
    let got = replica.request();
    assert!(got.head.path() == b"/1" && got.header.has(flag::GRANTED));
    assert_ne!(got.header.stream, refused.header.stream);
    let next = replica.request();
    assert!(next.head.path() == b"/2" && !next.header.has(flag::GRANTED), "paid: optimistic again");
    replica.answer(&got, "1");
    replica.answer(&next, "2");
    assert_eq!((first.response().text(), second.response().text()), ("1".into(), "2".into()));
    replica.write(got.link, Header::new(Kind::Credit, 0).aux(3), b"");
    assert_eq!(replica.expect(Kind::Unused).header.aux, 3);
}

#[test]
fn a_refused_upload_is_sent_again_from_its_beginning() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n");
    let refused = replica.request();
    client.chunk(b"one");
    replica.expect(Kind::Body);
    replica.send(&refused, Kind::Busy, flag::FIN, 0, b"");
    replica.write(refused.link, Header::new(Kind::Credit, 0).aux(1), b"");
    let got = replica.request();
    assert_eq!(&replica.expect(Kind::Body).payload[..], b"one");
    client.chunk(b"two");
    client.send("0\r\n\r\n");
    assert_eq!(replica.body(&got), b"two");
    replica.answer(&got, "");
    assert_eq!(client.response().status, 200);
}

#[test]
fn a_draining_replica_gets_nothing_new_and_finishes_the_old() {
    let deployment = json!({"max_ongoing_requests": 2});
    let (served, replicas) = Served::with(json!({}), deployment.clone(), 2);
    let mut clients: Vec<_> = (0..4).map(|_| served.client()).collect();
    clients[0].get("/old");
    let (leaving, staying) = either(&replicas);
    let old = leaving.request();
    leaving.write(old.link, Header::new(Kind::Drain, 0), b"");
    leaving.write(old.link, Header::new(Kind::Ping, 0), b"");
    leaving.expect(Kind::Pong);
    served.publish(deployment, &[leaving, staying]);
    for client in &mut clients[1..] {
        client.get("/new");
    }
    let new = [staying.request(), staying.request()];
    served.settles("queued", 1);
    leaving.is_quiet();
    leaving.answer(&old, "old");
    assert_eq!(clients[0].response().text(), "old");
    leaving.is_quiet();
    staying.answer(&new[0], "new");
    assert_eq!(staying.request().head.path(), b"/new");
}

#[test]
fn a_returned_request_goes_to_another_replica() {
    let (served, replicas) = Served::with(json!({}), json!({}), 2);
    let mut client = served.client();
    client.post("/", b"x");
    let (one, other) = either(&replicas);
    let got = one.request();
    one.write(got.link, Header::new(Kind::Drain, 0), b"");
    one.send(&got, Kind::Returned, flag::FIN, 0, b"");
    let got = other.request();
    assert_eq!(&got.head.body()[..], b"x");
    other.answer(&got, "elsewhere");
    assert_eq!(client.response().text(), "elsewhere");
}

#[test]
fn a_session_waits_for_the_first_attempt_to_link_to_its_replica_and_no_longer() {
    let (served, replicas) = Served::with(json!({}), json!({}), 1);
    let path = served.dir.path().join("mute");
    let mute = UnixListener::bind(&path).expect("a socket");
    let mute_address = json!({"id": "r1", "node_id": "n", "unix": path});
    served.publish(json!({"replicas": [replicas[0].address(), mute_address]}), &[]);
    let (attempt, _) = mute.accept().expect("it is tried");
    let (mut waits, mut passes) = (served.client(), served.client());
    waits.send("GET /waits HTTP/1.1\r\nhost: h\r\nx-session-id: visitor\r\n\r\n");
    served.settles("queued", 1);
    passes.get("/passes");
    for (client, path) in [(&mut passes, "/passes"), (&mut waits, "/waits")] {
        let got = replicas[0].request();
        assert_eq!(got.head.path(), path.as_bytes());
        replicas[0].answer(&got, path);
        assert_eq!(client.response().text(), path);
        // Then the attempt fails.
        let _ = attempt.shutdown(std::net::Shutdown::Both);
    }
}
