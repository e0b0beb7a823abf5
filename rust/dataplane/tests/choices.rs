//! Requests whose replica a router outside chooses: what it is told of them, and of their ends.

mod support;

use rayserve_dataplane::{
    engine::Assigned,
    proxy::Choice,
    wire::{Kind, flag},
};
use serde_json::{Value, json};
use support::{Client, Replica, Served, eventually, replica::Got};

/// A deployment whose router is the test.
fn by_router() -> Value {
    json!({"max_ongoing_requests": 1, "router": {"policy": "custom", "custom": "r"}})
}

/// A proxy and one replica of such a deployment.
fn routed() -> (Served, Replica) {
    let (served, mut replicas) = Served::with(json!({}), by_router(), 1);
    (served, replicas.remove(0))
}

/// What a router is told, until there is enough of it.
fn told(served: &Served, enough: impl Fn(&[Choice], &[u64]) -> bool) -> (Vec<Choice>, Vec<u64>) {
    let (mut asked, mut ended) = (Vec::new(), Vec::new());
    let come = || {
        let (choices, ends) = served.proxy.choices();
        asked.extend(choices);
        ended.extend(ends);
        enough(&asked, &ended)
    };
    eventually("a router is told", come, || format!("{:?}", served.proxy.counters()));
    (asked, ended)
}

/// The next request that is to be routed; nothing has ended meanwhile.
fn asked(served: &Served) -> Choice {
    let (mut asked, ended) = told(served, |asked, _| !asked.is_empty());
    assert_eq!((asked.len(), ended), (1, vec![]));
    asked.remove(0)
}

/// The requests that have ended, once there are any.
fn ended(served: &Served) -> Vec<u64> {
    let (asked, ended) = told(served, |_, ended| !ended.is_empty());
    assert_eq!(asked, []);
    ended
}

fn to_r0(served: &Served, number: u64) {
    assert_eq!(served.proxy.assign(number, vec![vec!["r0".into()]]), Assigned::To("r0".into()));
}

/// A client's request that was routed to the replica.
fn running(served: &Served, replica: &Replica) -> (Client, Choice, Got) {
    let mut client = served.client();
    client.get("/");
    let choice = asked(served);
    to_r0(served, choice.number);
    (client, choice, replica.request())
}

#[test]
fn the_end_of_a_routed_request_is_told_once_its_whole_answer_has_come() {
    let (served, replica) = routed();
    let (mut client, choice, got) = running(&served, &replica);
    replica.head(&got, 200, &[], 0, b"");
    assert_eq!(client.head().status, 200);
    assert_eq!(served.proxy.choices(), (vec![], vec![]), "the answer is still on its way");
    replica.chunk(&got, b"end", flag::FIN);
    assert_eq!((client.next_chunk(), client.next_chunk()), (b"end".to_vec(), vec![]));
    assert_eq!(ended(&served), [choice.number]);
    client.get("/");
    let second = asked(&served);
    to_r0(&served, second.number);
    replica.answer(&replica.request(), "whole");
    assert_eq!(client.response().text(), "whole");
    assert_eq!(ended(&served), [second.number]);
}

#[test]
fn a_client_that_leaves_ends_what_was_routed_and_nothing_else() {
    let (served, replica) = routed();
    let (runs, first, got) = running(&served, &replica);
    let mut waits = served.client();
    waits.get("/");
    let second = asked(&served);
    assert_eq!(served.proxy.assign(second.number, vec![vec!["r0".into()]]), Assigned::Full);
    waits.hang_up();
    served.settles("requests_open", 1);
    eventually("it is over", || served.proxy.assign(second.number, vec![]) == Assigned::Over, String::new);
    runs.hang_up();
    replica.expect(Kind::Cancel);
    replica.chunk_end(&got);
    assert_eq!(ended(&served), [first.number], "of the one that was never assigned nothing is said");
}

#[test]
fn a_request_that_left_before_anybody_looked_is_not_asked_about() {
    let (served, _replica) = routed();
    let (mut leaves, mut stays) = (served.client(), served.client());
    leaves.get("/1");
    served.settles("queued", 1);
    leaves.hang_up();
    served.settles("requests_open", 0);
    stays.get("/2");
    served.settles("queued", 2);
    let (fresh, ended) = served.proxy.choices();
    assert_eq!((fresh.len(), fresh[0].number, ended), (1, 1, vec![]));
}

#[test]
fn a_refused_request_has_ended_there_before_the_router_is_asked_again() {
    let (served, replica) = routed();
    let (mut client, first, got) = running(&served, &replica);
    replica.send(&got, Kind::Busy, 0, 0, b"");
    let (again, ends) = told(&served, |asked, _| !asked.is_empty());
    assert_eq!((ends, &*again[0].request_id), (vec![first.number], &*first.request_id));
    replica.write(got.link, rayserve_dataplane::wire::Header::new(Kind::Credit, 0).aux(1), b"");
    replica.expect(Kind::Unused);
    let number = again[0].number;
    eventually(
        "there is a credit",
        || served.proxy.assign(number, vec![vec!["r0".into()]]) != Assigned::Full,
        String::new,
    );
    replica.answer(&replica.request(), "second");
    assert_eq!(client.response().text(), "second");
    assert_eq!(ended(&served), [number]);
}

#[test]
fn those_who_wait_when_their_deployment_gets_a_router_are_routed_by_it() {
    let (served, _) = Served::with(json!({}), json!({}), 0);
    let mut client = served.client();
    client.get("/");
    served.settles("queued", 1);
    let replica = Replica::start(served.dir.path(), "r0", 1);
    served.publish(by_router(), &[&replica]);
    served.linked(&[&replica]);
    let choice = asked(&served);
    served.publish(by_router(), &[&replica]);
    to_r0(&served, choice.number);
    replica.answer(&replica.request(), "routed");
    assert_eq!(client.response().text(), "routed");
    assert_eq!(ended(&served), [choice.number]);
}
