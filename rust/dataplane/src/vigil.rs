//! Whether a thread that has nothing to do should look out for the next event for some microseconds before it sleeps.
//!
//! A thread that sleeps is woken by an interrupt to its core, which takes longer than a no-op request. So the threads that
//! serve stay up for a moment, yielding their core to whoever wants it, as long as events come that quickly. A few
//! requests a second never keep anybody up. Sans-io: who asks brings the clock.

use std::time::{Duration, Instant};

/// How long a thread stays up after an event.
const STAY: Duration = Duration::from_micros(50);
/// A sleep that was over so soon, the wake included, might have been spared.
const SHORT: Duration = Duration::from_micros(150);
/// The score from which staying up is tried, its maximum, and what a time in vain or a long sleep costs.
const WORTH: u32 = 8;
const MOST: u32 = 64;
const VAIN: u32 = 4;

/// See the module.
#[derive(Debug, Default)]
pub struct Vigil {
    score: u32,
    last: Option<Instant>,
}

impl Vigil {
    /// Something came, `now`.
    pub fn event(&mut self, now: Instant) {
        let short = self.last.replace(now).is_some_and(|last| now.saturating_duration_since(last) < SHORT);
        self.score = if short { MOST.min(self.score + 1) } else { self.score.saturating_sub(VAIN) };
    }

    /// Whether to stay up, as nothing has come by `now`.
    pub fn stays(&self, now: Instant) -> bool {
        self.score >= WORTH && self.last.is_some_and(|last| now.saturating_duration_since(last) < STAY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(20);
    const LATE: Duration = Duration::from_millis(1);

    /// A vigil that has seen `events`, each so long after the one before, and the time of the last.
    fn after(gaps: impl IntoIterator<Item = Duration>) -> (Vigil, Instant) {
        let (mut vigil, mut now) = (Vigil::default(), Instant::now());
        vigil.event(now);
        for gap in gaps {
            now += gap;
            vigil.event(now);
        }
        (vigil, now)
    }

    #[test]
    fn quick_events_keep_it_up_for_a_moment_after_the_last() {
        let (vigil, last) = after([SOON; 20]);
        assert!(vigil.stays(last) && vigil.stays(last + STAY / 2));
        assert!(!vigil.stays(last + STAY));
    }

    #[test]
    fn requests_far_apart_never_do_though_each_brings_its_answer_soon() {
        let (vigil, last) = after([LATE, SOON].repeat(1000));
        assert!(!vigil.stays(last));
    }

    #[test]
    fn it_gives_up_soon_when_events_become_rare() {
        let (vigil, last) = after([SOON; 1000].into_iter().chain([LATE; MOST.div_ceil(VAIN) as usize]));
        assert!(!vigil.stays(last));
    }
}
