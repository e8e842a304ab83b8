//! What is compared: ways to make a guest's memory smaller and larger, and ways to give it memory.
//!
//! Each is a name and the launch configuration that it stands for. Adding one is a line in a list
//! here, and every figure has it.

use llfree_base::units::Bytes;
use llfree_monitor::install_config::InstallPool;
use llfree_monitor::memory::{Backing, UseUserfaultfd};
use vmm::elastic::Elastic;
use vmm::vm::VmConfig;

/// A launch configuration with a name.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) name: &'static str,
    pub(crate) moves: Moves,
    configure: fn(&mut VmConfig),
}

/// The unit that a candidate moves at a time. It determines how long a figure takes: page by page a frame
/// costs milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Moves {
    /// 2 MiB frames.
    Frames,
    /// 4 KiB pages.
    Pages,
}

/// Ways to take memory and to give it back. The balloons discard one page a call, as QEMU
/// does; their `-joined` kin join neighbours first, as Firecracker does.
pub(crate) const ELASTIC: &[Candidate] = &[
    Candidate { name: "llfree", moves: Moves::Frames, configure: |_| {} },
    Candidate {
        name: "balloon",
        moves: Moves::Pages,
        configure: |config| config.elastic = device("balloon,coalesce=off"),
    },
    Candidate {
        name: "balloon-joined",
        moves: Moves::Pages,
        configure: |config| config.elastic = device("balloon,coalesce=on"),
    },
    Candidate {
        name: "balloon-huge",
        moves: Moves::Frames,
        configure: |config| config.elastic = device("balloon-huge,coalesce=off"),
    },
    Candidate {
        name: "balloon-huge-joined",
        moves: Moves::Frames,
        configure: |config| config.elastic = device("balloon-huge,coalesce=on"),
    },
    Candidate {
        name: "virtio-mem",
        moves: Moves::Frames,
        configure: |config| config.elastic = device("virtio-mem,boot=32M"),
    },
];

/// The ones that others publish figures of: the default comparison.
pub(crate) const PUBLISHED: &str = "llfree,balloon,balloon-huge,virtio-mem";

/// Ways to back a requested frame with memory.
pub(crate) const INSTALL: &[Candidate] = &[
    Candidate {
        name: "populate",
        moves: Moves::Frames,
        configure: |config| {
            config.install.userfaultfd = UseUserfaultfd::Off;
            config.install.pool = Some(InstallPool::NONE);
        },
    },
    Candidate {
        name: "no-pool",
        moves: Moves::Frames,
        configure: |config| config.install.pool = Some(InstallPool::NONE),
    },
    Candidate { name: "pool", moves: Moves::Frames, configure: |config| config.install.pool = Some(pool(64 << 20)) },
    Candidate {
        name: "pool-512M",
        moves: Moves::Frames,
        configure: |config| config.install.pool = Some(pool(512 << 20)),
    },
];

const fn pool(bytes: u64) -> InstallPool {
    InstallPool { size: Bytes(bytes), ..InstallPool::NONE }
}

/// A device as the command line writes it.
fn device(spec: &str) -> Elastic {
    // A test tries all that are written above.
    spec.parse().unwrap_or_else(|_| unreachable!("{spec}"))
}

impl Candidate {
    /// The VM to launch.
    pub(crate) fn config(&self, mem: Bytes, cpus: u32, backing: Backing) -> VmConfig {
        let mut config = VmConfig::new(mem, cpus, backing);
        (self.configure)(&mut config);
        if let Some(pool) = config.install.pool {
            // No launch takes a pool that is larger than the guest.
            config.install.pool = Some(pool.at_most(mem));
        }
        config
    }
}

/// The candidate of that name, for the command line.
pub(crate) fn elastic(name: &str) -> Result<&'static Candidate, String> {
    find(ELASTIC, name)
}

/// Likewise.
pub(crate) fn install(name: &str) -> Result<&'static Candidate, String> {
    find(INSTALL, name)
}

fn find(list: &'static [Candidate], name: &str) -> Result<&'static Candidate, String> {
    let names = || list.iter().map(|candidate| candidate.name).collect::<Vec<_>>().join(", ");
    list.iter().find(|candidate| candidate.name == name).ok_or_else(|| format!("there is {}", names()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_candidate_is_found_by_its_name_and_fits_a_small_guest() {
        for (list, find) in [(ELASTIC, elastic as fn(&str) -> _), (INSTALL, install)] {
            for candidate in list {
                assert_eq!(find(candidate.name).map(|found| found.name), Ok(candidate.name));
                let config = candidate.config(Bytes(32 << 20), 1, Backing::Anon);
                assert!(config.install.resolve(config.memory, config.backing, true).is_ok(), "{}", candidate.name);
            }
            assert!(find("fly").expect_err("no such thing").contains(list[0].name));
        }
    }
}
