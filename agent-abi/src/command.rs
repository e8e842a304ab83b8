//! What a host asks of the test guest, and what it hears back.
//!
//! A [`Command`] travels in the reply of [`Call::Wait`](guest_abi::Call::Wait) (words 1..), its
//! [`Report`] in the request of [`Call::Done`](guest_abi::Call::Done). Each vCPU is its own agent: the
//! host gives each a share and adds up the reports. Both directions decode totally.

use guest_abi::mailbox::{WORDS, Words};
use shared_layout::Order;

/// Work for one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Allocate blocks of `order` until `bytes` are reached, touch and stamp every page.
    Alloc {
        /// Bytes to allocate, rounded up to whole blocks.
        bytes: u64,
        /// Block size.
        order: Order,
        /// Mixed into every stamp.
        seed: u64,
    },
    /// Check every stamp of every block this vCPU owns.
    Verify,
    /// Free blocks until `bytes` are reached; `u64::MAX` frees all.
    Free {
        /// Bytes to free, rounded up to whole blocks.
        bytes: u64,
        /// Pick blocks at random instead of the newest first.
        random: bool,
        /// Seeds that choice.
        seed: u64,
    },
    /// Allocate, stamp, verify and free blocks of mixed orders and lifetimes.
    Churn {
        /// The duration.
        millis: u64,
        /// Stop growing at this many bytes.
        bytes: u64,
        /// Seeds sizes and lifetimes.
        seed: u64,
    },
    /// Give cached frames back to the shared table, so that the host can take them.
    Drain,
    /// Only report.
    Stats,
    /// Look after the devices for a while: the word of a host whose guest has no interrupts.
    Devices,
    /// Allocate huge frames one after another and touch them; samples are nanoseconds that an
    /// allocation took, its install included.
    Burst {
        /// Bytes to allocate, rounded up to huge frames.
        bytes: u64,
        /// The part of each to touch.
        touch: Touch,
        /// Keep and stamp them, instead of freeing them.
        keep: bool,
        /// Ask for each frame when it is needed, and for none ahead.
        single: bool,
    },
    /// STREAM's triad over three arrays; samples are MB/s.
    Stream {
        /// The duration.
        millis: u64,
        /// Bytes in the three arrays together.
        bytes: u64,
        /// Bytes to allocate, touch and free between two samples.
        beside: u64,
    },
    /// Fixed time quanta; samples are units of work done in one.
    Ftq {
        /// The duration.
        millis: u64,
        /// A quantum in microseconds.
        quantum_us: u64,
        /// Bytes to allocate, touch and free between two quanta.
        beside: u64,
    },
}

/// The part of each block that a [`Command::Burst`] touches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Touch {
    /// Nothing.
    Nothing = 0,
    /// One word of each huge frame.
    Frames = 1,
    /// One word of each page.
    Pages = 2,
}

impl Touch {
    fn from_word(word: u64) -> Option<Self> {
        [Self::Nothing, Self::Frames, Self::Pages].into_iter().find(|touch| *touch as u64 == word)
    }
}

impl Command {
    /// Host half: the words after the status word of a reply.
    #[must_use]
    pub fn encode(&self) -> Words {
        let mut words = [0; WORDS];
        words[1..5].copy_from_slice(&match *self {
            Self::Alloc { bytes, order, seed } => [1, bytes, u64::from(order.get()), seed],
            Self::Verify => [2, 0, 0, 0],
            Self::Free { bytes, random, seed } => [3, bytes, u64::from(random), seed],
            Self::Churn { millis, bytes, seed } => [4, millis, bytes, seed],
            Self::Drain => [5, 0, 0, 0],
            Self::Stats => [6, 0, 0, 0],
            Self::Devices => [7, 0, 0, 0],
            Self::Burst { bytes, touch, keep, single } => {
                [8, bytes, touch as u64, u64::from(keep) | u64::from(single) << 1]
            }
            Self::Stream { millis, bytes, beside } => [9, millis, bytes, beside],
            Self::Ftq { millis, quantum_us, beside } => [10, millis, quantum_us, beside],
        });
        words
    }

    /// Guest half; `None` for a command this guest does not know.
    #[must_use]
    pub fn decode(words: &Words) -> Option<Self> {
        let [a, b, c] = [words[2], words[3], words[4]];
        Some(match words[1] {
            1 => Self::Alloc { bytes: a, order: Order::new(u8::try_from(b).ok()?)?, seed: c },
            2 => Self::Verify,
            3 => Self::Free { bytes: a, random: b != 0, seed: c },
            4 => Self::Churn { millis: a, bytes: b, seed: c },
            5 => Self::Drain,
            6 => Self::Stats,
            7 => Self::Devices,
            8 => Self::Burst { bytes: a, touch: Touch::from_word(b)?, keep: c & 1 != 0, single: c & 2 != 0 },
            9 => Self::Stream { millis: a, bytes: b, beside: c },
            10 => Self::Ftq { millis: a, quantum_us: b, beside: c },
            _ => return None,
        })
    }
}

/// The outcome of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Outcome {
    /// As asked.
    Ok = 0,
    /// The allocator has no block of that order: `bytes` says how far it came.
    OutOfMemory = 1,
    /// The host refused an install with the status in `detail`.
    InstallFailed = 2,
    /// A page held something other than its stamp.
    Corrupt = 3,
    /// A command that this guest does not know.
    Unknown = 4,
}

impl Outcome {
    /// The outcome with this number, if there is one.
    #[must_use]
    pub fn from_word(word: u64) -> Option<Self> {
        [Self::Ok, Self::OutOfMemory, Self::InstallFailed, Self::Corrupt, Self::Unknown]
            .into_iter()
            .find(|outcome| *outcome as u64 == word)
    }
}

/// One vCPU's report after a command. A claim, like all that a guest says.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct Report {
    /// An [`Outcome`].
    pub outcome: u64,
    /// Bytes allocated, freed or verified by this command.
    pub bytes: u64,
    /// Blocks allocated, freed or verified by this command.
    pub blocks: u64,
    /// Bytes this vCPU's blocks hold now.
    pub held_bytes: u64,
    /// Blocks this vCPU owns now.
    pub held_blocks: u64,
    /// Pages with a wrong stamp.
    pub mismatches: u64,
    /// Guest-physical address of the first of them.
    pub bad_address: u64,
    /// The stamp expected there.
    pub expected: u64,
    /// The word found there.
    pub found: u64,
    /// The status word of a failed install.
    pub detail: u64,
    /// Allocations since boot.
    pub allocs: u64,
    /// Frees since boot.
    pub frees: u64,
    /// Install calls since boot.
    pub installs: u64,
    /// Free base frames in the whole table, as the guest counts them.
    pub free_frames: u64,
    /// Huge frames that are wholly free, as the guest counts them.
    pub free_huge: u64,
    /// Nanoseconds this command took on the guest's clock, 0 without one.
    pub nanos: u64,
    /// Huge frames that install calls asked for before they were needed, since boot.
    pub ahead: u64,
    /// Not 0 if the vCPU's device drivers have more to do: the host calls them again.
    pub more: u64,
    /// The samples of a measuring command; empty otherwise.
    pub samples: Samples,
    /// Nanoseconds that it spent beside the samples: a burst on touching, the others on allocating,
    /// touching and freeing.
    pub beside_nanos: u64,
    /// Free for later; zero.
    pub reserved: [u64; WORDS - 27],
}

/// Samples of a measuring command, in the command's unit. Percentiles are by nearest rank: a sample
/// that at most this percentage of the samples is below.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct Samples {
    /// How many; 0 also where the guest has no clock.
    pub count: u64,
    /// Their mean.
    pub mean: u64,
    /// The smallest.
    pub min: u64,
    /// The 1st percentile.
    pub p1: u64,
    /// The median.
    pub p50: u64,
    /// The 99th percentile.
    pub p99: u64,
    /// The 99.9th percentile.
    pub p999: u64,
    /// The largest.
    pub max: u64,
}

const _: () = assert!(size_of::<Report>() == size_of::<Words>());

impl Report {
    /// Guest half.
    #[must_use]
    #[rustfmt::skip]
    pub fn encode(&self) -> Words {
        let Self { outcome, bytes, blocks, held_bytes, held_blocks, mismatches, bad_address, expected, .. } = *self;
        let Self { found, detail, allocs, frees, installs, free_frames, free_huge, nanos, ahead, more, .. } = *self;
        let Samples { count, mean, min, p1, p50, p99, p999, max } = self.samples;
        let named = [
            outcome, bytes, blocks, held_bytes, held_blocks, mismatches, bad_address, expected, found, detail, allocs,
            frees, installs, free_frames, free_huge, nanos, ahead, more, count, mean, min, p1, p50, p99, p999, max,
            self.beside_nanos,
        ];
        let mut words = [0; WORDS];
        let (first, rest) = words.split_at_mut(named.len());
        first.copy_from_slice(&named);
        rest.copy_from_slice(&self.reserved);
        words
    }

    /// Host half; every word is a claim and may hold anything.
    #[must_use]
    #[rustfmt::skip]
    pub fn decode(words: &Words) -> Self {
        let [
            outcome, bytes, blocks, held_bytes, held_blocks, mismatches, bad_address, expected, found, detail, allocs,
            frees, installs, free_frames, free_huge, nanos, ahead, more, count, mean, min, p1, p50, p99, p999, max,
            beside_nanos, reserved @ ..
        ] = *words;
        let samples = Samples { count, mean, min, p1, p50, p99, p999, max };
        Self {
            outcome, bytes, blocks, held_bytes, held_blocks, mismatches, bad_address, expected, found, detail, allocs,
            frees, installs, free_frames, free_huge, nanos, ahead, more, samples, beside_nanos, reserved,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_survive_the_mailbox() {
        for command in [
            Command::Alloc { bytes: 1 << 30, order: Order::HUGE, seed: 7 },
            Command::Verify,
            Command::Free { bytes: u64::MAX, random: true, seed: 9 },
            Command::Churn { millis: 10_000, bytes: 1 << 20, seed: 1 },
            Command::Drain,
            Command::Stats,
            Command::Devices,
            Command::Burst { bytes: 1 << 30, touch: Touch::Pages, keep: true, single: false },
            Command::Burst { bytes: 1, touch: Touch::Nothing, keep: false, single: true },
            Command::Stream { millis: 1, bytes: 2, beside: 3 },
            Command::Ftq { millis: 4, quantum_us: 5, beside: 6 },
        ] {
            assert_eq!(Command::decode(&command.encode()), Some(command));
        }
        assert_eq!(Command::decode(&[0; WORDS]), None);
        let mut bad = Command::Alloc { bytes: 1, order: Order::BASE, seed: 0 }.encode();
        bad[3] = 11;
        assert_eq!(Command::decode(&bad), None, "order 11");
        let mut bad = Command::Burst { bytes: 1, touch: Touch::Pages, keep: false, single: false }.encode();
        bad[3] = 3;
        assert_eq!(Command::decode(&bad), None, "no such touch");
    }

    #[test]
    fn reports_survive_the_mailbox() {
        let report = Report { outcome: 3, bytes: 5, bad_address: 0x1000, nanos: 77, ..Report::default() };
        let samples = Samples { count: 1, mean: 2, p999: 3, max: 4, ..Samples::default() };
        let report = Report { samples, beside_nanos: 8, ..report };
        assert_eq!(Report::decode(&report.encode()), report);
        assert_eq!(Outcome::from_word(3), Some(Outcome::Corrupt));
        assert_eq!(Outcome::from_word(5), None);
    }
}
