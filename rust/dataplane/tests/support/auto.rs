//! A replica on a thread of its own that answers every request with its id.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use rayserve_dataplane::wire::{Kind, RequestHeadView};
use serde_json::Value;

use super::replica::{Got, Replica};

pub struct Auto {
    pub address: Value,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Auto {
    pub fn start(dir: &Path, id: &str, max_ongoing: u32) -> Self {
        Self::with(dir, id, max_ongoing, |replica, got| replica.answer(got, &replica.id))
    }

    /// One that answers as `answer` does.
    pub fn with(dir: &Path, id: &str, max_ongoing: u32, answer: impl Fn(&Replica, &Got) + Send + 'static) -> Self {
        let replica = Replica::start(dir, id, max_ongoing);
        let (address, stop) = (replica.address(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let Some((link, frame)) = replica.try_next() else { continue };
                if frame.header.kind == Kind::Request {
                    let head = RequestHeadView::parse(frame.payload).expect("a head");
                    answer(&replica, &Got { link, header: frame.header, head });
                }
            }
        });
        Self { address, stop, thread: Some(thread) }
    }
}

impl Drop for Auto {
    /// Dies.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it has not failed");
        }
    }
}
