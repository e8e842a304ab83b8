//! What a process sends to register: its words, and two files that are looked at before anything is asked of them.
//!
//! A file of another kind than memory may belong to a file system that answers when it likes, or never: to ask it for its
//! size blocks, and so does closing it, on a thread that a `SIGKILL` does not end. So the first question is one that the kernel answers by itself, and what fails it
//! is closed when its process has its answer.

use crate::exit::Exit;
use crate::quota::Full;
use llfree_area::AdoptError;
use llfree_area::patience::Deadline;
use llfree_area::wire::{REGISTRATION, Registration, WireError};
use llfree_control::socket::SocketError;
use rustix::event::{PollFd, PollFlags};
use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long a process may take to say what it wants after it connected.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why an area was not registered, in words for its process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Words(#[from] WireError),
    #[error("two descriptors come with a registration, the memory's and the table's")]
    Descriptors,
    #[error("the {0}'s file is no memory file")]
    OtherFile(&'static str),
    #[error(transparent)]
    Full(#[from] Full),
    #[error("the name cannot be had")]
    Name(#[from] SocketError),
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    #[error("no registration came")]
    Silent(#[source] io::Error),
    #[error("the keeper lacks something")]
    Host(#[source] io::Error),
}

/// Whether a file is in memory, so that its size can be asked for, and it be closed, without a wait for anybody. Asks no file
/// system. To take memory from it does wait, for whoever has its inode's lock: a process that writes to it out of a buffer
/// that its own silent file system is to fill has that for as long as it likes. It holds up its own area by that.
fn is_memory(file: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok()
}

/// Whether all of them are.
pub(crate) fn are_memory(files: &[OwnedFd]) -> bool {
    files.iter().all(is_memory)
}

/// The first packet. Its files are put into `files`, as many as came; the two that are called for are memory files if
/// there is no error.
pub(crate) fn receive(connection: &OwnedFd, exit: &Exit, files: &mut Vec<OwnedFd>) -> Result<Registration, Refusal> {
    let mut fds = [PollFd::new(connection, PollFlags::IN), exit.poll_fd()];
    Deadline::within(PATIENCE).poll(&mut fds).map_err(Refusal::Silent)?;
    // One byte more than there may be, so that too many are seen.
    let mut bytes = [0; REGISTRATION + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = retry_on_intr(|| recvmsg(connection, &mut parts, &mut control, flags));
    let got = got.map_err(|error| Refusal::Silent(error.into()))?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    if got.bytes == 0 {
        return Err(Refusal::Silent(io::ErrorKind::UnexpectedEof.into()));
    }
    let words = Registration::from_bytes(&bytes[..got.bytes])?;
    let [memory, table] = &files[..] else { return Err(Refusal::Descriptors) };
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Refusal::Descriptors);
    }
    match (is_memory(memory), is_memory(table)) {
        (true, true) => Ok(words),
        (false, _) => Err(Refusal::OtherFile("memory")),
        (true, false) => Err(Refusal::OtherFile("table")),
    }
}
