//! A table of descriptors of its own for each area: a thread of it that hangs keeps open what is that area's, and nothing else.
//!
//! Threads of a process have one table, and it is there until the last of them ends, also after a `SIGKILL`. A file of a
//! process whose file system is silent holds a thread in the kernel for as long as that likes; no other process is to take
//! its keeper for alive meanwhile, nor the next keeper find a listener that nobody serves.
//!
//! A thread begins with a door, one end of a pair of sockets; what it is to have besides comes through that. Its numbers mean
//! nothing elsewhere, and those of `/proc/self/fd` are not its own.

use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, RecvError, Sender, channel};

/// The first descriptor that is not input, output or log.
const BEYOND_STANDARD: RawFd = 3;

/// The inner end of a door, until the thread behind it has that.
pub(crate) struct Given {
    fd: OwnedFd,
    arrived: Receiver<Arrived>,
}

/// The same for that thread.
pub(crate) struct Gift {
    number: RawFd,
    arrived: Sender<Arrived>,
}

/// One end of a way for descriptors from table to table.
pub(crate) struct Door(OwnedFd);

impl Door {
    /// A door: this side's end, and the other's for a thread that is about to be started.
    pub(crate) fn new() -> io::Result<(Self, Given, Gift)> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let (given, gift) = give(theirs);
        Ok((Self(ours), given, gift))
    }

    /// The other side has a copy of it.
    pub(crate) fn pass(&self, fd: impl AsFd) -> io::Result<()> {
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        retry_on_intr(|| sendmsg(&self.0, &[IoSlice::new(b".")], &mut control, flags))?;
        Ok(())
    }

    /// What the other side passes next.
    pub(crate) fn receive(&self) -> io::Result<OwnedFd> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        retry_on_intr(|| recvmsg(&self.0, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
        let mut messages = control.drain();
        let fds = messages.find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        // The other side is gone, or this table has no room.
        fds.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// Whose the giver's descriptor is afterwards.
enum Arrived {
    /// The giver's: the receiver has a copy.
    Copied,
    /// The receiver's: there is one table.
    Moved,
}

/// Gives a descriptor to a thread that is about to be started.
pub(crate) fn give(fd: OwnedFd) -> (Given, Gift) {
    let (told, arrived) = channel();
    let gift = Gift { number: fd.as_raw_fd(), arrived: told };
    (Given { fd, arrived }, gift)
}

impl Given {
    /// Lets go of it once that thread has it, which is the first thing that it does.
    pub(crate) fn leave(self) {
        match self.arrived.recv() {
            Ok(Arrived::Moved) => _ = self.fd.into_raw_fd(),
            // It never began.
            Ok(Arrived::Copied) | Err(RecvError) => {}
        }
    }
}

impl Gift {
    /// For the thread's first act: its table of descriptors is its own from here on, with nothing but the standard ones, this
    /// one and `also`, and so is that of the threads that it starts.
    pub(crate) fn take(self, also: RawFd) -> Door {
        let arrived = match leave_table(&mut [self.number, also]) {
            Ok(()) => Arrived::Copied,
            Err(error) => {
                // A sandbox around us may not permit it.
                log::warn!(
                    "an area has its descriptors in common with others, which outlive the keeper if it hangs: {error}"
                );
                Arrived::Moved
            }
        };
        // SAFETY: the number is that of a copy in this thread's own table, where nothing else owns it, or, in a common one, of
        // the giver's, who waits for the word below and lets go of it then.
        let fd = unsafe { OwnedFd::from_raw_fd(self.number) };
        // A giver that is gone had one in another table, or ends the process.
        let _ = self.arrived.send(arrived);
        Door(fd)
    }
}

/// Gives the calling thread a table of its own, with the standard descriptors and some more.
fn leave_table(kept: &mut [RawFd]) -> io::Result<()> {
    // SAFETY: it changes what numbers of descriptors mean on this thread alone, to copies of what they were.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        return Err(io::Error::last_os_error());
    }
    kept.sort_unstable();
    let mut first = BEYOND_STANDARD;
    for fd in kept.iter().copied().chain([RawFd::MAX]) {
        if fd > first {
            // None of them is a process's file, whose close could hang: these never come into the common table.
            // SAFETY: these are copies; those of other threads stay open. Nothing that this thread can reach owns one of them:
            // it has just begun, and was given the descriptors that are kept and no others.
            if unsafe { libc::close_range(first.cast_unsigned(), (fd - 1).cast_unsigned(), 0) } != 0 {
                log::warn!("copies of others' descriptors stay open: {}", io::Error::last_os_error());
            }
        }
        first = first.max(fd.saturating_add(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn name(fd: RawFd) -> Option<String> {
        // Of this thread: of the process it would be that of its first one.
        Some(std::fs::read_link(format!("/proc/thread-self/fd/{fd}")).ok()?.to_string_lossy().into_owned())
    }

    #[test]
    fn a_thread_has_what_it_was_given_and_nothing_else() {
        let pipe = || io::pipe().expect("a pipe");
        let (before, (passed, mut written)) = (pipe(), pipe());
        let (ours, given, gift) = Door::new().expect("a pair");
        let between = File::open("/dev/null").expect("it is there");
        let also = pipe();
        let numbers = [before.0.as_raw_fd(), ours.0.as_raw_fd(), between.as_raw_fd(), also.1.as_raw_fd()];
        let (door, also_number) = (given.fd.as_raw_fd(), also.0.as_raw_fd());
        let kept = [door, also_number].map(name);
        let thread = std::thread::spawn(move || {
            let their_door = gift.take(also_number);
            let names = ([door, also_number].map(name), numbers.map(name));
            (names, io::read_to_string(File::from(their_door.receive().expect("it comes"))).expect("a pipe"))
        });
        given.leave();
        ours.pass(&passed).expect("there is room");
        io::Write::write_all(&mut written, b"words").expect("it is read");
        drop((passed, written));
        let (names, words) = thread.join().expect("no panic");
        assert_eq!((names, words), ((kept.clone(), [None, None, None, None]), "words".to_owned()));
        assert_ne!(name(door), kept[0], "it is the thread's alone");
        assert!(numbers.map(name).iter().all(Option::is_some), "the others are as they were");
    }

    #[test]
    fn a_thread_that_never_begins_leaves_its_end_to_us() {
        let (ours, given, gift) = Door::new().expect("a pair");
        drop(gift);
        given.leave();
        assert!(ours.pass(File::open("/dev/null").expect("it is there")).is_err(), "nobody is behind it");
        assert!(ours.receive().is_err());
    }
}
