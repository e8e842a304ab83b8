//! One registered area: its loop, its end.
//!
//! The loop has the connection that stands for the process and the control socket that has the area's name; nothing in it
//! takes long, for another thread [works](crate::work). Both have a [table of descriptors](crate::own_table) that is this
//! area's. Whatever ends the loop, the work ends at its next batch, the area is let go of, and the connection is closed last:
//! the process then has every frame again that was in hand here.

use crate::exit::Exit;
use crate::handshake::{Refusal, are_memory, receive};
use crate::own_table::Door;
use crate::quota::{Identity, Place};
use crate::requests::Answering;
use crate::work::Work;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use llfree_area::wire::answer;
use llfree_area::{AdoptError, Builder, ForeignArea, Switch};
use llfree_base::error_line;
use llfree_base::thread::{Role, Spawner};
use llfree_control::protocol::Request;
use llfree_control::server::{ControlServer, Limits, Responder};
use llfree_control::socket::Claim;
use rustix::io::retry_on_intr;
use rustix::net::{SendFlags, send};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

/// The thread of one area's loop.
const LOOP: Role = Role::new("area-loop", &[]);
/// Clients of one area at once.
const CLIENTS: usize = 16;
/// Places among these for clients that ask what is answered at once.
const PROMPT_PLACES: usize = 4;

/// Registers the process at the other end, and serves its area until either is gone.
///
/// The calling thread has the area's name, and the connection to its very end. All that the process sends is with
/// another one, which may hang in it.
pub(crate) fn serve(connection: &OwnedFd, pid: Option<u32>, place: Place, dir: &Path, exit: &Arc<Exit>) {
    if let Err(error) = serve_behind_a_door(connection, pid, place, dir, exit) {
        log::warn!("a process could not register: {error}");
    }
}

fn serve_behind_a_door(
    connection: &OwnedFd,
    pid: Option<u32>,
    place: Place,
    dir: &Path,
    exit: &Arc<Exit>,
) -> io::Result<()> {
    let (door, given, gift) = Door::new()?;
    let (ask, asked) = channel::<String>();
    let (told, hears) = channel();
    let exit = exit.clone();
    let behind = move || {
        let door = gift.take(exit.raw());
        match door.receive() {
            Ok(connection) => serve_apart(&connection, pid, place, Names { ask, hears, door }, &exit),
            Err(error) => log::warn!("a process could not register: {error}"),
        }
    };
    let thread = Spawner::default().spawn("area-loop", LOOP, behind)?;
    given.leave();
    let passed = door.pass(connection);
    // It waits for that, or for the end of the door.
    let door = passed.is_ok().then_some(door);
    let mut claims = Vec::new();
    // Until that thread ends.
    for name in asked {
        let Some(door) = &door else { break };
        let claimed = Claim::by_name(dir, &name).and_then(|claim| Ok((claim.listener()?, claim)));
        let passed = claimed.map_err(Refusal::from).and_then(|(listener, claim)| {
            claims.push(claim);
            door.pass(listener).map_err(Refusal::Host)
        });
        // It waits for it.
        let _ = told.send(passed);
    }
    drop(door);
    if thread.join().is_err() {
        log::error!("the loop of an area panicked");
    }
    passed
}

/// The way to claim a name, for a thread with a table of its own.
struct Names {
    ask: Sender<String>,
    hears: Receiver<Result<(), Refusal>>,
    door: Door,
}

impl Names {
    /// Has a name claimed until this thread ends; its listener.
    fn claim(&self, name: &str) -> Result<UnixListener, Refusal> {
        let gone = || Refusal::Host(io::ErrorKind::BrokenPipe.into());
        self.ask.send(name.to_owned()).map_err(|_| gone())?;
        self.hears.recv().map_err(|_| gone())??;
        self.door.receive().map(UnixListener::from).map_err(Refusal::Host)
    }
}

/// The same on a thread with a table of its own.
fn serve_apart(connection: &OwnedFd, pid: Option<u32>, place: Place, names: Names, exit: &Arc<Exit>) {
    let mut files = Vec::new();
    let process = pid.map_or("of another namespace".to_owned(), |pid| pid.to_string());
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match register(connection, &mut files, pid, &place, &names, exit) {
        Ok(mut served) => {
            let name = served.name.clone();
            if retry_on_intr(|| send(connection, &answer(Ok(())), flags)).is_ok() {
                log::info!("{name}: registered by process {process}");
                served.run();
                log::info!("{name}: gone");
            }
            served.end();
            // Who registers again when it sees the connection closed finds the place free.
            drop(place);
        }
        Err(refusal) => {
            let text = error_line(&refusal);
            log::info!("process {process} was refused: {text}");
            // Who tries again finds the place free, but for one whose files may keep us.
            let kept = (!are_memory(&files)).then_some(place);
            // Whoever has hung up does not want to know.
            let _ = retry_on_intr(|| send(connection, &answer(Err(&text)), flags));
            drop(files);
            drop(kept);
        }
    }
}

/// An area with everything that answers for it.
struct Served {
    name: String,
    events: EventManager<Box<dyn MutEventSubscriber>>,
    over: Rc<Cell<bool>>,
    work: Work,
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

    /// Returns when nobody here has anything of the area in hand.
    fn end(self) {
        let Self { events, work, .. } = self;
        // Its server has the other end of the work's queue.
        drop(events);
        drop(work);
    }
}

fn register(
    connection: &OwnedFd,
    files: &mut Vec<OwnedFd>,
    pid: Option<u32>,
    place: &Place,
    names: &Names,
    exit: &Arc<Exit>,
) -> Result<Served, Refusal> {
    let words = receive(connection, exit, files)?;
    let (Some(table), Some(memory)) = (files.pop(), files.pop()) else { return Err(Refusal::Descriptors) };
    let meta = rustix::fs::fstat(&table).map_err(|error| Refusal::Host(error.into()))?;
    place.fill(words.huge_frames, Identity { device: meta.st_dev, inode: meta.st_ino })?;
    let area = ForeignArea::adopt(memory, table, words.huge_frames)?;
    // After what may be refused, for it is let go of only after the answer; then somebody who tries again would find it taken.
    let listener = names.claim(&words.name)?;
    area.auto_reclaim(Switch(Some(Builder::AUTO_RECLAIM))).map_err(AdoptError::from)?;
    let answering =
        Arc::new(Answering { name: words.name.clone(), pid: pid.unwrap_or(0), area, since: Instant::now() });
    let (work, jobs) = Work::start(answering.clone()).map_err(Refusal::Host)?;
    let dispatch = move |request: Request, responder: Responder| match request {
        Request::Ping => responder.answer(&answering.pong()),
        request => jobs.push(request, responder),
    };
    let of_process = Limits::of_this_process().map_err(|error| Refusal::Host(io::Error::other(error)))?;
    let server = ControlServer::new(listener, limits(of_process), dispatch).map_err(Refusal::Host)?;
    let over = Rc::new(Cell::new(false));
    let watch = Watch { fds: [connection.as_raw_fd(), exit.raw()], _exit: exit.clone(), over: over.clone() };
    let host = |error: event_manager::Error| Refusal::Host(io::Error::other(format!("{error:?}")));
    let mut events = EventManager::new().map_err(host)?;
    for part in [Box::new(server) as Box<dyn MutEventSubscriber>, Box::new(watch)] {
        events.add_subscriber(part);
    }
    Ok(Served { name: words.name, events, over, work })
}

/// As many clients as an area is to have, or as the process has descriptors for.
fn limits(of_process: Limits) -> Limits {
    Limits {
        clients: of_process.clients.min(CLIENTS),
        prompt_places: of_process.prompt_places.min(PROMPT_PLACES),
        ..of_process
    }
}

/// Ends the loop when the process is gone, or the keeper goes.
struct Watch {
    fds: [i32; 2],
    _exit: Arc<Exit>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_has_no_more_clients_than_the_process_has_descriptors_for() {
        let few = Limits::with_descriptors(Some(40), 20).expect("a few");
        assert_eq!((limits(few).clients, limits(few).prompt_places), (few.clients, few.prompt_places));
        assert!(few.clients < CLIENTS);
        let many = limits(Limits::default());
        assert_eq!((many.clients, many.prompt_places), (CLIENTS, PROMPT_PLACES));
    }
}
