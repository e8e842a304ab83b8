//! One client of the control socket: bytes in, lines out, never blocking.
//!
//! A connection holds at most one request at a time. While the VM works on it, or its reply is
//! not yet written, no more input is read, so replies keep the order of their requests and both
//! buffers stay bounded: the input by [`MAX_LINE`] and one read, the output by one reply.

use crate::feed::{Next, Subscription, Wake};
use crate::protocol::{MAX_LINE, Reply};
use event_manager::EventSet;
use llfree_base::faults;
use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// The size of one read, and about that of one write of a stream.
const CHUNK: usize = 16 << 10;
/// Reads from one stream's client before others get their turn.
const READS: usize = 4;

/// The state of the input.
pub(super) enum Input {
    /// A line without its newline.
    Line(Vec<u8>),
    /// The line is longer than [`MAX_LINE`], or will be.
    TooLong,
    /// No whole line yet.
    Wait,
    /// Nothing more will come.
    End,
}

/// One client.
pub(super) struct Connection {
    /// Never used twice, other than the descriptor: a late reply must not reach a new client.
    pub(super) id: u64,
    /// The events that it is registered for.
    pub(super) registered: EventSet,
    stream: UnixStream,
    input: Vec<u8>,
    /// No newline before this offset of the input.
    scanned: usize,
    ended: bool,
    output: Vec<u8>,
    written: usize,
    /// The VM works on a request of this client.
    waiting: bool,
    /// On one that may take long.
    on_work: bool,
    /// Set when the client is gone, for whoever works for it.
    pub(super) left: Arc<AtomicBool>,
    /// Close when the output is written.
    closing: bool,
    /// There may be lines left in the input that nothing else will wake us for.
    unfinished: bool,
    /// When the present state began: idle, half a line read, a reply not yet taken.
    since: Instant,
    /// What is sent to the client instead of replies.
    subscription: Option<Subscription>,
}

impl Connection {
    pub(super) fn new(id: u64, stream: UnixStream) -> Self {
        Self {
            id,
            registered: EventSet::IN,
            stream,
            input: Vec::new(),
            scanned: 0,
            ended: false,
            output: Vec::new(),
            written: 0,
            waiting: false,
            on_work: false,
            left: Arc::default(),
            closing: false,
            unfinished: false,
            since: Instant::now(),
            subscription: None,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The events that this connection's state calls for. A hang-up is always reported.
    pub(super) fn interest(&self) -> EventSet {
        let mut events = EventSet::empty();
        if !self.output.is_empty() || self.unfinished {
            events |= EventSet::OUT;
        }
        if self.subscription.is_some() {
            // Input that nobody has room for yet stays in the socket.
            if !self.ended && self.input.is_empty() {
                events |= EventSet::IN;
            }
        } else if self.output.is_empty() && !self.unfinished && !self.waiting && !self.closing && !self.ended {
            events |= EventSet::IN;
        }
        events
    }

    /// Nothing read, nothing to write, nothing at work, for this long.
    pub(super) fn idle_for(&self, now: Instant) -> Option<Duration> {
        let idle = match self.subscription {
            // A stream may be silent; one that nobody reads makes room for somebody who does.
            Some(_) => !self.output.is_empty(),
            None => !self.waiting && self.input.is_empty() && self.output.is_empty(),
        };
        idle.then(|| now.saturating_duration_since(self.since))
    }

    /// The client owes us something, the rest of a line or room for a reply, for this long.
    pub(super) fn stalled_for(&self, now: Instant) -> Option<Duration> {
        // Who reads a stream slowly loses some of it, and nothing else.
        let stalled =
            self.subscription.is_none() && !self.waiting && (!self.input.is_empty() || !self.output.is_empty());
        stalled.then(|| now.saturating_duration_since(self.since))
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.waiting
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing
    }

    /// The VM has a request of this client now.
    pub(super) fn start_waiting(&mut self, on_work: bool) {
        (self.waiting, self.on_work) = (true, on_work);
    }

    /// Whether it waits for a request that may take long, or follows a stream: either may last, and must leave
    /// places for those who ask what is prompt.
    pub(super) fn waits_for_work(&self) -> bool {
        self.waiting && self.on_work || self.is_stream()
    }

    /// The number of lines handled in one go is bounded; come back soon.
    pub(super) fn set_unfinished(&mut self, unfinished: bool) {
        self.unfinished = unfinished;
    }

    /// Queues a reply line.
    pub(super) fn reply(&mut self, line: &str) {
        #[cfg(feature = "check-replies")]
        crate::schema::check_reply(line.as_bytes());
        self.waiting = false;
        self.output.extend_from_slice(line.as_bytes());
        self.since = Instant::now();
    }

    /// From here on the client gets what is in `subscription`, after the replies that it has coming.
    pub(super) fn start_stream(&mut self, subscription: Subscription) {
        self.subscription = Some(subscription);
        self.scanned = 0;
    }

    pub(super) fn is_stream(&self) -> bool {
        self.subscription.is_some()
    }

    /// Brings the next bytes of the stream into the output, and what the client sent to whom it is for.
    /// `Ok(false)` if there is nothing to send for now.
    pub(super) fn next_of_stream(&mut self, wake: &Wake) -> std::io::Result<bool> {
        self.take_input()?;
        let Some(stream) = &mut self.subscription else { return Ok(false) };
        match stream.next(CHUNK, wake) {
            Next::Bytes(bytes) => {
                self.output = bytes;
                self.since = Instant::now();
            }
            Next::Wait => return Ok(false),
            Next::End => self.closing = true,
        }
        Ok(true)
    }

    /// What the client sent, as far as there is room for it.
    fn take_input(&mut self) -> std::io::Result<()> {
        for _ in 0..READS {
            if let Some(stream) = &mut self.subscription {
                let taken = stream.take_input(&self.input);
                self.input.drain(..taken.min(self.input.len()));
            }
            if self.ended || !self.input.is_empty() || !self.read()? {
                break;
            }
        }
        Ok(())
    }

    /// Queues an error after which no more input is understood.
    pub(super) fn reply_and_close(&mut self, reply: &Reply) {
        self.reply(&reply.to_line());
        self.input = Vec::new();
        self.closing = true;
    }

    /// Writes what the client has room for; `Ok(true)` when all is written.
    pub(super) fn flush(&mut self) -> std::io::Result<bool> {
        while self.written < self.output.len() {
            let mut rest = &self.output[self.written..];
            if faults::point(faults::SOCKET_SHORT_WRITE).is_err() {
                rest = &rest[..1];
            }
            match faults::point(faults::SOCKET_WRITE).and_then(|()| self.stream.write(rest)) {
                Ok(0) => return Err(IoKind::WriteZero.into()),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == IoKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == IoKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if !self.output.is_empty() {
            // A long reply's buffer is not kept for the next short one.
            self.output = Vec::new();
            self.written = 0;
            self.since = Instant::now();
        }
        Ok(true)
    }

    /// The next line, reading as far as needed and as there is.
    pub(super) fn next_line(&mut self) -> std::io::Result<Input> {
        loop {
            let newline = self.input[self.scanned..].iter().position(|byte| *byte == b'\n');
            let end = newline.map(|at| self.scanned + at);
            match end {
                Some(end) if end < MAX_LINE => {
                    let rest = self.input.split_off(end + 1);
                    let mut line = std::mem::replace(&mut self.input, rest);
                    line.truncate(end);
                    self.scanned = 0;
                    self.since = Instant::now();
                    return Ok(Input::Line(line));
                }
                Some(_) => return Ok(Input::TooLong),
                None if self.input.len() >= MAX_LINE => return Ok(Input::TooLong),
                None if self.ended && self.input.is_empty() => return Ok(Input::End),
                // The last line may lack its newline: its sender says that nothing follows.
                None if self.ended => {
                    self.scanned = 0;
                    return Ok(Input::Line(std::mem::take(&mut self.input)));
                }
                None => {}
            }
            self.scanned = self.input.len();
            if !self.read()? {
                return Ok(Input::Wait);
            }
        }
    }

    /// One read; `Ok(false)` if nothing is there yet.
    fn read(&mut self) -> std::io::Result<bool> {
        let mut chunk = [0; CHUNK];
        loop {
            match faults::point(faults::SOCKET_READ).and_then(|()| self.stream.read(&mut chunk)) {
                Ok(0) => self.ended = true,
                Ok(count) => {
                    if self.input.is_empty() {
                        self.since = Instant::now();
                    }
                    self.input.extend_from_slice(&chunk[..count]);
                }
                Err(error) if error.kind() == IoKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == IoKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            return Ok(true);
        }
    }
}
