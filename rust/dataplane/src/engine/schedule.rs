//! Who is next of several that have different shares: an exact schedule, not a random one.
//!
//! While shares stay, the turns that each has had never differ from its share of all turns by more than one. It is
//! Tijdeman's rule (The chairman assignment problem, 1980): among those that are far enough behind, the one next that would
//! be the first to fall too far behind. The classic smooth round-robin is off by more than one with many shares.
//!
//! A change of shares does not begin anew: what everybody is behind by then is carried over, at once as far as the promise
//! for the time after the change allows (for two: all of it), the rest at the changes to come. For two the sum over all
//! changes stays within half a turn. For more it has no proven bound and grows slowly with their number: simulated, with
//! shares that all change every few turns, to 3 to 4 turns for five after 200 changes and to 11 for eight after 20,000.
//! Who has no share for a while keeps what was owed. Numbers are integers, so that nothing drifts.
//!
//! All shards of a proxy take their turns in the same [`Schedules`], or the error would grow with their number: one short
//! lock a turn. Each says with its turn who has which weight, as shards may see different targets ready, or different
//! snapshots, for a moment.

use std::sync::{Arc, Mutex, PoisonError};

use crate::roster::Roster;

/// One turn.
const ONE: i64 = 1 << 50;
/// So many names that nobody has a seat of does a schedule remember; of more, those that are owed least are forgotten.
const ABSENT: usize = 64;

/// By split: what is owed by name outlives a target that leaves and comes back.
#[derive(Debug, Clone, Default)]
pub struct Schedules(Arc<Mutex<Roster<String, Mutex<Schedule>>>>);

impl Schedules {
    pub(super) fn of(&self, split: &str) -> Arc<Mutex<Schedule>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).of(split.to_owned())
    }
}

/// See the module. Entries are known by their place, which they keep while a [`Seat`] is held.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    entries: Vec<Entry>,
    /// What shares were made from: places, and their weights.
    places: Vec<usize>,
    weights: Vec<f64>,
    /// How far behind one must be to have a turn; the others' bound is as far below one turn.
    due: i64,
}

/// A place that nobody else gets while this lives.
#[derive(Debug)]
pub(super) struct Seat {
    place: usize,
    _name: Arc<str>,
}

#[derive(Debug)]
struct Entry {
    name: Arc<str>,
    /// Of each turn; 0: gets none.
    share: i64,
    /// The same as a divisor.
    pace: f64,
    /// What it should have had, less what it had; the sum over all shares is 0 between turns.
    lag: i64,
    /// The part of what it is behind that is not in `lag` yet.
    arrears: i64,
}

impl Schedule {
    /// The place of this name: the one that it had, if that is remembered.
    pub(super) fn seat(&mut self, name: &str) -> Seat {
        let known = self.entries.iter().position(|entry| *entry.name == *name);
        let place = known.unwrap_or_else(|| {
            let fresh = Entry { name: name.into(), share: 0, pace: 0.0, lag: 0, arrears: 0 };
            if let Some(place) = self.vacancy() {
                self.entries[place] = fresh;
                return place;
            }
            self.entries.push(fresh);
            self.entries.len() - 1
        });
        Seat { place, _name: Arc::clone(&self.entries[place].name) }
    }

    /// A place that may have another name, if there are too many of those.
    fn vacancy(&self) -> Option<usize> {
        // One whose seats are gone keeps its share until somebody else takes a turn.
        let is_absent = |entry: &Entry| entry.share == 0 && Arc::strong_count(&entry.name) == 1;
        let absent = self.entries.iter().enumerate().filter(|(_, entry)| is_absent(entry));
        let least = absent.clone().min_by_key(|(_, entry)| (entry.lag + entry.arrears).abs())?.0;
        (absent.count() >= ABSENT).then_some(least)
    }

    /// Gives the next turn among `seats`, in proportion to their `weights`, as an index of both; `None` if none is above 0.
    pub(super) fn turn(&mut self, seats: &[Seat], weights: &[f64]) -> Option<usize> {
        let places = seats.iter().map(|seat| seat.place);
        if self.weights != weights || !self.places.iter().copied().eq(places.clone()) {
            self.share(places.collect(), weights);
        }
        self.next()
    }

    /// Sets the shares; the same ones as before change nothing.
    fn share(&mut self, places: Vec<usize>, weights: &[f64]) {
        (self.places, self.weights) = (places, weights.to_vec());
        let mut all = vec![0; self.entries.len()];
        for (&place, share) in self.places.iter().zip(shares(weights)) {
            all[place] = share;
        }
        if self.entries.iter().map(|entry| entry.share).eq(all.iter().copied()) {
            return;
        }
        for (entry, share) in self.entries.iter_mut().zip(all) {
            entry.arrears += std::mem::take(&mut entry.lag);
            entry.share = share;
            entry.pace = 1.0 / as_float(share);
        }
        self.carry();
    }

    /// Takes up arrears. All lags within `due` of 0 leave room for everybody's deadline, as in Tijdeman's proof.
    fn carry(&mut self) {
        let mut sharing: Vec<_> = self.entries.iter_mut().filter(|entry| entry.share > 0).collect();
        let Ok(count) = i64::try_from(sharing.len()) else { return };
        self.due = if count > 1 { ONE / (2 * count - 2) } else { 0 };
        if count == 0 {
            return;
        }
        let mean = sharing.iter().map(|entry| entry.arrears).sum::<i64>() / count;
        let widest = sharing.iter().map(|entry| (entry.arrears - mean).abs()).max().unwrap_or(0);
        let mut sum = 0;
        for entry in &mut sharing {
            let behind = entry.arrears - mean;
            entry.lag = if widest > self.due {
                (i128::from(behind) * i128::from(self.due) / i128::from(widest)) as i64
            } else {
                behind
            };
            sum += entry.lag;
        }
        // What rounding has left over: some 2^-50 of a turn.
        sharing[0].lag -= sum;
        for entry in &mut sharing {
            entry.arrears -= entry.lag;
        }
    }

    /// Who is next, as an index of `places`, which hold everybody with a share; `None` if nobody has one.
    fn next(&mut self) -> Option<usize> {
        let (mut next, mut soonest) = (None, f64::INFINITY);
        for (at, &place) in self.places.iter().enumerate() {
            let entry = &mut self.entries[place];
            if entry.share == 0 {
                continue;
            }
            entry.lag += entry.share;
            if entry.lag >= self.due {
                let deadline = as_float(ONE - self.due - entry.lag) * entry.pace;
                if deadline < soonest {
                    (next, soonest) = (Some(at), deadline);
                }
            }
        }
        self.entries[self.places[next?]].lag -= ONE;
        next
    }
}

/// Parts of [`ONE`] in proportion to `weights`, whose sum it is if any is above 0.
fn shares(weights: &[f64]) -> Vec<i64> {
    let total: f64 = weights.iter().sum();
    if total <= 0.0 {
        return vec![0; weights.len()];
    }
    let mut shares: Vec<_> = weights.iter().map(|weight| (weight / total * as_float(ONE)).round() as i64).collect();
    let rest = ONE - shares.iter().sum::<i64>();
    if let Some(largest) = shares.iter_mut().max() {
        *largest += rest;
    }
    shares
}

#[expect(clippy::cast_precision_loss, reason = "turns are below 2^53")]
fn as_float(turns: i64) -> f64 {
    turns as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One whose places are indices.
    fn idle(entries: usize) -> Schedule {
        let mut schedule = Schedule::default();
        assert!((0..entries).all(|at| schedule.seat(&at.to_string()).place == at));
        schedule
    }

    fn share(schedule: &mut Schedule, weights: &[f64]) {
        schedule.share((0..weights.len()).collect(), weights);
    }

    fn fresh(weights: &[f64]) -> Schedule {
        let mut schedule = idle(weights.len());
        share(&mut schedule, weights);
        schedule
    }

    /// The largest difference between turns had and turns due, over every prefix of `turns` turns.
    fn error(schedule: &mut Schedule, weights: &[f64], turns: u32) -> f64 {
        let total: f64 = weights.iter().sum();
        let (mut had, mut worst) = (vec![0.0; weights.len()], 0.0_f64);
        for turn in 1..=turns {
            had[schedule.next().expect("somebody has a share")] += 1.0;
            for (had, weight) in had.iter().zip(weights) {
                worst = worst.max((weight / total * f64::from(turn) - had).abs());
            }
        }
        worst
    }

    fn weights() -> impl Strategy<Value = Vec<f64>> {
        let weight = prop_oneof![Just(0.0), (1_u32..1000).prop_map(f64::from), 0.0001..1.0];
        prop::collection::vec(weight, 1..12).prop_filter("somebody has a share", |all| all.iter().sum::<f64>() > 0.0)
    }

    #[test]
    fn two_to_one_alternates() {
        let mut schedule = fresh(&[2.0, 1.0]);
        let turns: Vec<_> = std::iter::from_fn(|| schedule.next()).take(6).collect();
        assert_eq!(turns, [0, 1, 0, 0, 1, 0]);
    }

    #[test]
    fn those_who_see_other_targets_take_turns_in_the_same_schedule() {
        let schedules = Schedules::default();
        assert!(Arc::ptr_eq(&schedules.of("/x"), &schedules.clone().of("/x")));
        let mut schedule = idle(0);
        let mut seats = |names: [&str; 3]| names.map(|name| schedule.seat(name));
        // The other order, and for a moment a third.
        let (abc, bac) = (seats(["a", "b", "c"]), seats(["b", "a", "c"]));
        let mut had = [0, 0];
        for round in 0..100 {
            match round {
                40..44 => assert!(schedule.turn(&bac, &[0.5, 0.5, 0.0]).is_some_and(|at| at < 2)),
                _ if round % 2 == 0 => had[schedule.turn(&abc[..2], &[0.5, 0.5]).expect("shares")] += 1,
                _ => had[1 - schedule.turn(&bac[..2], &[5.0, 5.0]).expect("shares")] += 1,
            }
        }
        assert!(had[0] == 48 && had[1] == 48, "{had:?}");
    }

    #[test]
    fn of_those_who_have_left_the_ones_that_are_owed_most_are_remembered() {
        let mut schedule = idle(0);
        let both = ["a", "b"].map(|name| schedule.seat(name));
        assert_eq!(schedule.turn(&both, &[0.5, 0.5]), Some(0));
        drop(both);
        for i in 0..1000 {
            let seats = ["a", &i.to_string()].map(|name| schedule.seat(name));
            assert_eq!(schedule.turn(&seats, &[1.0, 0.0]), Some(0));
        }
        assert_eq!(schedule.entries.len(), ABSENT + 1);
        let b = schedule.seat("b");
        let owed = &schedule.entries[b.place];
        assert_eq!((&*owed.name, owed.lag + owed.arrears), ("b", ONE / 2));
    }

    #[test]
    fn who_gets_the_place_of_a_forgotten_one_gets_nothing_else_of_it() {
        let mut schedule = idle(0);
        let leaves = [schedule.seat("leaves")];
        assert_eq!((leaves[0].place, schedule.turn(&leaves, &[1.0])), (0, Some(0)));
        drop(leaves);
        drop((0..2 * ABSENT).map(|i| schedule.seat(&i.to_string())).collect::<Vec<_>>());
        let comes = schedule.seat("comes");
        assert_ne!(comes.place, 0, "it has its share until somebody else takes a turn");
        let comes = [comes];
        assert_eq!(schedule.turn(&comes, &[1.0]), Some(0));
        let [comes] = comes;
        let both = [comes, schedule.seat("third")];
        assert_eq!(both[1].place, 0);
        let mut turns = |weights: &[f64]| (0..100).filter(|_| schedule.turn(&both, weights) == Some(1)).count();
        assert_eq!(turns(&[1.0, 0.0]), 0);
        assert_eq!(turns(&[0.5, 0.5]), 50);
        assert_eq!(turns(&[0.0, 1.0]), 100);
    }

    #[test]
    fn who_is_there_keeps_its_place_however_many_come() {
        let mut schedule = idle(0);
        let seats: Vec<_> = (0..3 * ABSENT).map(|i| schedule.seat(&i.to_string())).collect();
        assert!(seats.iter().enumerate().all(|(at, seat)| seat.place == at));
    }

    #[test]
    fn nobody_with_a_share_gets_no_turn() {
        assert_eq!(fresh(&[0.0, 0.0]).next(), None);
        assert_eq!(fresh(&[]).next(), None);
    }

    #[test]
    fn the_case_in_which_smooth_round_robin_is_off_by_more_than_one() {
        let mut weights = vec![1.0; 12];
        weights[0] = 12.0;
        assert!(error(&mut fresh(&weights), &weights, 10_000) < 1.0);
    }

    #[test]
    fn a_canary_of_a_tenth_gets_its_share_though_weights_change_at_every_other_request() {
        let mut schedule = fresh(&[0.9, 0.1]);
        let (mut due, mut had) = (0.0, 0.0);
        for round in 0..1000 {
            let weight = 0.1 + f64::from(round % 7) / 1000.0;
            share(&mut schedule, &[1.0 - weight, weight]);
            for _ in 0..2 {
                due += weight;
                had += f64::from(u8::from(schedule.next() == Some(1)));
                assert!((due - had).abs() <= 0.5 + 1e-9, "{due} {had}");
            }
        }
    }

    proptest! {
        #[test]
        fn counts_are_within_one_of_their_shares(weights in weights()) {
            prop_assert!(error(&mut fresh(&weights), &weights, 1000) < 1.0);
        }

        #[test]
        fn they_are_so_after_any_changes_too(changes in prop::collection::vec((prop::collection::vec(0.0..1.0_f64, 6), 0_u32..40), 1..12)) {
            let mut schedule = idle(6);
            for (weights, turns) in changes {
                // Some come and go.
                let weights: Vec<_> = weights.into_iter().map(|weight| if weight < 0.3 { 0.0 } else { weight }).collect();
                share(&mut schedule, &weights);
                if weights.iter().sum::<f64>() > 0.0 {
                    prop_assert!(error(&mut schedule, &weights, turns) <= 1.0 + 1e-9);
                }
            }
        }

        #[test]
        fn nobody_is_forgotten_over_changes(changes in prop::collection::vec((prop::collection::vec(0.1..1.0_f64, 5), 1_u32..6), 200)) {
            let mut schedule = idle(5);
            let (mut due, mut had) = ([0.0; 5], [0.0; 5]);
            for (weights, turns) in changes {
                share(&mut schedule, &weights);
                let total: f64 = weights.iter().sum();
                for _ in 0..turns {
                    had[schedule.next().expect("all have shares")] += 1.0;
                    for (due, weight) in due.iter_mut().zip(&weights) {
                        *due += weight / total;
                    }
                }
            }
            for at in 0..5 {
                let behind = as_float(schedule.entries[at].lag + schedule.entries[at].arrears) / as_float(ONE);
                prop_assert!((due[at] - had[at] - behind).abs() < 1e-6, "it is all on record");
                prop_assert!((due[at] - had[at]).abs() < 6.0, "{due:?} {had:?}");
            }
        }

        #[test]
        fn the_same_shares_once_more_change_nothing(weights in weights(), before in 0_u32..50) {
            let (mut one, mut two) = (fresh(&weights), fresh(&weights));
            for _ in 0..before {
                prop_assert_eq!(one.next(), two.next());
            }
            share(&mut two, &weights);
            for _ in 0..50 {
                prop_assert_eq!(one.next(), two.next());
            }
        }
    }
}
