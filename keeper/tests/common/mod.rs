//! What tests of a keeper share: a keeper in a scratch directory, areas with contents, and other processes.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use llfree_area::{Area, Block, Handle, MemoryKind};
use llfree_control::client::Client;
use llfree_control::protocol::{Reply, Request};
use llfree_control::report::StatusReport;
use llfree_keeper::{Keeper, Options, Quota};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;
/// Nothing here takes longer, however busy the machine is.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A scratch directory for a keeper.
pub(crate) struct Place {
    dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("keeper").tempdir_in("/tmp").expect("a scratch directory") }
    }

    pub(crate) fn at(dir: &Path) -> Options {
        Options { socket: dir.join("areas"), control: dir.to_owned(), quota: Quota::default() }
    }

    pub(crate) fn options(&self) -> Options {
        Self::at(self.dir.path())
    }

    pub(crate) fn start(&self) -> Keeper {
        Keeper::start(self.options()).expect("a free place")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("areas")
    }

    /// Whether somebody listens there, as the kernel says. The file alone is there a moment earlier.
    pub(crate) fn listens(&self) -> bool {
        /// `SO_ACCEPTCON`, in the column of flags.
        const ACCEPTS: &str = " 00010000 ";
        let (sockets, path) = (std::fs::read_to_string("/proc/net/unix").expect("/proc is mounted"), self.socket());
        sockets.lines().any(|line| line.contains(ACCEPTS) && line.ends_with(&*path.to_string_lossy()))
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn client(&self, name: &str) -> Client {
        Client::connect(&self.dir.path().join(format!("{name}.sock"))).expect("it is registered")
    }

    pub(crate) fn call(&self, name: &str, request: &Request) -> Reply {
        self.client(name).call(request).expect("an answer")
    }

    pub(crate) fn status(&self, name: &str) -> StatusReport {
        match self.call(name, &Request::Status) {
            Reply::Status(report) => *report,
            other => panic!("{other:?}"),
        }
    }

    /// The same of an area that may not be registered at the moment.
    pub(crate) fn status_or_none(&self, name: &str) -> Option<StatusReport> {
        let mut client = Client::connect(&self.dir.path().join(format!("{name}.sock"))).ok()?;
        match client.call(&Request::Status) {
            Ok(Reply::Status(report)) => Some(*report),
            _ => None,
        }
    }

    /// The files in it, sorted.
    pub(crate) fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).expect("it is there");
        let mut names: Vec<_> =
            names.map(|entry| entry.expect("a name").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// An area in a memory file.
pub(crate) fn area(mib: u64) -> Area {
    Area::builder().size(mib * MIB).memory(MemoryKind::MemoryFile).build().expect("a memory file")
}

/// Writes a number into each page of a block.
pub(crate) fn dirty(block: &Block, number: u64) {
    for offset in (0..block.bytes()).step_by(4096) {
        // SAFETY: inside the block, which is the caller's.
        unsafe { block.as_ptr().add(offset).cast::<u64>().write_volatile(number + offset as u64) };
    }
}

/// Whether they are all there.
pub(crate) fn is_dirty(block: &Block, number: u64) -> bool {
    // SAFETY: as above.
    let word = |offset| unsafe { block.as_ptr().add(offset).cast::<u64>().read_volatile() };
    (0..block.bytes()).step_by(4096).all(|offset| word(offset) == number + offset as u64)
}

/// Says that it is over when a test's body ends, however it ends: a scope waits for its threads.
pub(crate) struct Over<'a>(pub(crate) &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits for something that another thread or process does.
#[track_caller]
pub(crate) fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: never");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process that plays a part, which is a test of this binary that does nothing otherwise.
pub(crate) struct Player(pub(crate) Child);

impl Player {
    pub(crate) fn start(part: &str, dir: &Path, name: &str) -> Self {
        Self::start_with(part, dir, name, &[])
    }

    /// The same with more in its environment.
    pub(crate) fn start_with(part: &str, dir: &Path, name: &str, more: &[(&str, &str)]) -> Self {
        let program = std::env::current_exe().expect("this test");
        let command = Command::new(program)
            .args(["--exact", part, "--nocapture", "--test-threads=1"])
            .env("KEEPER_DIR", dir)
            .env("KEEPER_NAME", name)
            .envs(more.iter().copied())
            .stdout(Stdio::null())
            .stderr(if std::env::var_os("KEEPER_SHOW").is_some() { Stdio::inherit() } else { Stdio::null() })
            .spawn();
        Self(command.expect("a process"))
    }

    pub(crate) fn kill(&mut self) {
        self.0.kill().expect("ours");
        self.0.wait().expect("ours");
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The part of this process, if it plays one.
pub(crate) fn part() -> Option<(PathBuf, String)> {
    Some((std::env::var_os("KEEPER_DIR")?.into(), std::env::var("KEEPER_NAME").ok()?))
}

/// Allocates, writes, checks and frees for ever; panics on a byte that is not what was written.
pub(crate) fn churn(handle: &mut Handle, seed: u64, go_on: impl Fn() -> bool) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut held: Vec<(Block, u64)> = Vec::new();
    while go_on() {
        if held.len() < 6
            && let Ok(block) = handle.alloc_run(random.u32(1..4))
        {
            let number = random.u64(..1 << 60);
            dirty(&block, number);
            held.push((block, number));
        } else if !held.is_empty() {
            let (block, number) = held.swap_remove(random.usize(..held.len()));
            assert!(is_dirty(&block, number), "somebody else wrote to it, or took its memory");
            handle.free(block).expect("ours");
        }
    }
    for (block, number) in held {
        assert!(is_dirty(&block, number));
        handle.free(block).expect("ours");
    }
}
