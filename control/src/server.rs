//! The control socket's server half, a subscriber on the VMM's event loop.
//!
//! [`ControlServer`] accepts clients, reads their lines and hands each request to the VM with a
//! [`Responder`]; the VM answers from any thread, now or later. Nothing here blocks, whatever a
//! client does or leaves undone: lines, replies, clients and requests at work are all bounded.
//! Every request gets one reply, or its connection is gone. What a [prompt](Request::is_prompt) request asks
//! is answered however many others are at work, and there is a place for who asks it.

use crate::connection::{Connection, Input};
use crate::feed::{Subscription, Wake};
use crate::protocol::{ErrorKind, MAX_LINE, Reply, Request};
use crate::watch::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use llfree_base::{RateLimit, descriptors, faults, lock};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// Lines of one client, and clients, handled before others get their turn.
const TURN: usize = 32;

/// Descriptors that are not for clients: one for a client that is turned away, a few that are open for a
/// moment (`/proc`, the copy of a rule set for a new thread).
const SPARE_DESCRIPTORS: u64 = 12;
/// One that waits for work, and one that asks something prompt meanwhile.
const FEWEST_CLIENTS: usize = 2;

/// The limits on clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Clients at once; one more is told `busy`.
    pub clients: usize,
    /// Places among those that are kept for clients with prompt requests: the clients that wait for
    /// anything else are fewer by this many.
    pub prompt_places: usize,
    /// Time that a client may leave a line unfinished or a reply unread. A client that has been
    /// idle for longer makes room for a new one when there are too many.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { clients: 256, prompt_places: 16, stall: Duration::from_secs(30) }
    }
}

/// Why there can be no limits: nobody could be served.
#[derive(Debug, thiserror::Error)]
pub enum LimitsError {
    /// The kernel does not say how many descriptors there may be.
    #[error("the kernel does not say how many descriptors there may be")]
    Unknown(#[source] std::io::Error),
    /// There are too few.
    #[error(
        "{most} descriptors are too few: {open} are in use, {FEWEST_CLIENTS} clients need one each, and {SPARE_DESCRIPTORS} \
         are for what the VM opens now and then"
    )]
    TooFew {
        /// Those that there may be.
        most: u64,
        /// Those that are in use.
        open: u64,
    },
}

impl Limits {
    /// The default, or what this process has descriptors for: each client is one, and some are left for
    /// what a VM opens now and then.
    ///
    /// # Errors
    /// [`LimitsError`]: a VM that came up all the same could not be reached.
    pub fn of_this_process() -> Result<Self, LimitsError> {
        let most = descriptors::limit().map_err(LimitsError::Unknown)?;
        let open = match descriptors::open() {
            Ok(open) => open,
            // All of them: there was none to count them with.
            Err(error) if error.raw_os_error() == Some(libc::EMFILE) => most.unwrap_or(u64::MAX),
            // Without /proc nobody can tell.
            Err(_) => 0,
        };
        Self::with_descriptors(most, open)
    }

    /// The limits where a process may have `most` descriptors, and has `open` ones already.
    ///
    /// # Errors
    /// [`LimitsError::TooFew`].
    pub fn with_descriptors(most: Option<u64>, open: u64) -> Result<Self, LimitsError> {
        let default = Self::default();
        let Some(most) = most else { return Ok(default) };
        let left = usize::try_from(most.saturating_sub(open.saturating_add(SPARE_DESCRIPTORS))).unwrap_or(usize::MAX);
        if left < FEWEST_CLIENTS {
            return Err(LimitsError::TooFew { most, open });
        }
        let clients = left.min(default.clients);
        Ok(Self { clients, prompt_places: default.prompt_places.min(clients / 2), ..default })
    }

    /// Clients that may wait for work at once.
    fn at_work(&self) -> usize {
        self.clients.saturating_sub(self.prompt_places).max(1)
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
    left: Arc<AtomicBool>,
    answered: bool,
}

impl Responder {
    /// Whether the client has hung up: nobody waits for the answer.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.left.load(Ordering::Relaxed)
    }

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
    troubles: RateLimit,
    deaf: Option<std::io::Error>,
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
            troubles: RateLimit::default(),
            deaf: None,
        })
    }

    /// What makes it look after its streams again.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.queue))
    }

    /// Why it would never hear of a client, if the loop that it was added to cannot watch what it needs.
    pub fn take_failure(&mut self) -> Option<std::io::Error> {
        self.deaf.take()
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
                    self.trouble("accept a client", &error);
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
        if self.clients.len() >= self.limits.clients
            && !self.drop_those_that_left(ops)
            && !self.drop_an_idle_client(ops)
        {
            let message = format!("the VM serves {} clients already; try again", self.limits.clients);
            let line = Reply::error(ErrorKind::Busy, message).to_line();
            // A new socket has room for a short line; a client that is gone needs none.
            let _ = (&stream).write(line.as_bytes());
            return;
        }
        let fd = stream.as_raw_fd();
        self.next_id += 1;
        let client = Connection::new(self.next_id, stream);
        if let Err(error) = watch(ops, Events::new(client.stream(), client.registered)) {
            self.trouble("watch a client", &error);
            return;
        }
        self.clients.insert(fd, client);
    }

    /// Makes room by closing clients that hung up before the loop came to hear of it, if there are any. What
    /// such a client had asked for before it left is still carried out.
    fn drop_those_that_left(&mut self, ops: &mut EventOps) -> bool {
        let mut polls: Vec<_> =
            self.clients.values().map(|client| PollFd::new(client.stream(), PollFlags::IN)).collect();
        if rustix::event::poll(&mut polls, Some(&Timespec::default())).is_err() {
            return false;
        }
        let gone = |poll: &PollFd<'_>| poll.revents().intersects(PollFlags::HUP | PollFlags::ERR);
        let gone: Vec<bool> = polls.iter().map(gone).collect();
        let left: Vec<RawFd> = self.clients.keys().zip(gone).filter(|(_, gone)| *gone).map(|(fd, _)| *fd).collect();
        for fd in &left {
            if self.clients.get(fd).is_some_and(|client| !client.is_waiting()) {
                self.pump(*fd, ops);
            }
            self.close(*fd, ops);
        }
        !left.is_empty()
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
        let at_work = self.clients.values().filter(|client| client.waits_for_work()).count();
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
                    // It does not wait itself now, so it is not among them.
                    Ok(request) if !request.is_prompt() && at_work >= self.limits.at_work() => {
                        let message = format!("the VM works on {at_work} requests already; try again");
                        client.reply(&Reply::error(ErrorKind::Busy, message).to_line());
                    }
                    Ok(request) => {
                        client.start_waiting(!request.is_prompt());
                        let (queue, left) = (self.queue.clone(), client.left.clone());
                        (self.dispatch)(request, Responder { queue, fd, id: client.id, left, answered: false });
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
                    self.trouble("watch a client", &error);
                    self.close(fd, ops);
                }
            }
        } else if !keep {
            self.close(fd, ops);
        }
    }

    /// Says what went wrong with a client, as often as a client may cause a line.
    fn trouble(&self, step: &str, error: &dyn std::fmt::Display) {
        if let Some(number) = self.troubles.tick() {
            log::warn!("control socket: cannot {step} ({number} failures so far): {error}");
        }
    }

    fn close(&mut self, fd: RawFd, ops: &mut EventOps) {
        if let Some(client) = self.clients.remove(&fd) {
            client.left.store(true, Ordering::Relaxed);
            // Before the descriptor is closed: its number may belong to the next client.
            if let Err(error) = ops.remove(Events::empty(client.stream())) {
                self.trouble("forget a client", &error);
            }
        }
    }

    fn deliver(&mut self, ops: &mut EventOps) {
        // Read before the queue is emptied: a reply that comes in between wakes the loop again.
        let _ = self.queue.wake.read();
        let answers = std::mem::take(&mut *lock(&self.queue.lines));
        for Answer { fd, id, line, stream } in answers {
            if let Some(client) = self.clients.get_mut(&fd).filter(|client| client.id == id) {
                client.reply(&line);
                if let Some(stream) = stream {
                    client.start_stream(stream);
                }
                self.pump(fd, ops);
            }
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
            if let Err(error) = watch(ops, Events::new_raw(fd, EventSet::IN)) {
                self.deaf.get_or_insert(error);
            }
        }
    }
}
