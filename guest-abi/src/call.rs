//! [`Call`]: everything a guest can ask of its host, guest half and host half side by side.
//!
//! A call is made by filling the vCPU's mailbox and writing any value to the doorbell page at the
//! call's offset; its discriminant *is* that offset. The write returns when the reply is there.
//! Adding a call: one line in the table here, one arm in [`Request::encode`] and [`Request::decode`], one
//! handler in the VMM.

use crate::mailbox::{WORDS, Words};
use core::ops::Range;
use shared_layout::{HugeId, HugeRange};

/// Bytes of the doorbell page.
pub const DOORBELL_BYTES: u64 = 4096;
/// First port of the doorbell's alias in I/O space: a call's port is this plus its offset / 8.
pub const DOORBELL_PORT: u16 = 0x1f00;
/// All ports of the alias: one for each eight bytes of the page.
pub const DOORBELL_PORTS: Range<u16> = DOORBELL_PORT..DOORBELL_PORT + (DOORBELL_BYTES / 8) as u16;

/// Makes the calls, and the list of them, from one table.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $offset:literal,)*) => {
        /// The request; the value is the offset in the doorbell page.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u64)]
        pub enum Call {
            $($(#[$doc])* $name = $offset,)*
        }

        impl Call {
            /// All calls, for tests and tables.
            pub const ALL: [Self; [$($offset),*].len()] = [$(Self::$name),*];
        }
    };
}

calls! {
    /// The guest is up and states its ABI version.
    Hello = 0x00,
    /// Sleep until the host has work: the reply carries a command for the agent in the guest.
    Wait = 0x08,
    /// The result of that command.
    Done = 0x10,
    /// Back a range of huge frames with zeroed memory.
    Install = 0x18,
    /// A line for the host's log.
    Log = 0x20,
    /// The guest cannot go on, and says why.
    Panic = 0x28,
    /// The guest ends on its own.
    Exit = 0x30,
    /// The exception entry was reached; rung by ring-0 code that the VMM placed.
    Exception = 0x38,
    /// The guest is about to kill for want of memory: could it have some of what the host holds? Only with
    /// [`FEATURE_OWN_ALLOCATOR`](crate::header::FEATURE_OWN_ALLOCATOR).
    Need = 0x40,
}

/// Flag of a Hello: the guest has given what is free, and from now on touches only what was installed. See
/// [the header](crate::header#a-guest-with-an-allocator-of-its-own).
pub const HELLO_OWN_ALLOCATOR: u64 = 1 << 0;
/// Flag beside it: not quite, as the host had no memory for all that is in use. That comes by touch still, until a Hello
/// without this flag. Only with [`FEATURE_BY_TOUCH`](crate::header::FEATURE_BY_TOUCH), and only if an install failed for
/// want of the host's memory or by its kernel's refusal: else it counts as not said.
pub const HELLO_BY_TOUCH: u64 = 1 << 1;

impl Call {
    /// The call at an offset of the doorbell page, if there is one.
    #[must_use]
    pub fn from_offset(offset: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|call| *call as u64 == offset)
    }

    /// The call at an I/O port of the doorbell's alias, if there is one.
    #[must_use]
    pub fn from_port(port: u16) -> Option<Self> {
        Self::from_offset(u64::from(port.checked_sub(DOORBELL_PORT)?) * 8)
    }
}

/// The outcome of a call: the first word of every reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Status {
    /// Done as asked.
    Ok = 0,
    /// No call has this number.
    UnknownCall = 1,
    /// An argument is out of range; nothing was done.
    BadArgument = 2,
    /// A frame of the range is held by the host; the frames before it were installed.
    Held = 3,
    /// The host has no memory; some frames before the failing one may have been installed.
    NoMemory = 4,
    /// The host failed for another reason, which its log may name, or it is stopping the guest; some
    /// frames may have been installed.
    HostError = 5,
    /// The guest's ABI version is not the host's.
    AbiMismatch = 6,
}

impl Status {
    /// The status with this number, if there is one.
    #[must_use]
    pub fn from_word(word: u64) -> Option<Self> {
        [Self::Ok, Self::UnknownCall, Self::BadArgument, Self::Held, Self::NoMemory, Self::HostError, Self::AbiMismatch]
            .into_iter()
            .find(|status| *status as u64 == word)
    }
}

/// A call with its arguments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// See [`Call::Hello`].
    Hello {
        /// [`ABI_VERSION`](crate::header::ABI_VERSION) the guest was built with.
        abi_version: u32,
        /// [`HELLO_OWN_ALLOCATOR`], with [`HELLO_BY_TOUCH`] or without, or nothing; unknown bits are ignored.
        flags: u64,
    },
    /// See [`Call::Wait`].
    Wait,
    /// See [`Call::Done`]; the words are the agent's report.
    Done(Words),
    /// See [`Call::Install`].
    Install {
        /// The huge frames, at least 1.
        frames: HugeRange,
    },
    /// See [`Call::Log`]; the words are a [packed text](crate::mailbox::pack_text).
    Log(Words),
    /// See [`Call::Panic`]; the words are a packed text.
    Panic(Words),
    /// See [`Call::Exit`].
    Exit {
        /// 0 for success.
        code: u32,
    },
    /// See [`Call::Exception`].
    Exception,
    /// See [`Call::Need`]. The reply's second word is how many were released: they are free and evicted.
    Need {
        /// Held huge frames that the guest would have back, at least 1.
        huge_frames: u32,
    },
}

impl Request {
    /// Guest half: the call to ring and the words to put in the mailbox first.
    #[must_use]
    pub fn encode(&self) -> (Call, Words) {
        let words = |first: u64, second: u64| {
            let mut words = [0; WORDS];
            words[0] = first;
            words[1] = second;
            words
        };
        match *self {
            Self::Hello { abi_version, flags } => (Call::Hello, words(u64::from(abi_version), flags)),
            Self::Wait => (Call::Wait, words(0, 0)),
            Self::Done(report) => (Call::Done, report),
            Self::Install { frames } => (Call::Install, words(frames.first().0.into(), frames.count().into())),
            Self::Log(text) => (Call::Log, text),
            Self::Panic(text) => (Call::Panic, text),
            Self::Exit { code } => (Call::Exit, words(u64::from(code), 0)),
            Self::Exception => (Call::Exception, words(0, 0)),
            Self::Need { huge_frames } => (Call::Need, words(u64::from(huge_frames), 0)),
        }
    }

    /// Host half: total over all words.
    ///
    /// # Errors
    /// [`Status::BadArgument`] for a number that does not fit its type or is out of range on its
    /// face. Whether frames exist is for the callee to check.
    pub fn decode(call: Call, words: &Words) -> Result<Self, Status> {
        let narrow = |word: u64| u32::try_from(word).map_err(|_| Status::BadArgument);
        Ok(match call {
            Call::Hello => Self::Hello { abi_version: narrow(words[0])?, flags: words[1] },
            Call::Wait => Self::Wait,
            Call::Done => Self::Done(*words),
            Call::Install => {
                let frames = HugeRange::new(HugeId(narrow(words[0])?), narrow(words[1])?);
                Self::Install { frames: frames.filter(|frames| !frames.is_empty()).ok_or(Status::BadArgument)? }
            }
            Call::Log => Self::Log(*words),
            Call::Panic => Self::Panic(*words),
            Call::Exit => Self::Exit { code: narrow(words[0])? },
            Call::Exception => Self::Exception,
            Call::Need => match narrow(words[0])? {
                0 => return Err(Status::BadArgument),
                huge_frames => Self::Need { huge_frames },
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mailbox::pack_text;

    #[test]
    fn offsets_lie_in_the_doorbell_page_and_are_distinct() {
        for (i, call) in Call::ALL.into_iter().enumerate() {
            assert_eq!(call as u64, i as u64 * 8);
            assert!((call as u64) < DOORBELL_BYTES);
            assert_eq!(Call::from_offset(call as u64), Some(call));
            assert_eq!(Call::from_port(DOORBELL_PORT + i as u16), Some(call));
        }
        assert_eq!(Call::from_offset(4), None);
        assert_eq!(Call::from_offset(0x48), None);
        assert_eq!(Call::from_port(DOORBELL_PORT - 1), None);
    }

    #[test]
    fn requests_survive_the_mailbox() {
        for request in [
            Request::Hello { abi_version: 1, flags: HELLO_OWN_ALLOCATOR | HELLO_BY_TOUCH },
            Request::Wait,
            Request::Done([3; WORDS]),
            Request::Install { frames: HugeRange::saturating(HugeId(7), 3) },
            Request::Log(pack_text("hello")),
            Request::Panic(pack_text("no")),
            Request::Exit { code: 2 },
            Request::Exception,
            Request::Need { huge_frames: 32 },
        ] {
            let (call, words) = request.encode();
            assert_eq!(Request::decode(call, &words), Ok(request));
        }
    }

    #[test]
    fn out_of_range_install_arguments_are_refused() {
        let mut words = [0; WORDS];
        for (first, count) in [(0, 0), (1 << 32, 1), (0, 1 << 32), (u64::MAX, u64::MAX), (0xffff_ffff, 1)] {
            words[0] = first;
            words[1] = count;
            assert_eq!(Request::decode(Call::Install, &words), Err(Status::BadArgument), "{first} {count}");
        }
    }

    #[test]
    fn a_need_of_nothing_or_of_too_much_is_refused() {
        let mut words = [0; WORDS];
        for need in [0, 1 << 32, u64::MAX] {
            words[0] = need;
            assert_eq!(Request::decode(Call::Need, &words), Err(Status::BadArgument), "{need}");
        }
    }

    #[test]
    fn every_status_has_one_number() {
        for word in 0..7 {
            assert_eq!(Status::from_word(word).map(|s| s as u64), Some(word));
        }
        assert_eq!(Status::from_word(7), None);
    }
}
