//! The requests on one link, by stream id.
//!
//! An id is a slab index (20 bits) and the generation of that slot (12 bits), so that a late answer to a request that is
//! gone never meets the one that took its slot.

const INDEX_BITS: u32 = 20;
const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;

/// A slab whose keys are stream ids.
#[derive(Debug)]
pub struct Streams<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Streams<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Streams<T> {
    /// Keeps `value` under a new id, or gives it back when a million streams are open. Id 0 is never used: it means the link.
    ///
    /// # Errors
    /// The table is full.
    pub fn insert(&mut self, value: T) -> Result<u32, T> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < INDEX_MASK as usize => {
                self.slots.push((1, None));
                self.slots.len() as u32 - 1
            }
            None => return Err(value),
        };
        let (generation, slot) = &mut self.slots[index as usize];
        *slot = Some(value);
        Ok(*generation << INDEX_BITS | index)
    }

    /// The stream of this id, if it is still the same one.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        match self.slots.get_mut((id & INDEX_MASK) as usize) {
            Some((generation, slot)) if *generation == id >> INDEX_BITS => slot.as_mut(),
            _ => None,
        }
    }

    /// Takes the stream out; its id will not come back before the generations have gone round.
    pub fn remove(&mut self, id: u32) -> Option<T> {
        let index = id & INDEX_MASK;
        let (generation, slot) = self.slots.get_mut(index as usize)?;
        if *generation != id >> INDEX_BITS {
            return None;
        }
        let value = slot.take()?;
        *generation = if *generation == u32::MAX >> INDEX_BITS { 1 } else { *generation + 1 };
        self.free.push(index);
        Some(value)
    }

    /// Open streams.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All open streams.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|(_, slot)| slot.as_ref())
    }

    /// Ids of all open streams.
    pub fn ids(&self) -> Vec<u32> {
        let open = self.slots.iter().enumerate().filter(|(_, (_, slot))| slot.is_some());
        open.map(|(index, (generation, _))| generation << INDEX_BITS | index as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_late_answer_does_not_meet_the_slots_next_request() {
        let mut streams = Streams::default();
        let old = streams.insert("old").expect("room");
        assert_eq!(streams.remove(old), Some("old"));
        let new = streams.insert("new").expect("room");
        assert_eq!(old & INDEX_MASK, new & INDEX_MASK, "the slot is used again");
        assert_eq!(streams.get_mut(old), None);
        assert_eq!(streams.remove(old), None);
        assert_eq!(streams.get_mut(new), Some(&mut "new"));
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_map(steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..5000)) {
            let (mut streams, mut model, mut n) = (Streams::default(), HashMap::new(), 0);
            for (add, which) in steps {
                if add || model.is_empty() {
                    let id = streams.insert(n).map_err(|_| TestCaseError::fail("full"))?;
                    prop_assert_ne!(id, 0);
                    prop_assert_eq!(model.insert(id, n), None);
                    n += 1;
                } else {
                    let id = *which.get(&model.keys().copied().collect::<Vec<_>>());
                    prop_assert_eq!(streams.remove(id), model.remove(&id));
                }
                prop_assert_eq!(streams.len(), model.len());
            }
            let mut ids = streams.ids();
            ids.sort_unstable();
            let mut known: Vec<_> = model.keys().copied().collect();
            known.sort_unstable();
            prop_assert_eq!(ids, known);
        }
    }
}
