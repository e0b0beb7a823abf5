//! What arrives on the links of a router: each frame goes to the engine, to the call that it concerns, or to both.
//!
//! What follows from it, new calls on freed slots among them, is done once a batch, by [`Router::settle`].

use std::sync::Mutex;

use mio::event::Event;
use rayserve_dataplane::{
    engine::ReplicaKey,
    error::Error,
    wire::{Fault, Frame, Header, Kind, call::Value, flag, models},
};

use super::{
    link::{Input, Sent},
    pending::Outcome,
    router::Router,
};

impl Router {
    /// The poller reported a link.
    pub(super) fn ready(&mut self, event: &Event) {
        let ended = event.is_read_closed() || event.is_error();
        let (index, readable) = (event.token().0, event.is_readable() || ended);
        if event.is_writable() {
            self.unflushed.push(index);
        }
        if readable && let Some(link) = self.links.get_mut(index) {
            link.mark_readable(ended);
            self.drain(index);
        }
        self.settle();
    }

    fn drain(&mut self, index: usize) {
        while let Some(link) = self.links.get_mut(index) {
            let key = link.key;
            match link.read(&mut self.scratch) {
                Ok(Input::Empty) => return,
                Ok(Input::Ready(limit)) => self.engine.linked(key, limit),
                Ok(Input::Frame(frame)) => self.frame(index, key, frame),
                Err(error) => return self.close(index, &error.to_string()),
            }
        }
    }

    fn frame(&mut self, index: usize, key: ReplicaKey, Frame { header, payload }: Frame) {
        let link = &mut self.links[index];
        match header.kind {
            Kind::Drain => self.engine.draining(key),
            Kind::Credit => self.engine.credit(key, header.aux),
            Kind::Models => {
                if let Ok(names) = models::models(&payload) {
                    self.engine.models(key, &names);
                }
            }
            Kind::Ping => {
                link.send(Header::new(Kind::Pong, 0).aux(header.aux));
                self.unflushed.push(index);
            }
            Kind::Item => {
                let Some(Sent { call, .. }) = link.streams.get_mut(header.stream) else { return };
                if call.outcome().is_none() {
                    let (credit, waited) = call.push(payload);
                    self.attended -= usize::from(waited);
                    self.widen(index, header.stream, credit);
                }
            }
            Kind::Result | Kind::Error | Kind::Busy | Kind::Returned => {
                let Some(Sent { call, lease, .. }) = link.streams.remove(header.stream) else { return };
                let leaving = link.leaving && link.streams.is_empty();
                match header.kind {
                    Kind::Busy => {
                        let place = self.engine.busy(lease, header.load);
                        self.again(&call, place);
                    }
                    Kind::Returned => {
                        let place = self.engine.returned(lease);
                        self.again(&call, place);
                    }
                    kind => {
                        self.engine.answered(lease, Some((header.load, header.has(flag::FAST))));
                        let outcome = match kind {
                            Kind::Result if call.stream => Outcome::End,
                            Kind::Result => match Value::parse(payload) {
                                Ok(value) => Outcome::Value(Mutex::new(Some(value))),
                                Err(error) => Outcome::Refused(Error::Internal(error.to_string().into())),
                            },
                            _ => Outcome::Fault(Fault::from_aux(header.aux), payload),
                        };
                        self.finish(&call, outcome);
                    }
                }
                if leaving {
                    self.close(index, "the replica has left");
                }
            }
            _ => {} // PONG, and what a newer replica may say
        }
    }
}
