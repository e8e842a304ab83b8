//! The control socket's server half, a subscriber on the VMM's event loop.
//!
//! [`ControlServer`] accepts clients, reads their lines and hands each request to the VM with a
//! [`Responder`]; the VM answers from any thread, now or later. Nothing here blocks, whatever a
//! client does or leaves undone: lines, replies, clients and requests at work are all bounded.
//! Every request gets one reply, or its connection is gone.

use crate::connection::{Connection, Input};
use crate::feed::{Subscription, Wake};
use crate::protocol::{ErrorKind, MAX_LINE, Reply, Request};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use llfree_base::faults;
use llfree_base::lock;
use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// Lines of one client, and clients, handled before others get their turn.
const TURN: usize = 32;

/// The limits on clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Clients at once; one more is told `busy`.
    pub clients: usize,
    /// Requests that the VM works on at once, those of clients that hung up included.
    pub requests: usize,
    /// Time that a client may leave a line unfinished or a reply unread. A client that has been
    /// idle for longer makes room for a new one when there are too many.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { clients: 256, requests: 256, stall: Duration::from_secs(30) }
    }
}

/// Replies on their way to the loop.
struct ReplyQueue {
    lines: Mutex<Vec<Answer>>,
    wake: EventFd,
}

/// A reply, and where to.
struct Answer {
    fd: RawFd,
    id: u64,
    line: String,
    /// What follows the line.
    stream: Option<Subscription>,
}

/// The right, and the duty, to answer one request. One that is dropped says so to the client.
pub struct Responder {
    queue: Arc<ReplyQueue>,
    fd: RawFd,
    id: u64,
    answered: bool,
}

impl Responder {
    /// Answers. If the client is gone, the reply is dropped.
    pub fn answer(mut self, reply: &Reply) {
        self.send(reply);
    }

    /// Answers with a stream: from then on the connection carries what comes from there.
    pub fn stream(mut self, subscription: Subscription) {
        self.send_with(&Reply::Stream, Some(subscription));
    }

    fn send(&mut self, reply: &Reply) {
        self.send_with(reply, None);
    }

    fn send_with(&mut self, reply: &Reply, stream: Option<Subscription>) {
        self.answered = true;
        let answer = Answer { fd: self.fd, id: self.id, line: reply.to_line(), stream };
        // A Vec is whole even if a thread died while it held the lock.
        lock(&self.queue.lines).push(answer);
        self.queue.wake();
    }
}

impl ReplyQueue {
    fn wake(&self) {
        // It fails only when its counter is full, and then the loop is awake already.
        let _ = faults::point(faults::EVENTFD).and_then(|()| self.wake.write(1));
    }
}

/// Makes the server look after its streams again: after a sink of one of them has room for more.
#[derive(Clone)]
pub struct Waker(Arc<ReplyQueue>);

impl Waker {
    /// Does so, soon.
    pub fn wake(&self) {
        self.0.wake();
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.answered {
            self.send(&Reply::error(ErrorKind::Internal, "the VM dropped the request without an answer"));
        }
    }
}

/// The control socket on the event loop. `dispatch` is called on the loop's thread for every
/// request and must not block; it answers through the [`Responder`], there or elsewhere.
///
/// A VM that stops answers first and ends its loop after the next pass: the reply is then out.
pub struct ControlServer<D> {
    listener: UnixListener,
    limits: Limits,
    dispatch: D,
    queue: Arc<ReplyQueue>,
    /// What feeds call when there is something for a stream.
    wake: Wake,
    timer: TimerFd,
    ticking: bool,
    accepting: bool,
    clients: HashMap<RawFd, Connection>,
    next_id: u64,
    at_work: usize,
}

impl<D: FnMut(Request, Responder)> ControlServer<D> {
    /// Serves `listener`, which becomes non-blocking.
    ///
    /// # Errors
    /// When the kernel has no eventfd or timer to give.
    pub fn new(listener: UnixListener, limits: Limits, dispatch: D) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let timer = TimerFd::new().map_err(|error| std::io::Error::from_raw_os_error(error.errno()))?;
        let queue = Arc::new(ReplyQueue { lines: Mutex::new(Vec::new()), wake });
        let of_feeds = Arc::clone(&queue);
        Ok(Self {
            listener,
            limits,
            dispatch,
            queue,
            wake: Arc::new(move || of_feeds.wake()),
            timer,
            ticking: false,
            accepting: true,
            clients: HashMap::new(),
            next_id: 0,
            at_work: 0,
        })
    }

    /// What makes it look after its streams again.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.queue))
    }

    fn accept(&mut self, ops: &mut EventOps) {
        for _ in 0..TURN {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream, ops),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                // A client that gave up before its turn, or a signal: the next one may be fine.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR)) => {}
                Err(error) => {
                    // No descriptors left, most likely. The loop must not spin on it.
                    log::warn!("control socket: cannot accept a client: {error}");
                    self.set_accepting(false, ops);
                    return;
                }
            }
        }
    }

    fn set_accepting(&mut self, accepting: bool, ops: &mut EventOps) {
        let events = if accepting { EventSet::IN } else { EventSet::empty() };
        match ops.modify(Events::new(&self.listener, events)) {
            Ok(()) => self.accepting = accepting,
            Err(error) => log::error!("control socket: cannot change the listener's events: {error}"),
        }
    }

    fn admit(&mut self, stream: UnixStream, ops: &mut EventOps) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.clients.len() >= self.limits.clients && !self.drop_an_idle_client(ops) {
            let message = format!("the VM serves {} clients already; try again", self.limits.clients);
            let line = Reply::error(ErrorKind::Busy, message).to_line();
            // A new socket has room for a short line; a client that is gone needs none.
            let _ = (&stream).write(line.as_bytes());
            return;
        }
        let fd = stream.as_raw_fd();
        self.next_id += 1;
        let client = Connection::new(self.next_id, stream);
        if let Err(error) = ops.add(Events::new(client.stream(), client.registered)) {
            log::warn!("control socket: cannot watch a client: {error}");
            return;
        }
        self.clients.insert(fd, client);
    }

    /// Makes room by closing the client that has been idle longest, if that is long enough.
    fn drop_an_idle_client(&mut self, ops: &mut EventOps) -> bool {
        let now = Instant::now();
        let longest = self.clients.iter().filter_map(|(fd, client)| Some((client.idle_for(now)?, *fd))).max();
        match longest {
            Some((idle, fd)) if idle > self.limits.stall => {
                self.close(fd, ops);
                true
            }
            _ => false,
        }
    }

    /// Does what `fd`'s client makes possible, and closes or re-arms it.
    fn pump(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(client) = self.clients.get_mut(&fd) else { return };
        client.set_unfinished(false);
        let mut turn = TURN;
        let keep = loop {
            match client.flush() {
                Ok(true) if client.is_closing() => break false,
                Ok(true) if client.is_waiting() => break true,
                Ok(true) => {}
                Ok(false) => break true,
                Err(_) => break false,
            }
            if turn == 0 {
                client.set_unfinished(true);
                break true;
            }
            turn -= 1;
            if client.is_stream() {
                match client.next_of_stream(&self.wake) {
                    Ok(true) => continue,
                    Ok(false) => break true,
                    Err(_) => break false,
                }
            }
            match client.next_line() {
                Ok(Input::Line(line)) if line.iter().all(u8::is_ascii_whitespace) => {}
                Ok(Input::Line(line)) => match Request::from_line(&line) {
                    Err(error) => client.reply(&error.to_reply().to_line()),
                    Ok(_) if self.at_work >= self.limits.requests => {
                        let message = format!("the VM works on {} requests already; try again", self.at_work);
                        client.reply(&Reply::error(ErrorKind::Busy, message).to_line());
                    }
                    Ok(request) => {
                        client.start_waiting();
                        self.at_work += 1;
                        let queue = Arc::clone(&self.queue);
                        (self.dispatch)(request, Responder { queue, fd, id: client.id, answered: false });
                    }
                },
                Ok(Input::TooLong) => {
                    let message = format!("a request line has at most {MAX_LINE} bytes");
                    client.reply_and_close(&Reply::error(ErrorKind::TooLong, message));
                }
                Ok(Input::Wait) => break true,
                Ok(Input::End) | Err(_) => break false,
            }
        };
        let wanted = client.interest();
        if keep && wanted != client.registered {
            match ops.modify(Events::new(client.stream(), wanted)) {
                Ok(()) => client.registered = wanted,
                Err(error) => {
                    log::warn!("control socket: cannot watch a client: {error}");
                    self.close(fd, ops);
                }
            }
        } else if !keep {
            self.close(fd, ops);
        }
    }

    fn close(&mut self, fd: RawFd, ops: &mut EventOps) {
        if let Some(client) = self.clients.remove(&fd) {
            // Before the descriptor is closed: its number may belong to the next client.
            if let Err(error) = ops.remove(Events::empty(client.stream())) {
                log::warn!("control socket: cannot forget a client: {error}");
            }
        }
    }

    fn deliver(&mut self, ops: &mut EventOps) {
        // Read before the queue is emptied: a reply that comes in between wakes the loop again.
        let _ = self.queue.wake.read();
        let answers = std::mem::take(&mut *lock(&self.queue.lines));
        for Answer { fd, id, line, stream } in answers {
            self.at_work = self.at_work.saturating_sub(1);
            match self.clients.get_mut(&fd) {
                Some(client) if client.id == id => {
                    client.reply(&line);
                    if let Some(stream) = stream {
                        client.start_stream(stream);
                    }
                }
                _ => {
                    log::debug!("control socket: a client left before its reply");
                    continue;
                }
            }
            self.pump(fd, ops);
        }
        // The wake may have been a feed's: each stream looks whether it was its own.
        let streams: Vec<RawFd> = self.clients.iter().filter(|(_, c)| c.is_stream()).map(|(fd, _)| *fd).collect();
        for fd in streams {
            self.pump(fd, ops);
        }
    }

    fn tick(&mut self, ops: &mut EventOps) {
        // It is readable, and only this function disarms it: the wait does not block.
        let _ = self.timer.wait();
        if !self.accepting {
            self.set_accepting(true, ops);
        }
        // A wake-up that got lost costs a client a moment, not its reply.
        self.deliver(ops);
        let now = Instant::now();
        let late = |client: &Connection| client.stalled_for(now).is_some_and(|time| time > self.limits.stall);
        let stalled: Vec<RawFd> = self.clients.iter().filter(|(_, c)| late(c)).map(|(fd, _)| *fd).collect();
        for fd in stalled {
            if let Some(client) = self.clients.get_mut(&fd) {
                // Half a line gets an explanation; a client that leaves a reply unread would not read it.
                if matches!(client.flush(), Ok(true)) && !client.is_closing() {
                    let message = format!("a request line must end within {:?}", self.limits.stall);
                    client.reply_and_close(&Reply::error(ErrorKind::BadRequest, message));
                    let _ = client.flush();
                }
            }
            self.close(fd, ops);
        }
        if !self.has_to_tick() && self.timer.clear().is_ok() {
            self.ticking = false;
        }
    }

    /// The timer runs only while there is something to watch: an idle VM sleeps.
    fn has_to_tick(&self) -> bool {
        !self.clients.is_empty() || !self.accepting
    }

    fn start_ticking(&mut self) {
        let period = (self.limits.stall / 4).clamp(Duration::from_millis(10), Duration::from_secs(1));
        match self.timer.reset(period, Some(period)) {
            Ok(()) => self.ticking = true,
            Err(error) => log::warn!("control socket: cannot start the timer: {error}"),
        }
    }
}

impl<D: FnMut(Request, Responder)> MutEventSubscriber for ControlServer<D> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.listener.as_raw_fd() {
            self.accept(ops);
        } else if fd == self.queue.wake.as_raw_fd() {
            self.deliver(ops);
        } else if fd == self.timer.as_raw_fd() {
            self.tick(ops);
        } else if let Some(client) = self.clients.get(&fd) {
            let gone = events.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
            let is_stream = client.is_stream();
            if gone && is_stream {
                // What was typed before it left still arrives.
                self.pump(fd, ops);
                self.close(fd, ops);
            // What a client sent before it left is still carried out, unless one is at work.
            } else if gone && (client.is_waiting() || !events.event_set().contains(EventSet::IN)) {
                self.close(fd, ops);
            } else {
                self.pump(fd, ops);
            }
        }
        if self.has_to_tick() && !self.ticking {
            self.start_ticking();
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let fds = [self.listener.as_raw_fd(), self.queue.wake.as_raw_fd(), self.timer.as_raw_fd()];
        for fd in fds {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("control socket: cannot watch descriptor {fd}: {error}");
            }
        }
    }
}
