//! A random walk of batches: no order of answers, refusals, deaths and cancellations loses, doubles or reorders a request.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::{
    batches::{MS, Timed, batched},
    *,
};

#[derive(Debug, Clone)]
enum Event {
    Request,
    Pass(u64),
    Answer(prop::sample::Index, usize),
    Busy(prop::sample::Index),
    Returned(prop::sample::Index),
    Unsent(prop::sample::Index),
    Credit(prop::sample::Index),
    Death(prop::sample::Index),
    Cancel(prop::sample::Index),
}

fn any_event() -> impl Strategy<Value = Event> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        9 => Just(Event::Request),
        4 => (0u64..12).prop_map(Event::Pass),
        5 => (index(), 1usize..5).prop_map(|(which, count)| Event::Answer(which, count)),
        1 => index().prop_map(Event::Busy),
        1 => index().prop_map(Event::Unsent),
        1 => index().prop_map(Event::Returned),
        1 => index().prop_map(Event::Credit),
        1 => index().prop_map(Event::Death),
        1 => index().prop_map(Event::Cancel),
    ]
}

proptest! {
    /// Whatever happens, every request is bound once a life and in order, no replica has more batches than slots, no slot
    /// stays empty while a batch is due, and when everything is paid and answered nobody is left waiting.
    #[test]
    fn nothing_is_lost_doubled_or_reordered_and_slots_add_up(
        events in prop::collection::vec(any_event(), 0..200),
        max_size in 1usize..5, wait in 0u64..8, concurrent in 1u32..3,
    ) {
        const IDS: [&str; 2] = ["r", "s"];
        let mut timed = Timed::new(&batched(max_size, MS * wait as u32, concurrent, &IDS));
        let (mut next, mut ended, mut places) = (0, 0, HashMap::<u32, Place>::new());
        // Batches at replicas, each with whether it was granted; and what each replica owes.
        let mut running: Vec<Vec<(u32, Lease)>> = Vec::new();
        let mut owed: HashMap<ReplicaKey, u32> = HashMap::new();
        for event in events {
            match event {
                Event::Request => {
                    places.insert(next, timed.request(next));
                    next += 1;
                }
                Event::Pass(ms) => timed.now += MS * ms as u32,
                Event::Answer(which, count) if !running.is_empty() => {
                    let at = which.index(running.len());
                    for _ in 0..count.min(running[at].len()) {
                        let (_, lease) = running[at].pop().expect("counted");
                        timed.it.engine.answered(lease, Some((0, true)));
                        ended += 1;
                    }
                }
                Event::Busy(which) | Event::Returned(which) | Event::Unsent(which) if !running.is_empty() => {
                    let items = running.remove(which.index(running.len()));
                    let key = items.first().map(|(_, lease)| lease.replica);
                    if let (Event::Busy(_), Some(key)) = (&event, key) {
                        *owed.entry(key).or_default() += 1;
                    }
                    for (waiter, lease) in items {
                        let place = match event {
                            Event::Busy(_) => timed.it.engine.busy(lease, 0),
                            Event::Returned(_) => timed.it.engine.returned(lease),
                            _ => {
                                let place = lease.place;
                                timed.it.engine.unsent(lease);
                                place
                            }
                        };
                        places.insert(waiter, place);
                        timed.it.again(place, waiter);
                    }
                    if let (Event::Returned(_), Some(key)) = (&event, key) {
                        // It drains; what runs there ends with it, and another comes in its place.
                        die(&mut timed, key, &mut running, &mut ended);
                        owed.remove(&key);
                        timed.it.engine.replicas[key.0].draining = false;
                        relink(&mut timed, key, concurrent);
                    }
                }
                Event::Credit(which) => {
                    let key = timed.it.keys[IDS[which.index(2)]];
                    if owed.get(&key).is_some_and(|&owed| owed > 0) {
                        *owed.entry(key).or_default() -= 1;
                        timed.it.engine.credit(key, 1);
                    }
                }
                Event::Death(which) => {
                    let key = timed.it.keys[IDS[which.index(2)]];
                    die(&mut timed, key, &mut running, &mut ended);
                    owed.remove(&key);
                    relink(&mut timed, key, concurrent);
                }
                Event::Cancel(which) if !places.is_empty() => {
                    let waiter = *which.get(&places.keys().copied().collect::<Vec<_>>());
                    if timed.it.engine.cancel(places[&waiter]).is_some() {
                        places.remove(&waiter);
                        ended += 1;
                    }
                }
                _ => {}
            }
            timed.it.settle();
            timed.seal();
            for batch in std::mem::take(&mut timed.it.batches) {
                let seqs: Vec<_> = batch.items.iter().map(|(_, lease)| lease.place.seq).collect();
                prop_assert!(seqs.is_sorted() && seqs.len() <= max_size && !seqs.is_empty());
                for (waiter, lease) in &batch.items {
                    prop_assert!(places.remove(waiter).is_some(), "bound once a life");
                    prop_assert_eq!(lease.replica, batch.items[0].1.replica);
                }
                let earlier = places.values().filter(|place| place.seq < seqs[seqs.len() - 1]).count();
                prop_assert_eq!(earlier, 0, "nobody is passed");
                running.push(batch.items);
            }
            running.retain(|items| !items.is_empty());
            let (mut plain, mut all) = (HashMap::<ReplicaKey, u32>::new(), HashMap::<ReplicaKey, u32>::new());
            for items in &running {
                *plain.entry(items[0].1.replica).or_default() += u32::from(!items[0].1.granted);
                *all.entry(items[0].1.replica).or_default() += 1;
            }
            for key in timed.it.keys.values() {
                let replica = &timed.it.engine.replicas[key.0];
                prop_assert!(plain.get(key).is_none_or(|&count| count <= concurrent));
                prop_assert_eq!(replica.in_flight, *all.get(key).unwrap_or(&0), "one slot a batch");
                prop_assert_eq!(replica.batches.len() as u32, replica.in_flight);
            }
            let free = timed.it.keys.values().any(|key| timed.it.engine.replicas[key.0].has_room());
            if free {
                prop_assert!(places.len() < max_size, "a full batch waits for nothing");
                prop_assert!(places.is_empty() || timed.next.is_some(), "what waits for its window has an alarm");
            }
        }
        for (key, owed) in owed {
            timed.it.engine.credit(key, owed);
        }
        let mut seen = HashSet::new();
        for _ in 0..1000 {
            timed.pass(10 * MS);
            running.extend(std::mem::take(&mut timed.it.batches).into_iter().map(|batch| batch.items));
            let Some(items) = running.pop() else { break };
            for (waiter, lease) in items {
                prop_assert!(seen.insert(waiter));
                timed.it.engine.answered(lease, None);
                ended += 1;
            }
        }
        prop_assert_eq!((ended, timed.it.engine.queued(timed.it.key)), (next, 0));
        prop_assert!(timed.next.is_none() && timed.it.engine.due_is_empty());
    }
}

fn die(timed: &mut Timed, key: ReplicaKey, running: &mut Vec<Vec<(u32, Lease)>>, ended: &mut u32) {
    timed.it.engine.closed(key);
    running.retain(|items| {
        let dead = items.first().is_some_and(|(_, lease)| lease.replica == key);
        *ended += if dead { items.len() as u32 } else { 0 };
        !dead
    });
}

fn relink(timed: &mut Timed, key: ReplicaKey, slots: u32) {
    timed.it.engine.linked(key, slots);
    timed.it.settle();
}

impl<W> Engine<W> {
    fn due_is_empty(&self) -> bool {
        self.due == Due::default()
    }
}
