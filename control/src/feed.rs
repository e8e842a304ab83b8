//! [`Feed`]: records for any number of readers, none of whom can hold up the writer.
//!
//! A feed is a ring of a fixed size. Its writer appends and goes on; each reader has a place in it, and one
//! that is so slow that the ring went past its place loses records and is told how many. So a feed costs
//! the same memory for no reader and for many. The control server sends feeds to clients: a VM's log, its
//! events, its console.

use llfree_base::lock;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};

/// What stands where a reader lost something: given the records and their bytes.
pub type Gap = fn(records: u64, bytes: u64) -> Vec<u8>;

/// Called once when there is something to read again.
pub(super) type Wake = Arc<dyn Fn() + Send + Sync>;

/// A ring of records.
pub struct Feed {
    /// The most bytes that are kept.
    capacity: usize,
    gap: Gap,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    records: VecDeque<Vec<u8>>,
    /// Bytes of these records.
    bytes: usize,
    /// Records, and their bytes, that were dropped from the front since the beginning.
    dropped: Place,
    /// Nothing more will come.
    closed: bool,
    /// Whom to wake at the next record.
    waiting: Option<Wake>,
}

/// A number of records from the beginning, and of their bytes.
#[derive(Clone, Copy, Default, Debug)]
struct Place {
    records: u64,
    bytes: u64,
}

impl Place {
    fn pass(&mut self, record: &[u8]) {
        self.records += 1;
        self.bytes += record.len() as u64;
    }
}

impl Feed {
    /// A feed that keeps the newest `capacity` bytes.
    #[must_use]
    pub const fn new(capacity: usize, gap: Gap) -> Self {
        let dropped = Place { records: 0, bytes: 0 };
        let state = State { records: VecDeque::new(), bytes: 0, dropped, closed: false, waiting: None };
        Self { capacity, gap, state: Mutex::new(state) }
    }

    /// Appends a record. Never waits for a reader; a record that is larger than the feed is lost to all.
    pub fn push(&self, record: &[u8]) {
        let mut state = lock(&self.state);
        if state.closed {
            return;
        }
        state.bytes += record.len();
        state.records.push_back(record.to_vec());
        while state.bytes > self.capacity {
            let Some(oldest) = state.records.pop_front() else { break };
            state.bytes -= oldest.len();
            state.dropped.pass(&oldest);
        }
        let waiting = state.waiting.take();
        drop(state);
        if let Some(wake) = waiting {
            wake();
        }
    }

    /// All that is kept, as it is now.
    #[must_use]
    pub fn kept(&self) -> Vec<u8> {
        lock(&self.state).records.iter().flatten().copied().collect()
    }

    /// Nothing more will come: readers are told so once they have read the rest.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        let waiting = state.waiting.take();
        drop(state);
        if let Some(wake) = waiting {
            wake();
        }
    }
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

/// Takes what a reader sends back, and says how much of it; it is asked again for the rest.
pub type Sink = Box<dyn FnMut(&[u8]) -> usize + Send>;

/// A reader's place in a feed.
pub struct Subscription {
    feed: Arc<Feed>,
    place: Place,
    /// Ends here, instead of waiting for more.
    until: Option<u64>,
    /// Takes what the reader sends; without one that is ignored.
    sink: Option<Sink>,
}

/// What a reader finds.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// Bytes to send.
    Bytes(Vec<u8>),
    /// Nothing now.
    Wait,
    /// Nothing any more.
    End,
}

impl Subscription {
    /// Begins with the oldest record that is kept and goes on with what comes.
    #[must_use]
    pub fn to(feed: Arc<Feed>) -> Self {
        let place = lock(&feed.state).dropped;
        Self { feed, place, until: None, sink: None }
    }

    /// Begins with the last `records` of those that are kept.
    #[must_use]
    pub fn last(mut self, records: u64) -> Self {
        let state = lock(&self.feed.state);
        let skip = (state.records.len() as u64).saturating_sub(records);
        let mut place = state.dropped;
        state.records.iter().take(usize::try_from(skip).unwrap_or(usize::MAX)).for_each(|record| place.pass(record));
        drop(state);
        self.place = place;
        self
    }

    /// Ends after what is there now.
    #[must_use]
    pub fn so_far(mut self) -> Self {
        let state = lock(&self.feed.state);
        let end = state.dropped.records + state.records.len() as u64;
        drop(state);
        self.until = Some(end);
        self
    }

    /// Gives what the reader sends to `sink`.
    #[must_use]
    pub fn with_sink(mut self, sink: Sink) -> Self {
        self.sink = Some(sink);
        self
    }

    /// Takes what the reader sent; returns how much of it. Without a sink nobody wants it.
    pub(super) fn take_input(&mut self, bytes: &[u8]) -> usize {
        self.sink.as_mut().map_or(bytes.len(), |sink| sink(bytes))
    }

    /// Some next records, of about `most` bytes. If there is nothing, `wake` is called when there is.
    pub(super) fn next(&mut self, most: usize, wake: &Wake) -> Next {
        let mut state = lock(&self.feed.state);
        let mut bytes = Vec::new();
        let lost = state.dropped.records.saturating_sub(self.place.records);
        if lost > 0 {
            bytes = (self.feed.gap)(lost, state.dropped.bytes.saturating_sub(self.place.bytes));
            self.place = state.dropped;
        }
        let at = usize::try_from(self.place.records - state.dropped.records).unwrap_or(usize::MAX);
        for record in state.records.iter().skip(at) {
            if bytes.len() >= most || self.until.is_some_and(|until| self.place.records >= until) {
                break;
            }
            bytes.extend_from_slice(record);
            self.place.pass(record);
        }
        if !bytes.is_empty() {
            return Next::Bytes(bytes);
        }
        if state.closed || self.until.is_some_and(|until| self.place.records >= until) {
            return Next::End;
        }
        state.waiting = Some(wake.clone());
        Next::Wait
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("place", &self.place).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn gap(records: u64, bytes: u64) -> Vec<u8> {
        format!("[{records}/{bytes}]").into_bytes()
    }

    fn wake() -> (Arc<AtomicU32>, Wake) {
        let woken = Arc::new(AtomicU32::new(0));
        let count = woken.clone();
        (
            woken,
            Arc::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        )
    }

    #[track_caller]
    fn reads(reader: &mut Subscription, text: &str) {
        let Next::Bytes(bytes) = reader.next(usize::MAX, &wake().1) else { panic!("nothing to read") };
        assert_eq!(String::from_utf8_lossy(&bytes), text);
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_and_is_told_how_many() {
        let feed = Arc::new(Feed::new(10, gap));
        let (mut quick, mut slow) = (Subscription::to(feed.clone()), Subscription::to(feed.clone()));
        for record in ["aaaa", "bbbb", "cccc", "dd"] {
            feed.push(record.as_bytes());
            reads(&mut quick, record);
        }
        reads(&mut slow, "[1/4]bbbbccccdd");
        feed.push(b"e");
        reads(&mut slow, "e");
        // A late reader lost nothing of what it could have had.
        reads(&mut Subscription::to(feed.clone()), "ccccdde");
        feed.push(&[b'x'; 11]);
        reads(&mut quick, "[2/12]");
    }

    #[test]
    fn the_writer_wakes_those_who_wait_once() {
        let feed = Arc::new(Feed::new(100, gap));
        let mut reader = Subscription::to(feed.clone());
        let (woken, wake) = wake();
        feed.push(b"before");
        assert_eq!(reader.next(9, &wake), Next::Bytes(b"before".to_vec()));
        assert_eq!(reader.next(9, &wake), Next::Wait);
        assert_eq!(woken.load(Ordering::Relaxed), 0);
        feed.push(b"a");
        feed.push(b"b");
        assert_eq!(woken.load(Ordering::Relaxed), 1);
        assert_eq!(reader.next(1, &wake), Next::Bytes(b"a".to_vec()), "no more than asked");
        assert_eq!(reader.next(1, &wake), Next::Bytes(b"b".to_vec()));
        feed.close();
        assert_eq!(reader.next(1, &wake), Next::End);
        feed.push(b"after the end");
        assert_eq!(reader.next(1, &wake), Next::End);
    }

    #[test]
    fn a_reader_may_want_the_last_records_only_and_nothing_that_comes() {
        let feed = Arc::new(Feed::new(100, gap));
        ["a", "b", "c"].iter().for_each(|record| feed.push(record.as_bytes()));
        let mut last = Subscription::to(feed.clone()).last(2).so_far();
        let mut more = Subscription::to(feed.clone()).last(9);
        feed.push(b"d");
        reads(&mut last, "bc");
        assert_eq!(last.next(1, &wake().1), Next::End);
        reads(&mut more, "abcd");
    }
}
