//! [`Pressure`]: whether the host is short of memory, as the kernel sees it.
//!
//! Asks the kernel to say so where it can (a trigger on the pressure file of our own cgroup, or of
//! the machine), else looks at `MemAvailable`. Reads and configures its own descriptor, nothing else.

use rustix::event::{PollFd, PollFlags, Timespec};
use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Some task waited for memory for 150 ms within two seconds. Two seconds is the window that the
/// kernel gives to those without privileges.
const TRIGGER: &[u8] = b"some 150000 2000000\0";
/// Between two looks at `MemAvailable`, which takes microseconds.
const LOOK: Duration = Duration::from_millis(200);
/// Memory that must be available: a part of all there is.
const PART: u64 = 50;

/// Where it is read.
enum Source {
    /// A file that becomes urgent when the trigger is met.
    Trigger(File),
    /// Without one: bytes that must be available.
    Available(u64),
}

impl Source {
    fn available() -> Self {
        let least = meminfo("MemTotal").unwrap_or(0) / PART;
        log::debug!("the install pool is given back below {least} bytes of available memory");
        Self::Available(least)
    }
}

/// How the host's memory is.
pub(crate) struct Pressure {
    source: Source,
    high: Cell<bool>,
    looked: Cell<Option<Instant>>,
}

impl Pressure {
    /// The best source that this process may use.
    pub(crate) fn watch() -> Self {
        let places = cgroup_file().into_iter().chain([PathBuf::from("/proc/pressure/memory")]);
        for place in places {
            match arm(&place) {
                Ok(file) => return Self::new(Source::Trigger(file)),
                Err(error) => log::debug!("no memory pressure from {}: {error}", place.display()),
            }
        }
        Self::new(Source::available())
    }

    /// High while less than `bytes` are available.
    #[cfg(test)]
    pub(crate) fn below(bytes: u64) -> Self {
        Self::new(Source::Available(bytes))
    }

    /// High for the first question alone.
    #[cfg(test)]
    pub(crate) fn once() -> Self {
        Self { high: Cell::new(true), looked: Cell::new(Some(Instant::now())), source: Source::Available(0) }
    }

    fn new(source: Source) -> Self {
        Self { source, high: Cell::new(false), looked: Cell::new(None) }
    }

    /// What to poll for urgent data, if the kernel says it by itself.
    pub(super) fn trigger(&self) -> Option<&File> {
        match &self.source {
            Source::Trigger(file) => Some(file),
            Source::Available(_) => None,
        }
    }

    /// What a poll of it gave.
    pub(super) fn note(&mut self, events: PollFlags) {
        if events.contains(PollFlags::ERR) {
            // Its cgroup is gone, and would say so for ever.
            self.source = Source::available();
        } else if events.contains(PollFlags::PRI) {
            self.high.set(true);
        }
    }

    /// Whether it was high since the last question.
    pub(crate) fn is_high(&mut self) -> bool {
        self.is_high_now();
        self.high.take()
    }

    /// Whether it is known to be high; the question stays open.
    pub(super) fn is_high_now(&mut self) -> bool {
        match &self.source {
            // Who fills a large pool sleeps for long nowhere else.
            Source::Trigger(file) => {
                let mut fds = [PollFd::new(file, PollFlags::PRI)];
                let events = rustix::event::poll(&mut fds, Some(&Timespec::default())).map(|_| fds[0].revents());
                self.note(events.unwrap_or(PollFlags::empty()));
            }
            Source::Available(least) => {
                if self.looked.get().is_none_or(|looked| looked.elapsed() >= LOOK) {
                    self.looked.set(Some(Instant::now()));
                    self.high.set(meminfo("MemAvailable").is_some_and(|available| available < *least));
                }
            }
        }
        self.high.get()
    }
}

fn arm(place: &PathBuf) -> io::Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).open(place)?;
    file.write_all(TRIGGER)?;
    Ok(file)
}

/// The pressure file of the cgroup that this process is in, where that is not the root.
fn cgroup_file() -> Option<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    (!path.is_empty()).then(|| ["/sys/fs/cgroup", path, "memory.pressure"].iter().collect())
}

fn meminfo(field: &str) -> Option<u64> {
    llfree_base::kernel_stats::meminfo_bytes(field).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendFlags, send};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use test_support::skipped;

    #[test]
    fn the_kernel_is_asked_to_say_so_where_it_can() {
        let pressure = Pressure::watch();
        if !PathBuf::from("/proc/pressure/memory").exists() {
            assert!(pressure.trigger().is_none(), "then memory that is available has to do");
            return skipped("the kernel tells no memory pressure");
        }
        if let Err(error) = arm(&PathBuf::from("/proc/pressure/memory")) {
            return skipped(format_args!("no trigger can be set: {error}"));
        }
        assert!(pressure.trigger().is_some());
    }

    #[test]
    fn a_trigger_is_seen_by_who_never_sleeps() {
        // Urgent data of a connection looks like a trigger that is met.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let kernel = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        let (ours, _) = listener.accept().expect("it came");
        let mut pressure = Pressure::new(Source::Trigger(File::from(OwnedFd::from(ours))));
        assert!(!pressure.is_high_now() && !pressure.is_high());
        send(&kernel, b"!", SendFlags::OOB).expect("connected");
        while !pressure.is_high_now() {
            std::thread::yield_now();
        }
        assert!(pressure.is_high(), "it stays until somebody asks for it");
    }
}
