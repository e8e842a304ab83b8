//! [`Publisher`]: one thread that answers scrapers and writes the file.
//!
//! It waits for all of them at once and for none in particular: sockets never block, and each scraper has a deadline
//! for its request and one for taking the answer. There is a bound on how many there are, on what is kept of each, and
//! on the part of a core that scrapes may cost: those that come together, or soon after each other, get the same text.

use crate::address::Listener;
use crate::file::MetricsFile;
use crate::http::{self, Asked, Refusal, What};
use crate::text::{Families, Format};
use llfree_base::{RateLimit, error_line};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The bounds on scrapers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// How many there are at once; one more takes the place of the one that has been there for longest.
    pub scrapers: usize,
    /// The most bytes in the head of a request.
    pub head: usize,
    /// The time that a scraper has to ask.
    pub to_ask: Duration,
    /// The time that it has to take the answer.
    pub to_take: Duration,
    /// What was collected serves until this many times as long has passed as it took to collect ...
    pub pause_per_collection: u32,
    /// ... and no longer than this.
    pub longest_pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            scrapers: 128,
            head: 8 << 10,
            to_ask: Duration::from_secs(5),
            to_take: Duration::from_secs(10),
            pause_per_collection: 9,
            longest_pause: Duration::from_secs(1),
        }
    }
}

/// How long a listener rests that the kernel has no descriptors for.
const REST: Duration = Duration::from_millis(200);

/// What answers scrapers and writes the file, each if it is wanted.
#[derive(Debug, Default)]
pub struct Publisher {
    /// Where scrapers come to.
    pub listener: Option<Listener>,
    /// The file, and how often it is written.
    pub file: Option<(MetricsFile, Duration)>,
    /// The bounds.
    pub limits: Limits,
}

impl Publisher {
    /// Publishes what `collect` gives until `stop` is readable, or nothing is given any more.
    pub fn run(&self, stop: BorrowedFd<'_>, collect: impl FnMut() -> Option<Families>) {
        let mut work = Work {
            limits: self.limits,
            scrapers: Vec::new(),
            collected: Collected { limits: self.limits, collect, answers: Default::default(), serves_until: None },
            rests_until: None,
            troubles: RateLimit::default(),
        };
        let mut next_file = self.file.as_ref().map(|_| Instant::now());
        loop {
            if let (Some((file, interval)), Some(at)) = (&self.file, next_file)
                && at <= Instant::now()
            {
                let Some(families) = (work.collected.collect)() else { return };
                if let Err(error) = file.write(&families.to_text(Format::Prometheus)) {
                    work.trouble(&error);
                }
                next_file = Some(Instant::now() + *interval);
            }
            if work.step(stop, self.listener.as_ref(), next_file).is_none() {
                return;
            }
        }
    }
}

/// A connection.
struct Scraper {
    stream: OwnedFd,
    deadline: Instant,
    at: At,
}

enum At {
    /// It asks.
    Asking(Vec<u8>),
    /// It asked.
    Waiting(Asked),
    /// It takes the answer: from here on.
    Taking(Arc<[u8]>, usize),
}

struct Work<C> {
    limits: Limits,
    /// In the order in which they came.
    scrapers: Vec<Scraper>,
    collected: Collected<C>,
    rests_until: Option<Instant>,
    troubles: RateLimit,
}

impl<C: FnMut() -> Option<Families>> Work<C> {
    /// Waits for something, and does what it makes possible. `None` at the end.
    fn step(&mut self, stop: BorrowedFd<'_>, listener: Option<&Listener>, until: Option<Instant>) -> Option<()> {
        let listener = listener.filter(|_| self.rests_until.is_none_or(|until| until <= Instant::now()));
        let until = self.scrapers.iter().map(|scraper| scraper.deadline).chain(until).chain(self.rests_until).min();
        let (is_over, has_new) = self.wait(stop, listener, until);
        if is_over {
            return None;
        }
        if let Some(listener) = listener.filter(|_| has_new) {
            self.accept(listener);
        }
        let now = Instant::now();
        self.scrapers.retain_mut(|scraper| scraper.deadline > now && scraper.listen(&self.limits));
        if self.scrapers.iter().any(|scraper| matches!(scraper.at, At::Waiting(_))) {
            self.answer()?;
        }
        self.scrapers.retain_mut(Scraper::send);
        Some(())
    }

    /// Waits: whether this is the end, and whether somebody wants to be accepted.
    fn wait(&mut self, stop: BorrowedFd<'_>, listener: Option<&Listener>, until: Option<Instant>) -> (bool, bool) {
        let mut polls = vec![PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        polls.extend(listener.map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)));
        polls.extend(self.scrapers.iter().map(|scraper| {
            let wants = if matches!(scraper.at, At::Taking(..)) { PollFlags::OUT } else { PollFlags::IN };
            PollFd::new(&scraper.stream, wants)
        }));
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        // A time that the kernel cannot have is longer than anybody waits.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polls, left.as_ref()) {
            Ok(_) => {
                let is_ready = |place: usize| polls.get(place).is_some_and(|poll| !poll.revents().is_empty());
                (is_ready(0), listener.is_some() && is_ready(1))
            }
            Err(Errno::INTR) => (false, false),
            Err(error) => {
                self.trouble(&std::io::Error::from(error));
                std::thread::sleep(REST);
                (false, false)
            }
        }
    }

    fn accept(&mut self, listener: &Listener) {
        self.rests_until = None;
        for _ in 0..self.limits.scrapers {
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(stream) => {
                    if self.scrapers.len() >= self.limits.scrapers {
                        // The slowest of all.
                        self.scrapers.remove(0);
                    }
                    let deadline = Instant::now() + self.limits.to_ask;
                    self.scrapers.push(Scraper { stream, deadline, at: At::Asking(Vec::new()) });
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    self.trouble(&std::io::Error::from(error));
                    self.rests_until = Some(Instant::now() + REST);
                    return;
                }
            }
        }
    }

    /// Gives those that asked their answers. `None` if there are none any more.
    fn answer(&mut self) -> Option<()> {
        for scraper in &mut self.scrapers {
            let At::Waiting(Asked { what, head_only }) = scraper.at else { continue };
            let bytes = match what {
                What::Metrics(format) => self.collected.answer(format, head_only)?,
                what => http::answer(what, &http::body(what), head_only).into(),
            };
            scraper.deadline = Instant::now() + self.limits.to_take;
            scraper.at = At::Taking(bytes, 0);
        }
        Some(())
    }

    fn trouble(&self, error: &dyn std::error::Error) {
        if let Some(number) = self.troubles.tick() {
            log::warn!("metrics ({number} so far): {}", error_line(error));
        }
    }
}

impl Scraper {
    /// Reads what it asks. False if it is gone.
    fn listen(&mut self, limits: &Limits) -> bool {
        let At::Asking(head) = &mut self.at else { return true };
        let mut chunk = [0; 2048];
        loop {
            match rustix::io::read(&self.stream, &mut chunk) {
                Ok(0) => return false,
                Ok(count) => head.extend_from_slice(&chunk[..count]),
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => continue,
                Err(_) => return false,
            }
            let asked = match http::end_of_head(head) {
                Some(end) if end <= limits.head => http::asked(&head[..end]),
                _ if head.len() > limits.head => Asked { what: What::Refusal(Refusal::TooLarge), head_only: false },
                _ => continue,
            };
            self.at = At::Waiting(asked);
            return true;
        }
    }

    /// Sends what there is room for. False if it has everything, or is gone.
    fn send(&mut self) -> bool {
        let At::Taking(bytes, sent) = &mut self.at else { return true };
        while let Some(rest) = bytes.get(*sent..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&self.stream, rest) {
                Ok(count) => *sent += count,
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        false
    }
}

/// What was collected last.
struct Collected<C> {
    limits: Limits,
    collect: C,
    /// The whole answer in each format, shared by all who take it.
    answers: [Option<Arc<[u8]>>; 2],
    /// It serves until then.
    serves_until: Option<Instant>,
}

impl<C: FnMut() -> Option<Families>> Collected<C> {
    /// The answer in a format; `None` if there is nothing to tell of any more.
    fn answer(&mut self, format: Format, head_only: bool) -> Option<Arc<[u8]>> {
        if self.serves_until.is_none_or(|until| until <= Instant::now()) {
            let start = Instant::now();
            let families = (self.collect)()?;
            self.answers = Format::ALL
                .map(|format| Some(http::answer(What::Metrics(format), &families.to_text(format), false).into()));
            let pause = start.elapsed().saturating_mul(self.limits.pause_per_collection);
            self.serves_until = Some(Instant::now() + pause.min(self.limits.longest_pause));
        }
        let place = Format::ALL.iter().position(|other| *other == format)?;
        let whole = self.answers[place].clone()?;
        if !head_only {
            return Some(whole);
        }
        let end = http::end_of_head(&whole)?;
        Some(whole[..end].into())
    }
}

#[cfg(test)]
#[path = "publisher_tests.rs"]
mod tests;
