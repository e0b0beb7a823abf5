//! Replicas on threads of their own that answer every request with their id, and splits over them.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use rayserve_dataplane::wire::{Kind, RequestHeadView};
use serde_json::{Value, json};

use super::{
    Served,
    replica::{Got, Replica},
};

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

pub fn targets(weights: &[(&str, f64)]) -> Value {
    let target =
        |(name, weight): &(&str, f64)| json!({"name": name, "deployment": format!("{name}#D"), "weight": weight});
    json!(weights.iter().map(target).collect::<Vec<_>>())
}

/// A split without anything else.
pub fn split(weights: &[(&str, f64)]) -> Value {
    json!({"targets": targets(weights)})
}

/// A proxy and one answering replica a target, whose id is the target's name.
pub struct Split {
    pub served: Served,
    pub autos: Vec<(&'static str, Auto)>,
}

impl Split {
    pub fn start(names: &[&'static str], split: &Value) -> Self {
        Self::with(json!({}), names, split)
    }

    pub fn with(changes: Value, names: &[&'static str], split: &Value) -> Self {
        let served = Served::empty(changes);
        let autos = names.iter().map(|&name| (name, Auto::start(served.dir.path(), name, 100))).collect();
        let it = Self { served, autos };
        it.publish(split);
        it.served.linked_ids(names);
        it
    }

    pub fn publish(&self, split: &Value) {
        let deployments: Vec<_> =
            self.autos.iter().map(|(name, auto)| (*name, json!({}), vec![auto.address.clone()])).collect();
        self.served.publish_split(split, &deployments);
    }
}
