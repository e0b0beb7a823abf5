//! What a raw client gets: routing, ids, framing, connections, the proxy's own pages.

mod support;

use rayserve_dataplane::wire::{Kind, flag};
use serde_json::json;
use support::{Served, eventually};

#[test]
fn a_request_reaches_the_replica_with_everything_that_the_client_said() {
    let served = Served::empty(json!({"root_path": "/root"}));
    let replica = support::Replica::start(served.dir.path(), "r", 5);
    served.publish_routes(
        &json!([{"prefix": "/app", "app": "default", "deployment": "default#D"}]),
        json!({}),
        &[&replica],
    );
    served.linked(&[&replica]);
    let mut client = served.client();
    client.send(b"GET /app/a%20b?x=1&y=%2F HTTP/1.1\r\nHost: h\r\nX-Latin: caf\xe9\r\nX-Request-ID: mine\r\ncontent-length: 4\r\n\r\nbody");
    let got = replica.request();
    let head = &got.head;
    assert_eq!((head.method(), head.path(), head.query()), (&b"GET"[..], &b"/root/app/a%20b"[..], &b"x=1&y=%2F"[..]));
    assert_eq!((head.root_path(), head.route(), head.request_id()), (&b"/root/app"[..], &b"/app"[..], &b"mine"[..]));
    let local = client.socket.local_addr().expect("bound");
    assert_eq!(
        (head.client(), head.server()),
        ((&b"127.0.0.1"[..], local.port()), (&b"127.0.0.1"[..], served.address.port()))
    );
    assert_eq!((head.http_version, head.https, got.is_whole(), &head.body()[..]), (11, false, true, &b"body"[..]));
    let headers = got.headers();
    assert_eq!((&headers["x-latin"][..], &headers["host"][..]), (&b"caf\xe9"[..], &b"h"[..]));
    replica.head(&got, 201, &[("x-a", "1"), ("x-a", "2"), ("x-bad name", "3")], flag::FIN, b"hello");
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (201, "hello"));
    let named = |name| response.headers.iter().filter(|(other, _)| other == name).count();
    assert_eq!((named("x-a"), named("x-bad name"), named("date")), (2, 0, 1));
    assert_eq!(response.header("x-request-id"), Some("mine"));
}

#[test]
fn a_request_without_an_id_gets_a_version_4_uuid_in_its_headers_and_its_answer() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    let mut ids = Vec::new();
    for _ in 0..2 {
        client.get("/");
        let got = replica.request();
        replica.answer(&got, "");
        let id = client.response().header("x-request-id").expect("an id").to_owned();
        assert_eq!(got.headers()["x-request-id"], id.as_bytes());
        assert_eq!(got.head.request_id(), id.as_bytes());
        let parts: Vec<_> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert!(id.as_bytes()[14] == b'4' && b"89ab".contains(&id.as_bytes()[19]), "{id}");
        ids.push(id);
    }
    assert_ne!(ids[0], ids[1]);
}

#[test]
fn paths_without_a_route_are_told_where_to_look() {
    let served = Served::empty(json!({"root_path": "/root"}));
    served.publish_routes(&json!([{"prefix": "/x", "app": "a", "deployment": "default#D"}]), json!({}), &[]);
    let mut client = served.client();
    for (path, shown) in [("/xy", "/root/xy"), ("/%41%20", "/root/A ")] {
        client.get(path);
        let response = client.response();
        assert_eq!(response.status, 404);
        assert_eq!(response.header("content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(
            response.text(),
            format!("Path '{shown}' not found. Ping http://.../-/routes for available routes.")
        );
    }
}

#[test]
fn the_proxys_own_pages_have_the_known_bodies() {
    let served = Served::empty(json!({}));
    let mut client = served.client();
    for path in ["/-/routes", "/-/healthz"] {
        client.get(path);
        let response = client.response();
        assert_eq!((response.status, response.text().as_str()), (503, "Route table is not populated yet."));
    }
    served.publish(json!({}), &[]);
    eventually(
        "the snapshot is applied",
        || {
            client.get("/-/healthz");
            client.response().status == 200
        },
        String::new,
    );
    client.get("/-/routes");
    let response = client.response();
    assert_eq!(
        (response.text().as_str(), response.header("content-type")),
        (r#"{"/":"default"}"#, Some("application/json"))
    );
    client.post("/-/healthz", b"");
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (200, "success"));
    assert_eq!(response.header("content-type"), Some("text/plain; charset=utf-8"));
    assert!(response.header("x-request-id").is_some());
    served.proxy.drain();
    client.get("/-/healthz");
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (503, "This node is being drained."));
}

#[test]
fn pipelined_requests_are_answered_in_order_on_one_connection() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("GET /1 HTTP/1.1\r\nhost: h\r\n\r\nPOST /2 HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\nhiGET /3 HTTP/1.1\r\nhost: h\r\n\r\n");
    for path in ["/1", "/2", "/3"] {
        let got = replica.request();
        assert_eq!(got.head.path(), path.as_bytes());
        replica.answer(&got, path);
    }
    for path in ["/1", "/2", "/3"] {
        assert_eq!(client.response().text(), path);
    }
    assert_eq!(served.counter("accepted"), 1);
}

#[test]
fn connection_close_and_http_1_0_end_the_connection() {
    let (served, replica) = Served::one();
    for head in ["GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n", "GET / HTTP/1.0\r\n\r\n"] {
        let mut client = served.client();
        client.send(head);
        let got = replica.request();
        assert_eq!(got.head.http_version, if head.contains("1.0") { 10 } else { 11 });
        replica.answer(&got, "bye");
        assert_eq!(client.response().text(), "bye");
        assert!(client.is_closed());
    }
}

#[test]
fn a_streamed_answer_to_http_1_0_ends_with_the_connection() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("GET / HTTP/1.0\r\n\r\n");
    let got = replica.request();
    replica.head(&got, 200, &[], 0, b"a");
    replica.chunk(&got, b"b", flag::FIN);
    assert_eq!(client.head().header("transfer-encoding"), None);
    assert_eq!(client.rest(), b"ab");
}

#[test]
fn head_gets_the_length_and_no_body_and_the_handler_is_not_cancelled() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("HEAD / HTTP/1.1\r\nhost: h\r\n\r\n");
    let got = replica.request();
    replica.answer(&got, "hello");
    assert_eq!(client.head().header("content-length"), Some("5"));
    client.send("HEAD / HTTP/1.1\r\nhost: h\r\n\r\n");
    let got = replica.request();
    replica.head(&got, 200, &[("content-length", "400000")], 0, b"");
    assert_eq!(client.head().header("content-length"), Some("400000"));
    for _ in 0..12 {
        replica.chunk(&got, &vec![0; 32 * 1024], 0);
    }
    replica.chunk(&got, b"", flag::FIN);
    served.settles("streams", 0);
    assert_eq!(served.counter("cancelled"), 0);
    client.get("/next");
    loop {
        let (link, frame) = replica.next();
        if frame.header.kind == Kind::Request {
            let head = rayserve_dataplane::wire::RequestHeadView::parse(frame.payload).expect("a head");
            assert_eq!(head.path(), b"/next");
            replica.answer(&support::replica::Got { link, header: frame.header, head }, "");
            break;
        }
        assert_eq!(frame.header.kind, Kind::Window);
    }
    assert_eq!(client.response().status, 200);
}

#[test]
fn a_handler_that_answers_head_without_end_is_cancelled_in_time() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("HEAD / HTTP/1.1\r\nhost: h\r\nx-request-timeout-seconds: 1\r\n\r\n");
    let got = replica.request();
    replica.head(&got, 200, &[("content-type", "text/event-stream")], 0, b"");
    assert_eq!(client.head().status, 200);
    replica.expect(Kind::Cancel);
    replica.chunk_end(&got);
    served.settles("streams", 0);
}

#[test]
fn an_absolute_target_is_routed_by_its_path() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.send("GET http://example.com/a?b HTTP/1.1\r\nhost: h\r\n\r\n");
    let got = replica.request();
    assert_eq!((got.head.path(), got.head.query()), (&b"/a"[..], &b"b"[..]));
    replica.answer(&got, "");
    assert_eq!(client.response().status, 200);
}

#[test]
fn a_websocket_upgrade_is_refused_in_words() {
    let (served, _replica) = Served::one();
    let mut client = served.client();
    client.send("GET / HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n\r\n");
    let response = client.response();
    assert_eq!(response.status, 501);
    assert!(response.text().contains("WebSocket"));
}

#[test]
fn a_tunnel_is_refused() {
    let (served, _replica) = Served::one();
    let mut client = served.client();
    client.send("CONNECT example.com:443 HTTP/1.1\r\nhost: h\r\n\r\n");
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (400, "Invalid HTTP request received."));
    assert!(client.is_closed());
}

#[test]
fn an_idle_connection_is_closed_and_a_busy_one_is_not() {
    let (served, replicas) = Served::with(json!({"keep_alive_timeout_s": 0.2}), json!({}), 1);
    let (mut idle, mut busy) = (served.client(), served.client());
    idle.get("/");
    let got = replicas[0].request();
    replicas[0].answer(&got, "");
    assert_eq!(idle.response().status, 200);
    busy.get("/");
    let got = replicas[0].request();
    assert!(idle.is_closed());
    replicas[0].answer(&got, "late");
    assert_eq!(busy.response().text(), "late");
}

#[test]
fn without_a_keep_alive_time_an_answer_ends_its_connection_and_an_early_one_may_wait() {
    let (served, replicas) = Served::with(json!({"keep_alive_timeout_s": 0}), json!({}), 1);
    let mut client = served.client();
    std::thread::sleep(std::time::Duration::from_millis(100)); // many looks at idle connections
    client.get("/");
    let got = replicas[0].request();
    replicas[0].answer(&got, "only");
    let response = client.response();
    assert_eq!((response.text().as_str(), response.header("connection")), ("only", Some("close")));
    assert!(client.is_closed());
}

#[test]
fn the_status_line_says_what_the_handler_said_if_it_is_an_end() {
    let (served, replica) = Served::one();
    for (status, line) in [
        (204, "HTTP/1.1 204 No Content"),
        (299, "HTTP/1.1 299 "),
        (100, "HTTP/1.1 500 Internal Server Error"),
        (101, "HTTP/1.1 500 Internal Server Error"),
        (1000, "HTTP/1.1 500 Internal Server Error"),
    ] {
        let mut client = served.client();
        client.send("GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        let got = replica.request();
        replica.head(&got, status, &[], flag::FIN, b"");
        let rest = String::from_utf8(client.rest()).expect("text");
        assert!(rest.starts_with(&format!("{line}\r\n")), "{rest}");
    }
}

#[test]
fn a_wrong_content_length_of_the_handler_never_reads_as_a_whole_answer() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[("content-length", "10")], flag::FIN, b"short");
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (500, "Internal Server Error"));
    client.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[("content-length", "10")], 0, b"sh");
    assert_eq!(client.head().header("content-length"), Some("10"));
    replica.chunk(&got, b"ort", flag::FIN);
    assert!(client.rest().len() < 10, "and then the connection ends");
}

#[test]
fn a_taken_port_is_an_error_that_names_it() {
    let served = Served::empty(json!({}));
    let port = served.address.port();
    let other = rayserve_dataplane::proxy::Proxy::new(support::config(json!({"port": port})));
    let error = other.start().expect_err("the port is taken").to_string();
    assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("HTTPOptions.port"), "{error}");
}

#[test]
fn a_restarted_proxy_serves_what_its_predecessor_knew() {
    let dir = support::Dir::new();
    let path = dir.path().join("snapshot.json");
    let changes = json!({"snapshot_path": path});
    let (first, replicas) = Served::with(changes.clone(), json!({}), 1);
    first.proxy.shutdown(support::PATIENCE);
    let second = Served::empty(changes);
    second.linked(&[&replicas[0]]);
    let mut client = second.client();
    client.get("/");
    let got = replicas[0].request();
    replicas[0].answer(&got, "again");
    assert_eq!(client.response().text(), "again");
    assert!(!second.publish(json!({}), &[]), "the kept version counts");
}

#[test]
fn shutdown_lets_a_request_finish_and_takes_no_new_connection() {
    let (served, replica) = Served::one();
    let mut client = served.client();
    client.get("/");
    let got = replica.request();
    std::thread::scope(|scope| {
        let shutdown = scope.spawn(|| served.proxy.shutdown(support::PATIENCE));
        eventually("the port is closed", || std::net::TcpStream::connect(served.address).is_err(), String::new);
        replica.answer(&got, "done");
        assert_eq!(client.response().text(), "done");
        assert!(client.is_closed());
        shutdown.join().expect("shutdown returns");
    });
}

#[test]
fn a_shutdown_that_does_not_wait_ends_what_is_under_way() {
    let (served, replica) = Served::one();
    let (mut upload, mut download, mut queued) = (served.client(), served.client(), served.client());
    upload.send("POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n");
    replica.request();
    replica.expect(Kind::Body);
    download.get("/");
    let got = replica.request();
    replica.head(&got, 200, &[], 0, b"");
    assert_eq!(download.head().status, 200);
    queued.send("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\npart");
    served.settles("requests", 3);
    served.proxy.shutdown(std::time::Duration::ZERO);
    assert!(upload.is_closed() && download.is_closed() && queued.is_closed());
    assert_eq!(served.counter("connections"), 0);
}

#[test]
fn shards_share_the_port_and_each_has_its_link() {
    let (served, replicas) = Served::with(json!({"shards": 3}), json!({}), 1);
    assert_eq!(served.counter("links"), 3);
    for _ in 0..20 {
        let mut client = served.client();
        client.get("/");
        let got = replicas[0].request();
        replicas[0].answer(&got, "");
        assert_eq!(client.response().status, 200);
    }
}
