//! What is counted of the targets of a split, and how it reads.

mod support;

use std::time::Duration;

use rayserve_dataplane::wire::{Fault, Kind, flag};
use serde_json::json;
use support::{
    Replica, Served,
    auto::{Auto, Split, split},
};

#[test]
fn errors_are_those_of_the_target_and_latency_is_in_the_histogram() {
    let served = Served::empty(json!({}));
    let a = Replica::start(served.dir.path(), "a", 5);
    served.publish_split(&split(&[("a", 1.0)]), &[("a", json!({"retry_idempotent": false}), vec![a.address()])]);
    served.linked(&[&a]);
    let mut client = served.client();
    let mut ask = |answer: &dyn Fn(&support::replica::Got)| {
        client.get("/");
        answer(&a.request());
        client.response().status
    };
    assert_eq!(ask(&|got| a.answer(got, "")), 200);
    assert_eq!(ask(&|got| a.head(got, 404, &[], flag::FIN, b"")), 404);
    assert_eq!(served.traffic("targets", "a")["errors"], 0);
    assert_eq!(ask(&|got| a.head(got, 503, &[], flag::FIN, b"")), 503);
    assert_eq!(ask(&|got| a.send(got, Kind::Error, flag::FIN, Fault::User as u32, b"")), 500);
    served.counts("targets", "a", "/errors", 2);
    let counted = served.traffic("targets", "a");
    let latency = counted["latency"].as_array().expect("buckets");
    assert_eq!((counted["requests"].as_u64(), latency.iter().filter_map(|it| it[1].as_u64()).sum()), (Some(4), 4_u64));
    // An answer that breaks off.
    client.get("/");
    let got = a.request();
    a.head(&got, 200, &[], 0, b"part");
    assert_eq!(client.head().status, 200);
    a.send(&got, Kind::Error, flag::FIN, Fault::User as u32, b"");
    served.counts("targets", "a", "/errors", 3);
    // Waits of 100 ms and more: of those above none, but where the machine is busy.
    let waits = || {
        let counted = served.traffic("targets", "a");
        let waited =
            counted["latency"].as_array().expect("buckets").iter().filter(|it| it[0].as_u64() >= Some(100_000));
        waited.filter_map(|it| it[1].as_u64()).sum::<u64>()
    };
    let before = waits();
    // Out of time is the target's error, a client that leaves is not.
    let mut late = served.client();
    late.send("GET / HTTP/1.1\r\nhost: h\r\nx-request-timeout-seconds: 0.2\r\n\r\n");
    let got = a.request();
    assert_eq!(late.response().status, 408);
    a.expect(Kind::Cancel);
    a.chunk_end(&got);
    served.counts("targets", "a", "/errors", 4);
    let mut leaves = served.client();
    leaves.get("/");
    let got = a.request();
    served.counts("targets", "a", "/open", 1);
    std::thread::sleep(Duration::from_millis(100));
    leaves.hang_up();
    a.expect(Kind::Cancel);
    a.chunk_end(&got);
    served.counts("targets", "a", "/requests", 7);
    served.counts("targets", "a", "/errors", 4);
    served.counts("targets", "a", "/open", 0);
    // It has waited for so long.
    assert_eq!(waits() - before, 2);
}

#[test]
fn the_metrics_page_is_prometheus_text_with_the_proxys_counters_and_those_of_the_targets() {
    let mut weights = split(&[("a", 1.0), ("b", 0.0)]);
    weights["shadows"] = json!([{"name": "b", "deployment": "b#D", "share": 0.5}]);
    let it = Split::start(&["a", "b"], &weights);
    let mut client = it.served.client();
    for _ in 0..4 {
        client.get("/");
        assert_eq!(client.response().text(), "a");
    }
    it.served.counts("shadows", "b", "/answered", 2);
    client.get("/-/metrics");
    let response = client.response();
    assert_eq!(response.header("content-type"), Some("application/openmetrics-text; version=1.0.0; charset=utf-8"));
    let text = response.text();
    for line in [
        "# TYPE ray_serve_proxy_requests counter",
        "# TYPE ray_serve_proxy_connections gauge",
        "ray_serve_proxy_links 2",
        "# TYPE ray_serve_traffic_requests counter",
        "ray_serve_traffic_requests_total{route=\"/x\",target=\"a\"} 4",
        "ray_serve_traffic_requests_total{route=\"/x\",target=\"b\"} 0",
        "ray_serve_traffic_errors_total{route=\"/x\",target=\"a\"} 0",
        "# TYPE ray_serve_traffic_latency_ms histogram",
        "ray_serve_traffic_latency_ms_count{route=\"/x\",target=\"a\"} 4",
        "ray_serve_traffic_latency_ms_bucket{le=\"+Inf\",route=\"/x\",target=\"a\"} 4",
        "ray_serve_traffic_shadow_total{route=\"/x\",target=\"b\",outcome=\"answered\"} 2",
        "ray_serve_traffic_shadow_total{route=\"/x\",target=\"b\",outcome=\"dropped_timeout\"} 0",
        "# EOF",
    ] {
        assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
    }
    assert_eq!(Served::empty(json!({})).proxy.traffic(), "{}");
}

#[test]
fn names_that_come_and_go_leave_a_bounded_number_of_counters() {
    let served = Served::empty(json!({}));
    let a = Auto::start(served.dir.path(), "a", 5);
    let mut client = served.client();
    for release in 0..300 {
        let mut weights = split(&[("a", 1.0), (&format!("t{release}"), 0.0)]);
        let copies = format!("s{release}");
        weights["shadows"] = json!([{"name": copies, "deployment": format!("{copies}#D"), "share": 1.0}]);
        served.publish_split(&weights, &[("a", json!({}), vec![a.address.clone()])]);
        served.linked_ids(&["a"]);
        client.get("/");
        assert_eq!(client.response().text(), "a");
    }
    let counted: serde_json::Value = serde_json::from_str(&served.proxy.traffic()).expect("JSON");
    let known = |kind: &str| counted["/x"][kind].as_object().expect("by name").keys().cloned().collect::<Vec<_>>();
    for kind in ["targets", "shadows"] {
        assert!((256..262).contains(&known(kind).len()), "{:?}", known(kind));
    }
    assert!(known("targets").contains(&"t299".to_owned()) && !known("targets").contains(&"t0".to_owned()));
    assert_eq!(counted["/x"]["shadows"]["s299"]["dropped"]["not_ready"], 1);
    served.counts("targets", "a", "/requests", 300);
}
