//! One registered area: its loop, its end.
//!
//! The thread has a loop of its own, with the connection that stands for the process and the control socket that has the
//! area's name; nothing in it takes long, for another thread [works](crate::work). Whatever ends the loop, the work ends at
//! its next batch, the area is let go of, and the connection is closed last: the process then has every frame again that was
//! in hand here.

use crate::exit::Exit;
use crate::handshake::{Refusal, are_memory, receive};
use crate::quota::{Identity, Place};
use crate::requests::Answering;
use crate::work::Work;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use llfree_area::wire::answer;
use llfree_area::{AdoptError, Builder, ForeignArea, Switch};
use llfree_base::error_line;
use llfree_control::protocol::Request;
use llfree_control::server::{ControlServer, Limits, Responder};
use llfree_control::socket::Claim;
use rustix::io::retry_on_intr;
use rustix::net::{SendFlags, send};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// Clients of one area at once.
const CLIENTS: usize = 16;
/// Places among these for clients that ask what is answered at once.
const PROMPT_PLACES: usize = 4;

/// Registers the process at the other end, and serves its area until either is gone.
pub(crate) fn serve(connection: &OwnedFd, pid: Option<u32>, place: Place, dir: &Path, exit: &Arc<Exit>) {
    let mut files = Vec::new();
    let process = pid.map_or("of another namespace".to_owned(), |pid| pid.to_string());
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match register(connection, &mut files, pid, &place, dir, exit) {
        Ok(mut served) => {
            let name = served.name.clone();
            if retry_on_intr(|| send(connection, &answer(Ok(())), flags)).is_ok() {
                log::info!("{name}: registered by process {process}");
                served.run();
                log::info!("{name}: gone");
            }
            // Before the connection is closed: see above. Who registers again then finds the place free.
            served.end();
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
    // Removes the control socket.
    claim: Claim,
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
        let Self { events, work, claim, .. } = self;
        // Its server has the other end of the work's queue.
        drop(events);
        drop(claim);
        drop(work);
    }
}

fn register(
    connection: &OwnedFd,
    files: &mut Vec<OwnedFd>,
    pid: Option<u32>,
    place: &Place,
    dir: &Path,
    exit: &Arc<Exit>,
) -> Result<Served, Refusal> {
    let words = receive(connection, exit, files)?;
    let (Some(table), Some(memory)) = (files.pop(), files.pop()) else { return Err(Refusal::Descriptors) };
    let meta = rustix::fs::fstat(&table).map_err(|error| Refusal::Host(error.into()))?;
    place.fill(words.huge_frames, Identity { device: meta.st_dev, inode: meta.st_ino })?;
    let claim = Claim::by_name(dir, &words.name)?;
    let area = ForeignArea::adopt(memory, table, words.huge_frames)?;
    area.auto_reclaim(Switch(Some(Builder::AUTO_RECLAIM))).map_err(AdoptError::from)?;
    let answering =
        Arc::new(Answering { name: words.name.clone(), pid: pid.unwrap_or(0), area, since: Instant::now() });
    let (work, jobs) = Work::start(answering.clone()).map_err(Refusal::Host)?;
    let dispatch = move |request: Request, responder: Responder| match request {
        Request::Ping => responder.answer(&answering.pong()),
        request => jobs.push(request, responder),
    };
    let of_process = Limits::of_this_process().map_err(|error| Refusal::Host(io::Error::other(error)))?;
    let server = ControlServer::new(claim.listener()?, limits(of_process), dispatch).map_err(Refusal::Host)?;
    let over = Rc::new(Cell::new(false));
    let watch = Watch { fds: [connection.as_raw_fd(), exit.raw()], _exit: exit.clone(), over: over.clone() };
    let host = |error: event_manager::Error| Refusal::Host(io::Error::other(format!("{error:?}")));
    let mut events = EventManager::new().map_err(host)?;
    for part in [Box::new(server) as Box<dyn MutEventSubscriber>, Box::new(watch)] {
        events.add_subscriber(part);
    }
    Ok(Served { name: words.name, events, over, work, claim })
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
