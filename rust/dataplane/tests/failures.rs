//! Replicas that die, fall silent, raise or break the protocol.

mod support;

use rayserve_dataplane::wire::{Fault, Header, Kind, flag};
use serde_json::json;
use support::{Served, auto::Auto, either};

#[test]
fn a_dead_replicas_begun_get_is_tried_once_more_and_a_post_is_not() {
    for (method, retried) in [("GET", true), ("PUT", true), ("POST", false), ("PATCH", false)] {
        let (served, mut replicas) = Served::with(json!({}), json!({}), 2);
        let mut client = served.client();
        client.send(format!("{method} / HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\n\r\nx"));
        let dying = usize::from(std::ptr::eq(either(&replicas).0, &raw const replicas[1]));
        replicas[dying].request();
        replicas[dying].kill();
        if retried {
            let got = replicas[1 - dying].request();
            replicas[1 - dying].answer(&got, "second try");
            assert_eq!(client.response().text(), "second try", "{method}");
        } else {
            let response = client.response();
            assert_eq!((response.status, response.text().as_str()), (500, "Internal Server Error"), "{method}");
            assert_eq!(response.header("connection"), Some("close"));
        }
    }
}

#[test]
fn the_second_death_is_final_and_so_is_the_first_if_the_deployment_says_so() {
    for (deployment, deaths) in [(json!({}), 2), (json!({"retry_idempotent": false}), 1)] {
        let (served, mut replicas) = Served::with(json!({}), deployment, 2);
        let mut client = served.client();
        client.get("/");
        let mut dying = usize::from(std::ptr::eq(either(&replicas).0, &raw const replicas[1]));
        for _ in 0..deaths {
            replicas[dying].request();
            replicas[dying].kill();
            dying = 1 - dying;
        }
        assert_eq!(client.response().status, 500);
    }
}

#[test]
fn a_death_after_the_head_cuts_the_answer() {
    let (served, mut replica) = Served::one();
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[], 0, b"begun");
    assert_eq!(client.head().status, 200);
    assert_eq!(client.next_chunk(), b"begun");
    replica.kill();
    assert!(client.is_closed());
    served.settles("streams", 0);
}

#[test]
fn a_request_that_the_kernel_had_not_taken_whole_goes_elsewhere_even_if_it_is_a_post() {
    let deployment = json!({"max_ongoing_requests": 100});
    let (served, mut replicas) = Served::with(json!({}), deployment, 1);
    // Heads, as a body that is late would travel behind its request.
    let post = format!("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\nx-large: {}\r\n\r\n", "7".repeat(60_000));
    let mut clients: Vec<_> = (0..30).map(|_| served.client()).collect();
    clients[0].send(&post);
    replicas[0].request();
    replicas[0].stop_reading();
    // A socket buffer holds a few of these; the last ones cannot have been taken.
    for client in &mut clients[1..] {
        client.send(&post);
    }
    served.settles("streams", 30);
    let other = Auto::with(served.dir.path(), "other", 100, |replica, got| {
        assert!(got.head.headers().any(|(name, value)| name == b"x-large" && value.len() == 60_000));
        replica.answer(got, "elsewhere");
    });
    replicas[0].kill();
    served.publish(json!({"max_ongoing_requests": 100, "replicas": [other.address]}), &[]);
    let answers: Vec<_> = clients.iter_mut().map(|client| client.response().status).collect();
    let (failed, elsewhere) = [500, 200].map(|status| answers.iter().filter(|&&it| it == status).count()).into();
    assert_eq!((failed + elsewhere, answers[0]), (30, 500));
    assert!(elsewhere > 0, "{answers:?}");
}

#[test]
fn a_link_that_broke_is_made_again() {
    let (served, replica) = Served::one();
    replica.break_links();
    served.settles("links_lost", 1);
    served.settles("links", 1);
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    replica.answer(&got, "again");
    assert_eq!(client.response().text(), "again");
}

#[test]
fn a_replica_without_a_sign_of_life_gets_nothing_until_it_gives_one() {
    let (served, replica) = Served::one();
    replica.stop_answering_pings();
    let mut client = served.client();
    // Not picked from the second PING on that nothing followed.
    std::thread::sleep(std::time::Duration::from_millis(4500));
    client.get("/");
    served.settles("queued", 1);
    replica.is_quiet();
    assert_eq!(served.counter("links"), 1, "the link lives");
    replica.write(0, Header::new(Kind::Pong, 0), b"");
    let got = replica.request();
    replica.answer(&got, "alive");
    assert_eq!(client.response().text(), "alive");
}

#[test]
fn a_replica_that_left_the_snapshot_finishes_its_work_and_its_link_ends() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    served.publish(json!({}), &[]);
    replica.is_quiet();
    assert_eq!(served.counter("links"), 1);
    replica.answer(&got, "last");
    assert_eq!(client.response().text(), "last");
    served.settles("links", 0);
}

#[test]
fn a_handlers_exception_is_a_plain_500_and_after_the_head_a_cut() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    // The second is a CancelledError that nobody asked for.
    for fault in [Fault::User, Fault::Cancelled] {
        client.get("/");
        let got = replica.request();
        replica.send(&got, Kind::Error, flag::FIN, fault as u32, b"ValueError");
        let response = client.response();
        assert_eq!((response.status, response.text().as_str()), (500, "Internal Server Error"));
        assert_eq!((response.header("content-type"), response.header("connection")), (None, None));
    }
    client.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[], 0, b"");
    assert_eq!(client.head().status, 200);
    replica.send(&got, Kind::Error, flag::FIN, Fault::Aborted as u32, b"");
    assert!(client.is_closed());
}

#[test]
fn a_replica_that_breaks_the_protocol_loses_its_link_and_nothing_else() {
    let (served, replicas) = Served::with(json!({}), json!({}), 2);
    let mut client = served.client();
    client.get("/");
    let (broken, healthy) = either(&replicas);
    let got = broken.request();
    broken.write(got.link, Header::new(Kind::Chunk, got.header.stream), b"a chunk without a head");
    let again = healthy.request();
    healthy.answer(&again, "fine");
    assert_eq!(client.response().text(), "fine");
    served.settles("links_lost", 1);
}
