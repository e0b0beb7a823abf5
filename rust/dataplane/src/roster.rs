//! What is kept by name while names come and go, for as long as the process runs.
//!
//! What somebody holds is never forgotten. Of the rest, [`ABSENT`] are remembered, so that a name that comes back goes on
//! where it was, and a name of its own for each release costs no more than so many of them.

use std::{collections::BTreeMap, sync::Arc};

/// So many that nobody holds are remembered; beyond, the one that was asked for longest ago is forgotten.
const ABSENT: usize = 256;

/// See the module.
#[derive(Debug)]
pub(crate) struct Roster<K, T> {
    entries: BTreeMap<K, Entry<T>>,
    /// Goes up with every question.
    asked: u64,
}

#[derive(Debug)]
struct Entry<T> {
    asked: u64,
    it: Arc<T>,
}

impl<K, T> Default for Roster<K, T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), asked: 0 }
    }
}

impl<K: Ord + Clone, T: Default> Roster<K, T> {
    /// What there is by this name; a new one if nothing is remembered.
    pub(crate) fn of(&mut self, name: K) -> Arc<T> {
        if !self.entries.contains_key(&name) {
            self.make_room();
        }
        self.asked += 1;
        let entry = self.entries.entry(name).or_insert_with(|| Entry { asked: 0, it: Arc::default() });
        entry.asked = self.asked;
        Arc::clone(&entry.it)
    }

    fn make_room(&mut self) {
        let absent = self.entries.iter().filter(|(_, entry)| Arc::strong_count(&entry.it) == 1);
        if absent.clone().count() >= ABSENT
            && let Some((name, _)) = absent.min_by_key(|(_, entry)| entry.asked)
        {
            let name = name.clone();
            self.entries.remove(&name);
        }
    }
}

impl<K, T> Roster<K, T> {
    /// Everything, in the order of names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &T)> {
        self.entries.iter().map(|(name, entry)| (name, &*entry.it))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Counter;

    #[test]
    fn who_is_held_is_kept_and_of_the_others_those_asked_for_last() {
        let mut roster = Roster::<usize, Counter>::default();
        let held = roster.of(0);
        held.up();
        roster.of(1).up();
        roster.of(2).up();
        for name in 3..1000 {
            roster.of(name);
            assert_eq!(roster.of(1).value(), 1, "asked for every time");
        }
        assert_eq!(roster.iter().count(), ABSENT + 1);
        assert!(Arc::ptr_eq(&held, &roster.of(0)));
        assert_eq!(roster.of(2).value(), 0, "it begins anew");
        drop(held);
        assert_eq!(roster.of(0).value(), 1);
    }
}
