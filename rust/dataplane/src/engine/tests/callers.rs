//! Several callers with the batches of one deployment, and their replicas' limits: what they share are slots, by BUSY and
//! CREDIT alone. Frames keep their order on each link and no other.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use proptest::prelude::*;

use super::{
    batches::{MS, Timed, batched},
    *,
};
use crate::engine::limit::{Limit, Next};

const CALLERS: usize = 3;
const REPLICAS: [&str; 2] = ["r", "s"];

enum Up {
    Batch(usize, bool),
    Unused,
}

enum Down {
    Busy(usize),
    Answer(usize),
    Credit,
}

#[derive(Default)]
struct Wire {
    up: VecDeque<Up>,
    down: VecDeque<Down>,
}

struct World {
    callers: Vec<Timed>,
    limits: Vec<Limit>,
    /// By caller, then replica.
    wires: Vec<Vec<Wire>>,
    /// Batches that callers have out.
    out: HashMap<usize, Vec<(u32, Lease)>>,
    batches: usize,
    /// By replica, the batches that run: whose, and which.
    running: Vec<VecDeque<(usize, usize)>>,
    /// By replica: how many have begun.
    begun: Vec<usize>,
    /// By link, how many had begun where a batch was refused that no credit has followed.
    refused: HashMap<(usize, usize), VecDeque<usize>>,
    /// By request: how often it was sent, run and answered.
    requests: Vec<(usize, usize, usize)>,
}

impl World {
    fn new(replicas: usize, max_size: usize, wait: Duration, concurrent: usize) -> Self {
        let snapshot = batched(max_size, wait, concurrent as u32, &REPLICAS[..replicas]);
        let wires = || (0..replicas).map(|_| Wire::default()).collect();
        Self {
            callers: (0..CALLERS).map(|_| Timed::new(&snapshot)).collect(),
            limits: (0..replicas).map(|_| Limit::new(concurrent)).collect(),
            wires: (0..CALLERS).map(|_| wires()).collect(),
            out: HashMap::new(),
            batches: 0,
            running: vec![VecDeque::new(); replicas],
            begun: vec![0; replicas],
            refused: HashMap::new(),
            requests: Vec::new(),
        }
    }

    fn arrive(&mut self, caller: usize) {
        self.callers[caller].request(self.requests.len() as u32);
        self.requests.push((0, 0, 0));
        self.send(caller);
    }

    fn pass(&mut self, time: Duration) {
        for caller in 0..CALLERS {
            self.callers[caller].now += time;
            self.send(caller);
        }
    }

    /// What an event has made a caller send.
    fn send(&mut self, caller: usize) {
        let timed = &mut self.callers[caller];
        timed.it.settle();
        timed.seal();
        let at = |key| REPLICAS.iter().position(|id| timed.it.keys.get(*id) == Some(&key)).expect("known");
        for Batch { items, .. } in std::mem::take(&mut timed.it.batches) {
            for (waiter, _) in &items {
                self.requests[*waiter as usize].0 += 1;
            }
            let (replica, granted) = (at(items[0].1.replica), items[0].1.granted);
            self.out.insert(self.batches, items);
            self.wires[caller][replica].up.push_back(Up::Batch(self.batches, granted));
            self.batches += 1;
        }
        for key in std::mem::take(&mut timed.it.unused) {
            self.wires[caller][at(key)].up.push_back(Up::Unused);
        }
    }

    /// A replica reads a frame; `false`: there is none.
    fn deliver_up(&mut self, caller: usize, replica: usize) -> bool {
        let Some(frame) = self.wires[caller][replica].up.pop_front() else { return false };
        match frame {
            Up::Batch(batch, granted) if self.limits[replica].admit_batch(caller, granted) => {
                self.begun[replica] += 1;
                self.running[replica].push_back((caller, batch));
                for (waiter, _) in &self.out[&batch] {
                    self.requests[*waiter as usize].1 += 1;
                }
            }
            Up::Batch(batch, _) => {
                self.wires[caller][replica].down.push_back(Down::Busy(batch));
                self.refused.entry((caller, replica)).or_default().push_back(self.begun[replica]);
            }
            Up::Unused => self.limits[replica].unused(caller, 1),
        }
        self.grant(replica);
        true
    }

    fn finish(&mut self, replica: usize) -> bool {
        let Some((caller, batch)) = self.running[replica].pop_front() else { return false };
        self.wires[caller][replica].down.push_back(Down::Answer(batch));
        self.limits[replica].finished(5 * MS);
        self.grant(replica);
        true
    }

    fn grant(&mut self, replica: usize) {
        while let Some(next) = self.limits[replica].next_free() {
            let Next::Grant(caller) = next else { panic!("no batch is held") };
            self.wires[caller][replica].down.push_back(Down::Credit);
            let since = self.refused.get_mut(&(caller, replica)).and_then(VecDeque::pop_front).expect("it is owed");
            let others = self.begun[replica] - since;
            assert!(others <= CALLERS * self.limits[replica].limit(), "{others} were begun while it was owed a slot");
        }
    }

    /// A caller reads a frame.
    fn deliver_down(&mut self, caller: usize, replica: usize) -> bool {
        let Some(frame) = self.wires[caller][replica].down.pop_front() else { return false };
        let it = &mut self.callers[caller].it;
        match frame {
            Down::Credit => it.engine.credit(it.keys[REPLICAS[replica]], 1),
            Down::Answer(batch) => {
                for (waiter, lease) in self.out.remove(&batch).expect("it is out") {
                    it.engine.answered(lease, Some((1, false)));
                    self.requests[waiter as usize].2 += 1;
                }
            }
            Down::Busy(batch) => {
                for (waiter, lease) in self.out.remove(&batch).expect("it is out") {
                    let place = it.engine.busy(lease, 1);
                    it.again(place, waiter);
                }
            }
        }
        self.send(caller);
        true
    }

    /// Everything that can happen happens, in any order, until nothing can.
    fn end(&mut self, mut order: fastrand::Rng) {
        let links = (0..CALLERS).flat_map(|caller| (0..self.limits.len()).map(move |replica| (caller, replica)));
        let mut moves: Vec<_> = links.flat_map(|link| (0..3).map(move |which| (which, link))).collect();
        for _ in 0..10_000 {
            order.shuffle(&mut moves);
            let moved = moves.iter().filter(|(which, (caller, replica))| match which {
                0 => self.deliver_up(*caller, *replica),
                1 => self.deliver_down(*caller, *replica),
                _ => self.finish(*replica),
            });
            if moved.count() == 0 && self.callers.iter().all(|caller| caller.next.is_none()) {
                return;
            }
            self.pass(10 * MS);
        }
        panic!("it goes on for ever");
    }
}

proptest! {
    /// However full the replicas are: each request runs once, and a caller that was refused is passed by no more batches than
    /// others were owed or had. A lone replica refuses a request at most once for each batch that it runs at once. (Of several
    /// each may refuse it again while the last one's credit is on the way.)
    #[test]
    fn a_batch_that_is_refused_waits_its_turn_and_runs_once(
        events in prop::collection::vec((0u8..12, 0..CALLERS, 0..REPLICAS.len()), 0..400),
        replicas in 1..=REPLICAS.len(), max_size in 1usize..5, wait in 0u32..8, concurrent in 1usize..3, order in any::<u64>(),
    ) {
        let mut world = World::new(replicas, max_size, MS * wait, concurrent);
        for (event, caller, replica) in events {
            let replica = replica % replicas;
            match event {
                0..5 => world.arrive(caller),
                5..7 => drop(world.deliver_up(caller, replica)),
                7..9 => drop(world.deliver_down(caller, replica)),
                9 | 10 => drop(world.finish(replica)),
                _ => world.pass(2 * MS),
            }
            for (replica, limit) in world.limits.iter().enumerate() {
                prop_assert!(world.running[replica].len() == limit.running() && limit.running() <= concurrent);
            }
        }
        world.end(fastrand::Rng::with_seed(order));
        for &(sent, run, answered) in &world.requests {
            prop_assert_eq!((run, answered), (1, 1));
            prop_assert!(replicas > 1 || sent <= 1 + concurrent, "sent {} times", sent);
        }
        prop_assert!(world.limits.iter().all(|limit| limit.running() == 0 && !limit.owes()));
    }
}
