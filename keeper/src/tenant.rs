//! One registered area: its handshake, its loop, its end.
//!
//! The thread has a loop of its own, with the connection that stands for the process, the control socket that has the
//! area's name, and a clock for audits. Whatever ends it, the area is let go of first and the connection closed last: the
//! process then has every frame again that was in hand here.

use crate::quota::{Identity, Place};
use crate::requests::Answering;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use llfree_area::wire::{REGISTRATION, Registration, answer};
use llfree_area::{AdoptError, Builder, ForeignArea, Switch};
use llfree_base::{RateLimit, error_line};
use llfree_control::protocol::Request;
use llfree_control::server::{ControlServer, Limits, Responder};
use llfree_control::socket::{Claim, SocketError};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send, sockopt,
};
use std::cell::Cell;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

/// How long a process may take to say what it wants after it connected.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two audits.
const AUDIT: Duration = Duration::from_secs(1);

/// Why an area was not registered, in words for its process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Words(#[from] llfree_area::wire::WireError),
    #[error("two descriptors come with a registration, the memory's and the table's")]
    Descriptors,
    #[error(transparent)]
    Full(#[from] crate::quota::Full),
    #[error("the name cannot be had")]
    Name(#[from] SocketError),
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    #[error("no registration came")]
    Silent(#[source] io::Error),
    #[error("the keeper lacks something")]
    Host(#[source] io::Error),
}

/// What came with a registration.
struct Offer {
    words: Registration,
    memory: OwnedFd,
    table: OwnedFd,
}

/// Registers the process at the other end, and serves its area until either is gone.
pub(crate) fn serve(connection: &OwnedFd, pid: i32, place: Place, dir: &Path, exit: EventFd) {
    match register(connection, pid, &place, dir, exit) {
        Ok(mut served) => {
            let name = served.name.clone();
            if retry_on_intr(|| send(connection, &answer(Ok(())), SendFlags::NOSIGNAL)).is_ok() {
                log::info!("{name}: registered by process {pid}");
                served.run();
                log::info!("{name}: gone");
            }
            // Before the connection is closed: see above. Who registers again then finds the place free.
            drop((served, place));
        }
        Err(refusal) => {
            let text = error_line(&refusal);
            log::info!("process {pid} was refused: {text}");
            drop(place);
            // Whoever has hung up does not want to know.
            let _ = retry_on_intr(|| send(connection, &answer(Err(&text)), SendFlags::NOSIGNAL | SendFlags::DONTWAIT));
        }
    }
}

/// An area with everything that answers for it.
struct Served {
    name: String,
    events: EventManager<Box<dyn MutEventSubscriber>>,
    over: Rc<Cell<bool>>,
    // Removes the control socket.
    _claim: Claim,
}

impl Served {
    fn run(&mut self) {
        while !self.over.get() {
            if let Err(error) = self.events.run() {
                log::error!("{}: its loop ended: {error:?}", self.name);
                return;
            }
        }
    }
}

fn register(connection: &OwnedFd, pid: i32, place: &Place, dir: &Path, exit: EventFd) -> Result<Served, Refusal> {
    let Offer { words, memory, table } = receive(connection)?;
    let meta = rustix::fs::fstat(&table).map_err(|error| Refusal::Host(error.into()))?;
    place.fill(words.huge_frames, Identity { device: meta.st_dev, inode: meta.st_ino })?;
    let claim = Claim::by_name(dir, &words.name)?;
    let area = ForeignArea::adopt(memory, table, words.huge_frames)?;
    area.auto_reclaim(Switch(Some(Builder::AUTO_RECLAIM))).map_err(AdoptError::from)?;
    let answering = Rc::new(Answering {
        name: words.name.clone(),
        // Never negative for a process that is there.
        pid: pid.unsigned_abs(),
        area,
        since: Instant::now(),
    });
    let of_requests = answering.clone();
    let dispatch = move |request: Request, responder: Responder| responder.answer(&of_requests.answer(request));
    let of_process = Limits::of_this_process().map_err(|error| Refusal::Host(io::Error::other(error)))?;
    let limits = Limits { clients: 16, prompt_places: 4, ..of_process };
    let server = ControlServer::new(claim.listener()?, limits, dispatch).map_err(Refusal::Host)?;
    let over = Rc::new(Cell::new(false));
    let clock = Clock::new(answering).map_err(Refusal::Host)?;
    let watch = Watch { fds: [connection.as_raw_fd(), exit.as_raw_fd()], _exit: exit, over: over.clone() };
    let host = |error: event_manager::Error| Refusal::Host(io::Error::other(format!("{error:?}")));
    let mut events = EventManager::new().map_err(host)?;
    for part in [Box::new(server) as Box<dyn MutEventSubscriber>, Box::new(clock), Box::new(watch)] {
        events.add_subscriber(part);
    }
    Ok(Served { name: words.name, events, over, _claim: claim })
}

/// The first packet, with its descriptors. Whatever else comes is closed.
fn receive(connection: &OwnedFd) -> Result<Offer, Refusal> {
    let silent = |error: rustix::io::Errno| Refusal::Silent(error.into());
    sockopt::set_socket_timeout(connection, sockopt::Timeout::Recv, Some(PATIENCE)).map_err(silent)?;
    // One byte more than there may be, so that too many are seen.
    let mut bytes = [0; REGISTRATION + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got =
        retry_on_intr(|| recvmsg(connection, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)).map_err(silent)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    if got.bytes == 0 {
        return Err(Refusal::Silent(io::ErrorKind::UnexpectedEof.into()));
    }
    let words = Registration::from_bytes(&bytes[..got.bytes])?;
    let count = files.len();
    let mut files = files.into_iter();
    match (files.next(), files.next()) {
        (Some(memory), Some(table)) if count == 2 && !got.flags.contains(ReturnFlags::CTRUNC) => {
            Ok(Offer { words, memory, table })
        }
        _ => Err(Refusal::Descriptors),
    }
}

/// Ends the loop when the process is gone, or the keeper goes.
struct Watch {
    fds: [i32; 2],
    _exit: EventFd,
    over: Rc<Cell<bool>>,
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // A process that goes on talking breaks the rules; a packet of its is as good as a farewell.
        self.over.set(true);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let sets = [EventSet::IN | EventSet::READ_HANG_UP, EventSet::IN];
        for (fd, set) in self.fds.into_iter().zip(sets) {
            if let Err(error) = ops.add(Events::new_raw(fd, set)) {
                log::error!("a process cannot be watched: {error:?}");
                self.over.set(true);
            }
        }
    }
}

/// Audits once a second.
struct Clock {
    answering: Rc<Answering>,
    timer: TimerFd,
    failures: RateLimit,
}

impl Clock {
    fn new(answering: Rc<Answering>) -> io::Result<Self> {
        let mut timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        timer.reset(AUDIT, Some(AUDIT)).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self { answering, timer, failures: RateLimit::default() })
    }
}

impl MutEventSubscriber for Clock {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // It never blocks: the timer has fired.
        let _ = self.timer.wait();
        if let Err(error) = self.answering.area.audit()
            && let Some(number) = self.failures.tick()
        {
            log::warn!("{}: an audit failed ({number} so far): {}", self.answering.name, error_line(&error));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.timer, EventSet::IN)) {
            log::warn!("{}: nothing is audited: {error:?}", self.answering.name);
        }
    }
}
