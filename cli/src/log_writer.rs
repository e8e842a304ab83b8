//! The one way to stderr: whatever the process says to people goes through one bounded queue, which one
//! thread empties.
//!
//! Nobody reads a pipe that nobody wants to read, and a write to a full one takes for ever. So no thread
//! that a guest or a client waits for writes there: it leaves its line in the queue, and goes on. A line
//! that finds no room is dropped and counted; where it would have stood, the log says how many those were.
//! Until the [thread](LogWriter::start) runs, when nobody waits for this process yet, a line is written at
//! once.

use crate::roles;
use llfree_base::lock;
use llfree_base::thread::Spawner;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most bytes that wait to be written: some thousand lines.
const MOST_BYTES: usize = 256 << 10;
/// How long the end of the process may wait for the last lines to be read.
pub const LAST_LINES: Duration = Duration::from_millis(300);

/// What goes to stderr.
pub static LOG: LogWriter = LogWriter::new(libc::STDERR_FILENO);

/// A queue of lines for one descriptor, and its thread.
pub struct LogWriter {
    to: RawFd,
    queue: Mutex<Queue>,
    changed: Condvar,
}

struct Queue {
    lines: VecDeque<Vec<u8>>,
    /// Bytes of these lines.
    bytes: usize,
    /// Lines that found no room after the last of these.
    dropped: u64,
    /// A thread empties the queue.
    served: bool,
    /// It is at it.
    writing: bool,
    /// The end of the process has waited for a reader, in vain.
    unread: bool,
}

impl LogWriter {
    /// For a descriptor that stays open.
    const fn new(to: RawFd) -> Self {
        let queue =
            Queue { lines: VecDeque::new(), bytes: 0, dropped: 0, served: false, writing: false, unread: false };
        Self { to, queue: Mutex::new(queue), changed: Condvar::new() }
    }

    /// Starts the thread; from here on nobody else writes. A second call changes nothing.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn start(&'static self, threads: &Spawner) -> io::Result<()> {
        // Held meanwhile, so that a line either was written before or waits for the thread.
        let mut queue = self.lock();
        if !queue.served {
            threads.spawn("log", roles::LOG, || self.serve())?;
            queue.served = true;
        }
        Ok(())
    }

    /// Writes whole lines, soon; drops them if too many wait already.
    pub fn print(&self, lines: &[u8]) {
        self.push(lines, MOST_BYTES);
    }

    /// Writes the last words of the process: there is room for them in any case, and the time that a
    /// reader needs, up to [`LAST_LINES`].
    pub fn print_last(&self, lines: &[u8]) {
        self.push(lines, usize::MAX);
        self.finish();
    }

    /// Waits until all is written, or for [`LAST_LINES`]; not once more after that was too short.
    pub fn finish(&self) {
        let deadline = Instant::now() + LAST_LINES;
        let mut queue = self.lock();
        while queue.served && !queue.unread && (queue.writing || !queue.lines.is_empty()) {
            let left = deadline.saturating_duration_since(Instant::now());
            queue.unread = left.is_zero();
            queue = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn push(&self, lines: &[u8], most: usize) {
        let mut queue = self.lock();
        if !queue.served {
            drop(queue);
            write_all(self.to, lines);
            return;
        }
        if queue.bytes.saturating_add(lines.len()) > most {
            queue.dropped += 1;
            return;
        }
        if let Some(notice) = queue.notice() {
            queue.lines.push_back(notice);
        }
        queue.bytes += lines.len();
        queue.lines.push_back(lines.to_vec());
        drop(queue);
        self.changed.notify_all();
    }

    /// The thread.
    fn serve(&self) {
        let mut queue = self.lock();
        loop {
            let next = queue.lines.pop_front().or_else(|| queue.notice());
            queue.writing = next.is_some();
            let Some(line) = next else {
                self.changed.notify_all();
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.bytes = queue.bytes.saturating_sub(line.len());
            drop(queue);
            write_all(self.to, &line);
            queue = self.lock();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }
}

impl Queue {
    /// What stands where lines were dropped.
    fn notice(&mut self) -> Option<Vec<u8>> {
        let dropped = std::mem::take(&mut self.dropped);
        (dropped > 0).then(|| {
            format!("llfree-vmm: {dropped} lines of the log are missing here: they came faster than they were read\n")
                .into_bytes()
        })
    }
}

/// For a logger, which hands over a whole line with each call.
impl io::Write for &'static LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.print(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes all of it, however long that takes. Nobody is left to tell if it fails.
fn write_all(to: RawFd, mut bytes: &[u8]) {
    // SAFETY: the descriptor stays open as long as the process lives, as `LogWriter::new` demands.
    let to = unsafe { BorrowedFd::borrow_raw(to) };
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            // Somebody who shares it has made it non-blocking.
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
                let _ = rustix::event::poll(&mut fds, None);
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, IntoRawFd};

    /// A log into a pipe, both of which live as long as the process.
    fn log() -> (io::PipeReader, &'static LogWriter) {
        let (reader, writer) = io::pipe().expect("a pipe");
        let log = Box::leak(Box::new(LogWriter::new(writer.into_raw_fd())));
        (reader, log)
    }

    #[test]
    fn a_log_that_nobody_reads_holds_nobody_up_and_says_what_is_missing() {
        let (mut reader, mut log) = log();
        log.start(&Spawner::default()).expect("a thread");
        let line = [&[b'x'; 99][..], b"\n"].concat();
        let lines = 20_000;
        let start = Instant::now();
        for _ in 0..lines {
            log.write_all(&line).expect("never fails");
        }
        log.print_last(b"the end\n");
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        let waiting = lock(&log.queue).bytes;
        assert!(waiting <= MOST_BYTES + 8, "{waiting} bytes wait");

        // Whoever reads at last finds all of it accounted for, and the end.
        let mut text = Vec::new();
        while !text.ends_with(b"the end\n") {
            let mut chunk = [0; 4096];
            let count = reader.read(&mut chunk).expect("a pipe");
            text.extend_from_slice(&chunk[..count]);
        }
        let text = String::from_utf8(text).expect("text");
        let came = text.lines().filter(|line| line.starts_with('x')).count();
        let number = |line: &str| line.strip_prefix("llfree-vmm: ")?.split(' ').next()?.parse::<usize>().ok();
        let missing: usize = text.lines().filter_map(number).sum();
        assert!(missing > 0);
        assert_eq!(came + missing, lines);
    }

    #[test]
    fn all_is_written_at_the_end_if_somebody_reads() {
        let (mut reader, log) = log();
        let read = std::thread::spawn(move || {
            let mut text = vec![0; 1000 * 8 + 4];
            reader.read_exact(&mut text).expect("all of it comes");
            text
        });
        log.print(b"before\n\n");
        log.start(&Spawner::default()).expect("a thread");
        log.start(&Spawner::default()).expect("no second one");
        for number in 1..1000 {
            log.print(format!("{number:07}\n").as_bytes());
        }
        log.print_last(b"end\n");
        let text = String::from_utf8(read.join().expect("no panic")).expect("text");
        assert!(text.starts_with("before\n\n0000001\n") && text.ends_with("0000999\nend\n"), "in order");
    }

    #[test]
    fn a_full_pipe_that_does_not_block_is_waited_for() {
        let (mut reader, writer) = io::pipe().expect("a pipe");
        rustix::io::ioctl_fionbio(&writer, true).expect("a pipe");
        let read = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            let mut text = Vec::new();
            reader.read_to_end(&mut text).map(|_| text.len())
        });
        write_all(writer.as_raw_fd(), &vec![b'x'; 300_000]);
        drop(writer);
        assert_eq!(read.join().expect("no panic").expect("a pipe"), 300_000);
    }
}
