//! Routes with several targets: shares, what keeps a visitor, what happens while targets come and go.

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use rayserve_dataplane::wire::{Header, Kind, flag};
use serde_json::{Value, json};
use support::{
    Client, Replica, Served,
    auto::{Auto, Split, split, targets},
    eventually,
};

/// Who answers `count` requests, one after the other.
fn counts(client: &mut Client, count: usize) -> HashMap<String, f64> {
    let mut counts = HashMap::new();
    for _ in 0..count {
        client.get("/");
        *counts.entry(client.response().text()).or_default() += 1.0;
    }
    counts
}

fn assert_shares(counts: &HashMap<String, f64>, weights: &[(&str, f64)]) {
    let (total, sum) = (counts.values().sum::<f64>(), weights.iter().map(|(_, weight)| weight).sum::<f64>());
    for (name, weight) in weights {
        let (count, due) = (counts.get(*name).copied().unwrap_or(0.0), total * weight / sum);
        assert!((count - due).abs() <= 1.0 + 1e-9, "{name}: {count} of {due}; {counts:?}");
    }
}

/// Who answers a request with these header lines.
fn ask(client: &mut Client, headers: &str) -> String {
    client.send(format!("GET / HTTP/1.1\r\nhost: h\r\n{headers}\r\n"));
    client.response().text()
}

#[test]
fn shares_are_exact_within_one_request_and_stay_so_when_weights_change() {
    let five = [("a", 0.4), ("b", 0.3), ("c", 0.15), ("d", 0.1), ("e", 0.05)];
    let it = Split::start(&["a", "b", "c", "d", "e"], &split(&five));
    let mut client = it.served.client();
    for count in [1, 7, 33, 100] {
        assert_shares(&counts(&mut client, count), &five.map(|(name, weight)| (name, weight)));
    }
    let other = [("a", 5.0), ("b", 0.0), ("c", 5.0), ("d", 1.0), ("e", 1.0)];
    it.publish(&split(&other));
    assert_shares(&counts(&mut client, 101), &other);
}

#[test]
fn they_are_exact_over_all_shards_of_a_proxy_together() {
    let weights = [("a", 0.9), ("b", 0.07), ("c", 0.03)];
    let it = Split::with(json!({"shards": 3}), &["a", "b", "c"], &split(&weights));
    let mut sums = HashMap::new();
    // Each connection is one shard's, whichever.
    for _ in 0..25 {
        for (name, count) in counts(&mut it.served.client(), 5) {
            *sums.entry(name).or_default() += count;
        }
        assert_shares(&sums, &weights);
    }
}

#[test]
fn a_snapshot_with_the_same_weights_does_not_begin_anew() {
    let weights = [("a", 0.7), ("b", 0.2), ("c", 0.1)];
    let it = Split::start(&["a", "b", "c"], &split(&weights));
    let (mut client, mut sums) = (it.served.client(), HashMap::new());
    for _ in 0..30 {
        for (name, count) in counts(&mut client, 2) {
            *sums.entry(name).or_default() += count;
        }
        it.publish(&split(&weights));
    }
    assert_shares(&sums, &weights);
}

#[test]
fn a_target_sees_the_route_as_its_root_path() {
    let served = Served::empty(json!({"root_path": "/root"}));
    let replica = Replica::start(served.dir.path(), "a", 5);
    served.publish_split(&split(&[("a", 1.0)]), &[("a", json!({}), vec![replica.address()])]);
    served.linked(&[&replica]);
    let mut client = served.client();
    client.get("/x/y");
    let got = replica.request();
    assert_eq!(
        (got.head.root_path(), got.head.route(), got.head.path()),
        (&b"/root/x"[..], &b"/x"[..], &b"/root/x/y"[..])
    );
    replica.answer(&got, "");
    assert_eq!(client.response().status, 200);
}

#[test]
fn a_snapshot_that_comes_while_a_body_is_read_is_the_one_that_counts() {
    let it = Split::start(&["a", "b"], &split(&[("a", 1.0), ("b", 0.0)]));
    // Where requests are put together no small body is streamed.
    let batched = json!({"batch": {"max_size": 4}});
    let deployments: Vec<_> =
        it.autos.iter().map(|(name, auto)| (*name, batched.clone(), vec![auto.address.clone()])).collect();
    let publish = |a, b| it.served.publish_split(&split(&[("a", a), ("b", b)]), &deployments);
    publish(1.0, 0.0);
    let mut client = it.served.client();
    client.send("POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\nbo");
    it.served.settles("requests_open", 1);
    publish(0.0, 1.0);
    client.send("dy");
    assert_eq!(client.response().text(), "b");
}

#[test]
fn rules_come_first_and_the_rest_is_split() {
    let mut split = split(&[("a", 1.0), ("b", 0.0)]);
    split["rules"] =
        json!([{"header": "X-Canary", "value": "1", "target": "b"}, {"cookie": "beta", "value": null, "target": "b"}]);
    let it = Split::start(&["a", "b"], &split);
    let mut client = it.served.client();
    for (headers, target) in [
        ("", "a"),
        ("x-canary: 1\r\n", "b"),
        ("x-canary: 2\r\n", "a"),
        ("cookie: x=1; beta=0\r\n", "b"),
        ("cookie: x=1\r\ncookie: beta=\r\n", "b"),
        ("cookie: alphabeta=1\r\n", "a"),
    ] {
        assert_eq!(ask(&mut client, headers), target, "{headers}");
    }
}

#[test]
fn a_visitor_stays_and_a_share_that_grows_only_moves_new_ones_in() {
    for (sign, header) in
        [(json!({"header": "x-user"}), "x-user: "), (json!({"cookie": "session"}), "cookie: session=")]
    {
        let weighted = |weight: f64| json!({"targets": targets(&[("a", 1.0 - weight), ("b", weight)]), "sticky": sign});
        let it = Split::start(&["a", "b"], &weighted(0.2));
        let mut client = it.served.client();
        let mut homes = || (0..100).map(|i| ask(&mut client, &format!("{header}u{i}\r\n"))).collect::<Vec<_>>();
        let before = homes();
        assert_eq!(before, homes());
        let at_b = |homes: &[String]| homes.iter().filter(|home| *home == "b").count();
        assert!((8..35).contains(&at_b(&before)), "{}", at_b(&before));
        it.publish(&weighted(0.6));
        let after = homes();
        assert!(before.iter().zip(&after).all(|(before, after)| before == after || after == "b"));
        assert!((45..75).contains(&at_b(&after)), "{}", at_b(&after));
    }
}

#[test]
fn a_target_without_a_ready_replica_gets_no_share_and_its_own_back_when_it_has_one() {
    let half = split(&[("a", 0.5), ("b", 0.5), ("missing", 1.0)]);
    let mut it = Split::start(&["a", "b"], &half);
    let mut client = it.served.client();
    assert_shares(&counts(&mut client, 20), &[("a", 0.5), ("b", 0.5)]);
    it.autos.pop();
    it.served.settles("links", 1);
    assert_eq!(counts(&mut client, 20), HashMap::from([("a".into(), 20.0)]));
    it.autos.push(("b", Auto::start(it.served.dir.path(), "b", 100)));
    it.served.settles("links", 2);
    assert_shares(&counts(&mut client, 21), &[("a", 0.5), ("b", 0.5)]);
}

#[test]
fn while_no_target_is_ready_requests_wait_and_go_where_readiness_comes_first() {
    // The heavier one is where they wait; the other one comes first. Or nothing at all is deployed yet.
    for declared in [true, false] {
        let served = Served::empty(json!({}));
        let weights = split(&[("a", 0.9), ("b", 0.1)]);
        let none = [("a", json!({}), vec![]), ("b", json!({}), vec![])];
        served.publish_split(&weights, if declared { &none } else { &[] });
        let mut clients: Vec<_> = (0..5).map(|_| served.client()).collect();
        for client in &mut clients {
            client.get("/");
        }
        served.settles("requests_open", 5);
        let b = Auto::start(served.dir.path(), "b", 100);
        let (a, b) = (("a", json!({}), vec![]), ("b", json!({}), vec![b.address.clone()]));
        served.publish_split(&weights, &[a, b]);
        assert!(clients.iter_mut().all(|client| client.response().text() == "b"));
    }
}

#[test]
fn those_who_wait_are_bounded_by_the_queue_of_the_target_and_by_their_deadline() {
    let served = Served::empty(json!({"request_timeout_s": 1.0}));
    let limited = json!({"max_queued_requests": 1, "backpressure": {"status_code": 429}});
    served.publish_split(&split(&[("a", 1.0)]), &[("a", limited, vec![])]);
    let (mut waits, mut refused) = (served.client(), served.client());
    waits.get("/");
    served.settles("queued", 1);
    refused.get("/");
    assert_eq!(refused.response().status, 429);
    assert_eq!(waits.response().status, 408);
    served.publish_split(&split(&[("a", 1.0)]), &[]);
    let mut nowhere = served.client();
    nowhere.get("/");
    assert_eq!(nowhere.response().status, 408);
}

#[test]
fn a_split_without_weight_answers_503_and_names_itself() {
    let it = Split::start(&["a"], &split(&[("a", 0.0)]));
    let mut client = it.served.client();
    client.get("/x");
    let response = client.response();
    assert_eq!(response.status, 503);
    assert_eq!(response.text(), "The traffic of '/x' has no target: give one a weight above 0 with serve.set_traffic.");
    it.publish(&json!({}));
    client.get("/x");
    assert_eq!(client.response().status, 503);
}

#[test]
fn those_who_wait_at_a_target_whose_last_replica_dies_go_to_another() {
    let served = Served::empty(json!({}));
    let (mut a, b) = (Replica::start(served.dir.path(), "a", 1), Replica::start(served.dir.path(), "b", 5));
    let one = json!({"max_ongoing_requests": 1});
    let publish = |weights: &[(&str, f64)]| {
        served.publish_split(
            &split(weights),
            &[("a", one.clone(), vec![a.address()]), ("b", json!({}), vec![b.address()])],
        );
    };
    publish(&[("a", 1.0), ("b", 0.0)]);
    served.linked(&[&a, &b]);
    let (mut runs, mut waits) = (served.client(), served.client());
    runs.send("POST /1 HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n");
    a.request();
    waits.post("/2", b"body");
    served.settles("queued", 1);
    publish(&[("a", 1.0), ("b", 1.0)]);
    b.is_quiet();
    a.kill();
    let got = b.request();
    assert_eq!((got.head.path(), &got.head.body()[..]), (&b"/2"[..], &b"body"[..]));
    b.answer(&got, "b");
    assert_eq!((runs.response().status, waits.response().text()), (500, "b".into()), "begun, and not idempotent");
    served.counts("targets", "b", "/requests", 1);
    served.counts("targets", "a", "/requests", 1);
}

#[test]
fn one_that_leaves_a_target_for_a_route_without_targets_is_counted_nowhere() {
    let served = Served::empty(json!({}));
    let plain = Replica::start(served.dir.path(), "plain", 5);
    served.publish_split(&split(&[("a", 1.0)]), &[("a", json!({}), vec![])]);
    let mut client = served.client();
    client.get("/x");
    served.settles("queued", 1);
    served.publish(json!({}), &[&plain]);
    let got = plain.request();
    plain.answer(&got, "plain");
    assert_eq!(client.response().text(), "plain");
    served.settles("requests_open", 0);
    assert_eq!(served.traffic("targets", "a")["requests"], 0);
}

#[test]
fn a_request_that_comes_back_unbegun_or_may_be_repeated_goes_to_a_ready_target() {
    for returned in [true, false] {
        let served = Served::empty(json!({}));
        let (mut a, b) = (Replica::start(served.dir.path(), "a", 5), Replica::start(served.dir.path(), "b", 5));
        let publish = |weights: &[(&str, f64)]| {
            served.publish_split(
                &split(weights),
                &[("a", json!({}), vec![a.address()]), ("b", json!({}), vec![b.address()])],
            );
        };
        publish(&[("a", 1.0), ("b", 0.0)]);
        served.linked(&[&a, &b]);
        let mut client = served.client();
        client.get("/");
        let got = a.request();
        publish(&[("a", 0.5), ("b", 0.5)]);
        if returned {
            a.write(got.link, Header::new(Kind::Drain, 0), b"");
            a.send(&got, Kind::Returned, flag::FIN, 0, b"");
        } else {
            a.kill();
        }
        let got = b.request();
        b.answer(&got, "b");
        assert_eq!(client.response().text(), "b");
    }
}

#[test]
fn a_busy_answer_keeps_the_request_at_its_target() {
    let served = Served::empty(json!({}));
    let (a, b) = (Replica::start(served.dir.path(), "a", 5), Replica::start(served.dir.path(), "b", 5));
    let deployments = [("a", json!({}), vec![a.address()]), ("b", json!({}), vec![b.address()])];
    served.publish_split(&split(&[("a", 0.9), ("b", 0.1)]), &deployments);
    served.linked(&[&a, &b]);
    let mut client = served.client();
    client.get("/");
    let refused = a.request();
    a.send(&refused, Kind::Busy, flag::FIN, 0, b"");
    served.settles("busy", 1);
    a.write(refused.link, Header::new(Kind::Credit, 0).aux(1), b"");
    let got = a.request();
    assert!(got.header.has(flag::GRANTED));
    a.answer(&got, "a");
    assert_eq!(client.response().text(), "a");
    b.is_quiet();
}

#[test]
fn weights_and_targets_that_change_under_load_lose_nothing() {
    let mut it = Split::start(&["a", "b", "c"], &split(&[("a", 0.5), ("b", 0.3), ("c", 0.2)]));
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (mut client, stop, done) = (it.served.client(), Arc::clone(&stop), Arc::clone(&done));
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    client.get("/x");
                    assert_eq!(client.response().status, 200);
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let c = it.autos.pop().expect("three");
    for round in 0..60 {
        let weight = f64::from(round % 10) / 10.0;
        // The third leaves by a snapshot and comes back, while its replica lives.
        if round % 3 == 0 {
            it.publish(&split(&[("b", weight), ("a", 1.0 - weight)]));
        } else {
            let (a, b) = (it.autos[0].1.address.clone(), it.autos[1].1.address.clone());
            let all =
                [("a", json!({}), vec![a]), ("b", json!({}), vec![b]), ("c", json!({}), vec![c.1.address.clone()])];
            it.served.publish_split(&split(&[("a", weight), ("b", 0.0), ("c", 1.0 - weight)]), &all);
        }
        let seen = done.load(Ordering::SeqCst);
        eventually("requests go on", || done.load(Ordering::SeqCst) > seen + 4, || format!("round {round}"));
    }
    stop.store(true, Ordering::SeqCst);
    for client in clients {
        client.join().expect("no request has failed");
    }
    let traffic: Value = serde_json::from_str(&it.served.proxy.traffic()).expect("JSON");
    let sum: u64 = ["a", "b", "c"].iter().filter_map(|name| traffic["/x"]["targets"][name]["requests"].as_u64()).sum();
    assert_eq!(sum as usize, done.load(Ordering::SeqCst), "each is counted once, over all snapshots");
}
