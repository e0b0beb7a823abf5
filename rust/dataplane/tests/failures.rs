//! What happens when somebody leaves, is late, is full, or dies.

mod support;

use rayserve_dataplane::wire::{Fault, Header, Kind, flag};
use serde_json::json;
use support::{Served, replica::Replica};

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
    replica.send(&first, Kind::Error, flag::FIN, Fault::Cancelled as u32, b"");
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
    replica.is_quiet();
    replica.answer(&got, "nobody reads this");
    served.settles("streams", 0);
    assert_eq!(served.counter("cancelled"), 0);
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
    let (served, replicas) = Served::with(json!({"request_timeout_s": 0.1}), json!({}), 1);
    let mut client = served.client();
    client.send("GET / HTTP/1.1\r\nhost: h\r\nx-request-id: r7\r\n\r\n");
    let got = replicas[0].request();
    assert!((1..=100).contains(&got.header.aux), "remaining time travels: {}", got.header.aux);
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (408, "Request r7 timed out after 0.1s."));
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
    let (served, replicas) = Served::with(json!({"request_timeout_s": 0.1}), json!({}), 1);
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
    assert!((1..=100).contains(&got.header.aux));
    assert_eq!(malformed.response().status, 408);
}

#[test]
fn a_deadline_after_the_head_cuts_the_answer() {
    let (served, replicas) = Served::with(json!({"request_timeout_s": 0.1}), json!({}), 1);
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
    let (served, replicas) = Served::with(json!({}), json!({"max_ongoing_requests": 2}), 2);
    let mut clients: Vec<_> = (0..4).map(|_| served.client()).collect();
    clients[0].get("/old");
    let (leaving, staying) = if replicas[0].try_next().is_some_and(|(link, frame)| {
        replicas[0].push_back(link, frame);
        true
    }) {
        (&replicas[0], &replicas[1])
    } else {
        (&replicas[1], &replicas[0])
    };
    let old = leaving.request();
    clients[1].get("/held");
    let mut held = staying.try_request();
    if held.is_none() {
        held = Some(leaving.request());
    }
    let held = held.expect("somewhere");
    leaving.write(old.link, Header::new(Kind::Drain, 0), b"");
    served.publish(json!({"max_ongoing_requests": 2}), &[leaving, staying]);
    clients[2].get("/new");
    assert_eq!(staying.request().head.path(), b"/new");
    leaving.is_quiet();
    leaving.answer(&old, "old");
    assert_eq!(clients[0].response().text(), "old");
    drop(held);
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

/// The replica that has a frame, and the other one.
fn either(replicas: &[Replica]) -> (&Replica, &Replica) {
    loop {
        for (one, other) in [(0, 1), (1, 0)] {
            if let Some((link, frame)) = replicas[one].try_next() {
                replicas[one].push_back(link, frame);
                return (&replicas[one], &replicas[other]);
            }
        }
    }
}

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
    let (served, mut replicas) = Served::with(json!({}), json!({"max_ongoing_requests": 100}), 1);
    replicas[0].stop_reading();
    // A socket buffer holds a few of these; the last ones cannot have been taken.
    let body = vec![7; 60_000];
    let mut clients: Vec<_> = (0..30).map(|_| served.client()).collect();
    for client in &mut clients {
        client.post("/", &body);
    }
    served.settles("streams", 30);
    let other = Replica::start(served.dir.path(), "other", 100);
    replicas[0].kill();
    served.publish(json!({"max_ongoing_requests": 100}), &[&other]);
    let mut elsewhere = 0;
    while let Some(got) = other.try_request() {
        assert_eq!(got.head.body().len(), body.len());
        other.answer(&got, "elsewhere");
        elsewhere += 1;
    }
    let answers: Vec<_> = clients.iter_mut().map(|client| client.response().status).collect();
    let failed = answers.iter().filter(|&&status| status == 500).count();
    assert_eq!((failed + elsewhere, answers.iter().filter(|&&status| status == 200).count()), (30, elsewhere));
    assert!(elsewhere > 0 && failed > 0, "{elsewhere} elsewhere, {failed} failed");
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
    client.get("/");
    let got = replica.request();
    replica.send(&got, Kind::Error, flag::FIN, Fault::User as u32, b"ValueError");
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (500, "Internal Server Error"));
    assert_eq!((response.header("content-type"), response.header("connection")), (None, None));
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
