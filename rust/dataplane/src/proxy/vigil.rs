//! Keeps a shard's thread from sleeping where that pays.

use std::{
    cell::Cell,
    future::poll_fn,
    rc::Rc,
    task::{Poll, Waker},
    time::Instant,
};

use super::shard::Shard;
use crate::vigil::Vigil;

/// What the shard's sockets tell, and who waits for it.
#[derive(Default)]
pub(super) struct Events {
    count: Cell<u64>,
    waker: Cell<Option<Waker>>,
}

impl Events {
    /// Bytes came.
    pub(super) fn up(&self) {
        self.count.set(self.count.get() + 1);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// Runs until it is dropped.
pub(super) async fn keep(shard: Rc<Shard>) {
    let (events, mut vigil, mut seen) = (&shard.events, Vigil::default(), 0);
    loop {
        poll_fn(|cx| {
            if events.count.get() != seen {
                return Poll::Ready(());
            }
            events.waker.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
        loop {
            let now = Instant::now();
            if events.count.get() != seen {
                seen = events.count.get();
                vigil.event(now);
            } else if vigil.stays(now) {
                std::thread::yield_now();
            } else {
                break;
            }
            // The runtime looks at the sockets before it comes back here.
            tokio::task::yield_now().await;
        }
    }
}
