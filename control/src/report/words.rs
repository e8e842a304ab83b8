//! The words of reports: an enum for each field with a fixed set of values.
//!
//! On the wire they are strings. [`Word`] also accepts a string that only a newer VM knows, and writes
//! it back unchanged, so an older client still shows what it was told.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A word that this release knows, or one that only a newer VM does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "{T}Word"))]
#[serde(untagged)]
pub enum Word<T> {
    /// A word of this release.
    Known(T),
    /// Any other string. It comes from the peer, so make it printable before you show it.
    Other(String),
}

impl<T: Copy> Word<T> {
    /// The word, if this release knows it.
    #[must_use]
    pub fn known(&self) -> Option<T> {
        match self {
            Self::Known(word) => Some(*word),
            Self::Other(_) => None,
        }
    }
}

impl<T> From<T> for Word<T> {
    fn from(word: T) -> Self {
        Self::Known(word)
    }
}

impl<T: Default> Default for Word<T> {
    fn default() -> Self {
        Self::Known(T::default())
    }
}

impl<T: PartialEq> PartialEq<T> for Word<T> {
    fn eq(&self, word: &T) -> bool {
        matches!(self, Self::Known(known) if known == word)
    }
}

impl<T: fmt::Display> fmt::Display for Word<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(word) => word.fmt(f),
            Self::Other(word) => f.pad(word),
        }
    }
}

/// Defines enums whose variants have one name, on the wire and for people.
macro_rules! words {
    ($(
        $(#[$about:meta])*
        $name:ident { $($(#[$what:meta])* $variant:ident = $word:tt,)* }
    )*) => { $(
        $(#[$about])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub enum $name {
            $($(#[$what])* #[serde(rename = $word)] $variant,)*
        }

        impl $name {
            /// Its name, on the wire and for people.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
    )* };
}

words! {
    /// The channel over which a guest reports its memory use.
    #[derive(Default)]
    GuestSays {
        /// In the table that it shares with the host: true at any moment, if it is honest.
        #[default]
        Table = "table",
        /// By the balloon's statistics: true when they were sent, if it is honest.
        Statistics = "statistics",
        /// It says nothing, or said so too long ago.
        Nowhere = "nowhere",
    }

    /// The mechanism that sees a guest touch memory that it does not have.
    #[derive(Default)]
    Enforcement {
        /// A userfaultfd, in the act.
        #[default]
        Userfaultfd = "userfaultfd",
        /// Audits, afterwards.
        Audit = "audit",
        /// Nothing: with a device there is no such memory.
        None = "none",
    }

    /// The way that a VM's memory is made smaller and larger.
    #[derive(Default)]
    ElasticKind {
        /// By the table that guest and host share.
        #[default]
        Llfree = "llfree",
        /// By a virtio-balloon of 4 KiB pages.
        Balloon = "balloon",
        /// By a virtio-balloon of 2 MiB pages.
        BalloonHuge = "balloon-huge",
        /// By virtio-mem.
        VirtioMem = "virtio-mem",
        /// Not at all.
        None = "none",
        /// By the table or a balloon: the guest has not shown yet which it has.
        Undecided = "undecided",
    }

    /// What decided on the way that a VM's memory moves.
    #[derive(Default)]
    ChosenBy {
        /// Whoever launched it, or its kind of guest.
        #[default]
        Launch = "launch",
        /// The guest's kernel, which said that it shares its free memory.
        Hello = "hello",
        /// The guest's driver for its balloon, before any such word.
        Driver = "driver",
        /// Nothing yet.
        Nobody = "nobody",
    }

    /// How far a guest with an allocator of its own has come in handing its memory over.
    #[derive(Default)]
    HandOver {
        /// It boots, or shares nothing: all that it touches gets memory.
        Booting = "booting",
        /// What is free is shared, but the host had no memory for all that it uses: that comes by touch still.
        ByTouch = "by-touch",
        /// It touches nothing that it has not asked for.
        #[default]
        Complete = "complete",
    }

    /// Whether a VM's guest runs.
    #[derive(Default)]
    VmState {
        /// Its vCPUs and devices do their work.
        #[default]
        Running = "running",
        /// They stand still until a resume.
        Paused = "paused",
    }

    /// The current state of a vCPU.
    #[derive(Default)]
    VcpuState {
        /// It runs the guest, or serves a call of it.
        #[default]
        Running = "running",
        /// It waits for a command.
        Waiting = "waiting",
        /// It stands still with its VM.
        Paused = "paused",
    }

    /// The unit of a measurement's samples.
    #[derive(Default)]
    SampleUnit {
        /// Nanoseconds.
        #[default]
        Nanoseconds = "ns",
        /// Megabytes a second.
        MegabytesPerSecond = "MB/s",
        /// Units of work in a quantum.
        Work = "units",
    }

    /// Why a request was refused, for programs that would do something about it.
    Reason {
        /// The size is no multiple of 2 MiB.
        NotAMultiple = "not_a_multiple",
        /// The limit would be above the VM's memory.
        AboveMemory = "above_memory",
        /// A shrink to above the limit.
        AboveLimit = "above_limit",
        /// A grow to below the limit.
        BelowLimit = "below_limit",
        /// A shrink by all of the limit, or more.
        ByTooMuch = "by_too_much",
        /// A shrink to below virtio-mem's boot part.
        BelowBoot = "below_boot",
        /// The VM's memory stays as it is.
        NotElastic = "not_elastic",
        /// The guest shares no table with the host.
        NoTable = "no_table",
        /// A balloon's reporting of free pages is settled at launch.
        SetAtLaunch = "set_at_launch",
        /// Automatic reclaim is to keep more than the VM has.
        KeepTooLarge = "keep_too_large",
        /// An order that no block has.
        Order = "order",
        /// The VM is paused.
        Paused = "paused",
        /// The guest has no agent at work.
        NoAgent = "no_agent",
        /// The guest did not answer in time.
        NoAnswer = "no_answer",
        /// The guest has no serial line that could be attached to.
        NoConsole = "no_console",
        /// The guest has no power button.
        NoPowerButton = "no_power_button",
        /// The VM's cgroup made no room.
        Cgroup = "cgroup",
    }

    /// The outcome of a guest command; the worst of the vCPUs' outcomes.
    GuestOutcome {
        /// As asked.
        Ok = "ok",
        /// The guest held less than it was to free, and freed all of it.
        FellShort = "fell_short",
        /// The guest ran out of memory on the way.
        OutOfMemory = "out_of_memory",
        /// The host refused to back a frame with memory.
        InstallFailed = "install_failed",
        /// A page held something other than its stamp.
        Corrupt = "corrupt",
        /// The guest does not know the command, or sent a malformed answer.
        Unknown = "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_of_a_newer_vm_is_read_shown_and_passed_on() {
        let word: Word<VcpuState> = serde_json::from_str("\"migrating\"").expect("lenient");
        assert_eq!((word.known(), word.to_string().as_str()), (None, "migrating"));
        assert_eq!(serde_json::to_string(&word).expect("a string"), "\"migrating\"");
        let word: Word<VcpuState> = serde_json::from_str("\"waiting\"").expect("known");
        assert_eq!(word, VcpuState::Waiting);
        assert_eq!(serde_json::to_string(&word).expect("a string"), "\"waiting\"");
        serde_json::from_str::<Word<VcpuState>>("7").expect_err("no word");
    }
}
