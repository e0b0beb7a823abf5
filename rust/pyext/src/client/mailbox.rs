//! How outcomes reach an asyncio loop: tokens of finished calls, and a descriptor that becomes readable with the first.
//!
//! The loop watches the descriptor with `add_reader`. A thread that finishes a call never touches Python; the loop takes
//! the tokens in its own time. While the loop itself moves the bytes, `polling` keeps it from writing to itself.

use std::{
    io::{Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    sync::Mutex,
};

use crate::lock::lock;

#[derive(Debug, Default)]
struct Tokens {
    done: Vec<u64>,
    polling: bool,
    signalled: bool,
}

impl Tokens {
    fn signal(&mut self, mut write: &UnixStream) {
        if !self.signalled {
            // The one byte is always accepted: the last was read when the tokens were taken.
            self.signalled = write.write(&[1]).is_ok();
        }
    }
}

/// One loop's finished calls.
#[derive(Debug)]
pub(crate) struct Mailbox {
    tokens: Mutex<Tokens>,
    read: UnixStream,
    write: UnixStream,
}

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        write.set_nonblocking(true)?;
        Ok(Self { tokens: Mutex::default(), read, write })
    }

    /// Readable while tokens wait.
    pub(super) fn fd(&self) -> RawFd {
        self.read.as_raw_fd()
    }

    /// Says that the loop's thread is about to move bytes, and will call [`Self::take`] afterwards in any case.
    pub(super) fn polling(&self) {
        lock(&self.tokens).polling = true;
    }

    pub(super) fn deliver(&self, token: u64) {
        let mut tokens = lock(&self.tokens);
        tokens.done.push(token);
        if !tokens.polling {
            tokens.signal(&self.write);
        }
    }

    /// Has the loop read, as somebody who had the turn may have left something.
    pub(super) fn call(&self) {
        lock(&self.tokens).signal(&self.write);
    }

    /// The tokens since the last time.
    pub(super) fn take(&self) -> Vec<u64> {
        let mut tokens = lock(&self.tokens);
        if std::mem::take(&mut tokens.signalled) {
            let _ = (&self.read).read(&mut [0; 8]);
        }
        tokens.polling = false;
        std::mem::take(&mut tokens.done)
    }
}
