//! A random walk of the engine that holds its invariants: nothing is lost, and no limit is passed.

use std::collections::HashMap;

use proptest::prelude::*;

use super::{Driver, ReplicaKey, snapshot};

#[derive(Debug, Clone)]
enum Event {
    Request,
    Finish(prop::sample::Index),
    Busy(prop::sample::Index),
    Credit(prop::sample::Index),
    Death(prop::sample::Index),
    Cancel(prop::sample::Index),
}

fn any_event() -> impl Strategy<Value = Event> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => Just(Event::Request),
        4 => index().prop_map(Event::Finish),
        1 => index().prop_map(Event::Busy),
        1 => index().prop_map(Event::Credit),
        1 => index().prop_map(Event::Death),
        1 => index().prop_map(Event::Cancel),
    ]
}

proptest! {
    /// Whatever happens, every request is started once a life, no replica is above its limit, and when everything is paid
    /// and finished nobody is left waiting.
    #[test]
    fn nothing_is_lost_and_no_limit_is_passed(events in prop::collection::vec(any_event(), 0..200)) {
        const IDS: [&str; 3] = ["r", "s", "t"];
        let mut driver = Driver::linked(&snapshot(1, 2, -1, &IDS));
        let (mut next, mut waiting, mut done) = (0, HashMap::new(), 0);
        let mut owed: HashMap<ReplicaKey, u32> = HashMap::new();
        for event in events {
            match event {
                Event::Request => {
                    if let Some(place) = driver.request(next).expect("no limit") {
                        waiting.insert(next, place);
                    }
                    next += 1;
                }
                Event::Finish(which) if !driver.started.is_empty() => {
                    let (_, lease) = driver.started.remove(which.index(driver.started.len()));
                    driver.engine.answered(lease, None);
                    done += 1;
                }
                Event::Busy(which) if !driver.started.is_empty() => {
                    let (waiter, lease) = driver.started.remove(which.index(driver.started.len()));
                    *owed.entry(lease.replica).or_default() += 1;
                    let place = driver.engine.busy(lease, 0);
                    waiting.insert(waiter, place);
                    driver.again(place, waiter);
                }
                Event::Credit(which) => {
                    let key = driver.keys[IDS[which.index(3)]];
                    if owed.get(&key).is_some_and(|&owed| owed > 0) {
                        *owed.entry(key).or_default() -= 1;
                        driver.engine.credit(key, 1);
                    }
                }
                Event::Death(which) => {
                    let key = driver.keys[IDS[which.index(3)]];
                    driver.engine.closed(key);
                    owed.remove(&key);
                    let (dead, alive): (Vec<_>, Vec<_>) =
                        driver.started.drain(..).partition(|(_, lease)| lease.replica == key);
                    driver.started = alive;
                    done += dead.len() as u32;
                    driver.link(IDS[which.index(3)], 2);
                }
                Event::Cancel(which) if !waiting.is_empty() => {
                    let waiter = *which.get(&waiting.keys().copied().collect::<Vec<_>>());
                    if driver.engine.cancel(waiting[&waiter]).is_some() {
                        done += 1;
                    }
                }
                _ => {}
            }
            driver.settle();
            waiting.retain(|waiter, _| !driver.waiters().contains(waiter));
            for key in driver.keys.values() {
                let running = driver.started.iter().filter(|(_, lease)| lease.replica == *key && !lease.granted).count();
                prop_assert!(running <= 2);
            }
        }
        for (key, owed) in owed {
            driver.engine.credit(key, owed);
            driver.settle();
        }
        while !driver.started.is_empty() {
            driver.finish_first();
            done += 1;
        }
        prop_assert_eq!(done, next);
        prop_assert_eq!(driver.engine.queued(driver.key), 0);
    }
}
