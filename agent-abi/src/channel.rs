//! The channel between a host and an agent that runs as a program in a guest: frames of one size on
//! a byte stream, in both directions.
//!
//! Linux guests have it as a virtio-console port with the name [`PORT_NAME`]. The host sends a
//! [`Command`] with a ticket; the agent answers each, in order, with a [`Report`] under the same
//! ticket. When the agent opens the port, it says [`Frame::hello`] before anything else. A stream
//! starts with a whole frame each time that the port is opened; what is left of one when it is closed
//! is nobody's. Every frame decodes to something: nothing that a peer sends is an error here.

use crate::{Command, Report};
use guest_abi::header::ABI_VERSION;
use guest_abi::mailbox::{WORDS, Words};

/// The port's name: `/dev/virtio-ports/org.llfree.agent`, and in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "org.llfree.agent";
/// Bytes of each frame.
pub const FRAME_BYTES: usize = size_of::<Frame>();
/// The ticket under which an agent says that it is up. No command has it.
pub const HELLO: u64 = u64::MAX;

/// One frame, as it is on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Frame {
    /// The number that a report has in common with its command; the host gives each number once.
    pub ticket: u64,
    /// A command, a report, or the words of a hello.
    pub words: Words,
}

const _: () = assert!(FRAME_BYTES == 264);

impl Frame {
    /// Host half: a command. `ticket` is not [`HELLO`].
    #[must_use]
    pub fn command(ticket: u64, command: &Command) -> Self {
        Self { ticket, words: command.encode() }
    }

    /// Guest half: what to do, or `None` for a command that this guest does not know. That one is
    /// answered as well, with [`Outcome::Unknown`](crate::Outcome::Unknown).
    #[must_use]
    pub fn to_command(&self) -> Option<Command> {
        Command::decode(&self.words)
    }

    /// Guest half: the first frame after the port was opened.
    #[must_use]
    pub fn hello() -> Self {
        let mut words = [0; WORDS];
        words[0] = u64::from(ABI_VERSION);
        Self { ticket: HELLO, words }
    }

    /// Guest half: a report on the command with this ticket.
    #[must_use]
    pub fn report(ticket: u64, report: &Report) -> Self {
        Self { ticket, words: report.encode() }
    }

    /// Host half: the [`ABI_VERSION`] that the agent was built for, if this is its hello.
    #[must_use]
    pub fn hello_version(&self) -> Option<u64> {
        (self.ticket == HELLO).then_some(self.words[0])
    }

    /// Host half: a report, if this is not a hello; every word is a claim and may hold anything.
    #[must_use]
    pub fn to_report(&self) -> Report {
        Report::decode(&self.words)
    }

    /// The frame as it is sent, little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; FRAME_BYTES] {
        let mut bytes = [0; FRAME_BYTES];
        let words = [self.ticket].into_iter().chain(self.words);
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// A frame as it was received.
    #[must_use]
    pub fn from_bytes(bytes: [u8; FRAME_BYTES]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let mut frame = Self { ticket: 0, words: [0; WORDS] };
        let places = [&mut frame.ticket].into_iter().chain(&mut frame.words);
        for (place, word) in places.zip(words) {
            *place = u64::from_le_bytes(*word);
        }
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Outcome;

    #[test]
    fn a_command_and_its_report_survive_the_wire() {
        let command = Command::Alloc { bytes: 1 << 30, order: shared_layout::Order::HUGE, seed: 7 };
        let sent = Frame::command(5, &command);
        let received = Frame::from_bytes(sent.to_bytes());
        assert_eq!((received.ticket, received.to_command()), (5, Some(command)));
        let report = Report { outcome: Outcome::Corrupt as u64, mismatches: 3, ..Report::default() };
        let received = Frame::from_bytes(Frame::report(5, &report).to_bytes());
        assert_eq!((received.ticket, received.hello_version(), received.to_report()), (5, None, report));
    }

    #[test]
    fn a_hello_names_the_version() {
        let received = Frame::from_bytes(Frame::hello().to_bytes());
        assert_eq!(received.hello_version(), Some(u64::from(ABI_VERSION)));
    }

    #[test]
    fn numbers_are_little_endian_and_the_ticket_comes_first() {
        let bytes = Frame { ticket: 0x0102, words: [3; WORDS] }.to_bytes();
        assert_eq!((&bytes[..4], &bytes[8..12]), (&[2, 1, 0, 0][..], &[3, 0, 0, 0][..]));
    }

    #[test]
    fn any_bytes_are_a_frame() {
        for byte in 0..=u8::MAX {
            let frame = Frame::from_bytes([byte; FRAME_BYTES]);
            assert_eq!(frame.hello_version().is_some(), byte == u8::MAX);
            // The 32 words of a command are the same: an unknown one, whichever.
            assert_eq!(frame.to_command(), None);
        }
    }
}
