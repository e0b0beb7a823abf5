//! What waits, in the order in which it came, and how much of it may go now. Nothing here calls Python.
//!
//! A caller that leaves is only marked, as it may be anywhere in the queue; the marked are swept out when they come to the
//! front, or outnumber the others.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use rayserve_dataplane::engine::batch::{Front, Verdict, Window};

use super::size_of;
use super::ticket::Ticket;

pub(super) struct Queue {
    pub(super) window: Window,
    concurrent: usize,
    running: usize,
    waiting: VecDeque<Py<Ticket>>,
    /// How many of these are marked.
    marked: usize,
    /// With a measure of the user's: what is known to fit.
    pub(super) weighed: Weighed,
    /// Counts what makes that knowledge void.
    pub(super) changes: u64,
    /// The loop is going to call `turn`.
    asked: bool,
    /// And has so many turns to let pass before.
    patience: u8,
    /// When the timer looks again, and its handle.
    pub(super) timer: Option<(Instant, Py<PyAny>)>,
}

/// The items at the front that were weighed together.
#[derive(Default, Clone, Copy)]
pub(super) struct Weighed {
    pub(super) fits: usize,
    pub(super) size: f64,
    pub(super) full: bool,
}

/// A batch on its way out of the queue.
pub(super) struct Taken {
    pub(super) tickets: Vec<Py<Ticket>>,
    /// By the user's measure, else their number.
    pub(super) size: f64,
    /// How long the oldest has waited.
    pub(super) waited: Duration,
}

impl Queue {
    pub(super) fn new(window: Window, concurrent: usize) -> Self {
        Self {
            window,
            concurrent,
            running: 0,
            waiting: VecDeque::new(),
            marked: 0,
            weighed: Weighed::default(),
            changes: 0,
            asked: false,
            patience: 0,
            timer: None,
        }
    }

    /// Whether the loop is to be asked for a turn.
    pub(super) fn push(&mut self, ticket: Py<Ticket>, weighs: bool) -> bool {
        // A timer is there for the oldest; one more item changes the verdict only if it is weighed or fills the batch, or
        // if the timer is left over from a longer window.
        let timed = self.timer.as_ref().is_some_and(|(at, _)| {
            let due = ticket.get().since.checked_add(self.window.wait);
            due.is_none_or(|due| *at <= due)
        });
        self.waiting.push_back(ticket);
        let news = weighs || !timed || self.len() >= self.window.max_size;
        let ask = news && self.has_slot() && !self.asked;
        self.asked |= ask;
        ask
    }

    /// Whether `turn` is to come again instead of now: answers are to be sent, or callers to be stepped.
    pub(super) fn postpone(&mut self, waking: bool) -> bool {
        let again = waking || self.patience > 0;
        self.patience = self.patience.saturating_sub(1);
        self.asked = again;
        again
    }

    pub(super) fn asked(&self) -> bool {
        self.asked
    }

    /// Whether the loop is to be asked for a turn.
    pub(super) fn release(&mut self) -> bool {
        self.running = self.running.saturating_sub(1);
        if self.asked || self.len() == 0 {
            return false;
        }
        // In the next turn the tasks that were stepped are done and answer; what they put is sent behind that.
        self.patience = 1;
        self.asked = true;
        true
    }

    pub(super) fn resize(&mut self, window: Window) {
        self.window = window;
        self.forget_weights();
    }

    pub(super) fn load(&self) -> (usize, usize) {
        (self.len(), self.running)
    }

    pub(super) fn has_slot(&self) -> bool {
        self.running < self.concurrent
    }

    fn len(&self) -> usize {
        self.waiting.len() - self.marked
    }

    pub(super) fn forget_weights(&mut self) {
        self.weighed = Weighed::default();
        self.changes += 1;
    }

    /// One more is marked; what is swept out is to be let go outside the lock.
    pub(super) fn left(&mut self) -> Vec<Py<Ticket>> {
        self.marked += 1;
        self.forget_weights();
        if self.marked <= self.len() {
            return Vec::new();
        }
        self.marked = 0;
        let (kept, gone) =
            std::mem::take(&mut self.waiting).into_iter().partition(|ticket: &Py<Ticket>| ticket.get().is_queued());
        self.waiting = kept;
        gone.into()
    }

    /// The first `count` that wait.
    pub(super) fn front(&self, count: usize) -> impl Iterator<Item = &Py<Ticket>> {
        self.waiting.iter().filter(|ticket| ticket.get().is_queued()).take(count)
    }

    /// Takes the item behind those that are weighed out of the queue.
    pub(super) fn remove_next(&mut self) -> Option<Py<Ticket>> {
        let mut live = 0;
        let at = self.waiting.iter().position(|ticket| {
            let queued = ticket.get().is_queued();
            live += usize::from(queued);
            queued && live > self.weighed.fits
        })?;
        let ticket = self.waiting.remove(at)?;
        ticket.get().begin();
        Some(ticket)
    }

    /// What to do now, and the batch if one is to run; it has its slot then. `gone` gets what was swept out.
    pub(super) fn decide(
        &mut self,
        now: Instant,
        weighs: bool,
        gone: &mut Vec<Py<Ticket>>,
    ) -> (Verdict, Option<Taken>) {
        while self.waiting.front().is_some_and(|ticket| !ticket.get().is_queued()) {
            gone.extend(self.waiting.pop_front());
            self.marked -= 1;
        }
        let oldest = self.waiting.front().map(|ticket| ticket.get().since);
        let front = if weighs {
            let Weighed { fits, full, .. } = self.weighed;
            oldest.filter(|_| fits > 0).map(|oldest| Front { fits, full, oldest })
        } else {
            self.window.front(self.len(), oldest)
        };
        let verdict = self.window.decide(front, self.has_slot(), now);
        let Verdict::Take(count, _) = verdict else { return (verdict, None) };
        let waited = oldest.map_or(Duration::ZERO, |oldest| now.saturating_duration_since(oldest));
        let size = if weighs { self.weighed.size } else { size_of(count) };
        let mut tickets = Vec::with_capacity(count);
        while tickets.len() < count {
            let Some(ticket) = self.waiting.pop_front() else { break };
            if ticket.get().begin() {
                tickets.push(ticket);
            } else {
                self.marked -= 1;
                gone.push(ticket);
            }
        }
        self.running += 1;
        self.forget_weights();
        (verdict, Some(Taken { tickets, size, waited }))
    }
}
