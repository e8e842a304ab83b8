//! [`Book`]: who has how much registered, against a [`Quota`]. Counts only.

use llfree_base::lock;
use shared_layout::HUGE_SIZE;
use std::sync::{Arc, Mutex};

/// How much may be registered. Each area costs the keeper some threads and descriptors and a byte for each 2 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota {
    /// Areas in all, those included that are about to be registered.
    pub areas: usize,
    /// Of one process; those whose number is not known here count as one.
    pub areas_a_process: usize,
    /// Bytes of address space in all.
    pub bytes: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Self { areas: 64, areas_a_process: 8, bytes: 16 << 40 }
    }
}

/// Why there is no room for one more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Full {
    #[error("there are {0} areas already, and no more may be registered")]
    Areas(usize),
    #[error("this process has {0} areas registered already, and no more are allowed")]
    Process(usize),
    #[error("no more than {0} bytes may be registered in all")]
    Bytes(u64),
    #[error("this area is registered already")]
    Twice,
}

/// What tells a file from others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Identity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

#[derive(Clone, Copy)]
struct Line {
    number: u64,
    /// `None` for all whose number is not known here.
    pid: Option<u32>,
    bytes: u64,
    table: Option<Identity>,
}

#[derive(Default)]
struct Lines {
    lines: Vec<Line>,
    next: u64,
}

/// All places that are taken.
#[derive(Clone)]
pub(crate) struct Book {
    quota: Quota,
    lines: Arc<Mutex<Lines>>,
}

/// A place in the book, until it is dropped.
pub(crate) struct Place {
    book: Book,
    number: u64,
}

impl Book {
    pub(crate) fn new(quota: Quota) -> Self {
        Self { quota, lines: Arc::default() }
    }

    /// A place for a process, which has not said yet what for.
    pub(crate) fn place(&self, pid: Option<u32>) -> Result<Place, Full> {
        let mut book = lock(&self.lines);
        if book.lines.len() >= self.quota.areas {
            return Err(Full::Areas(book.lines.len()));
        }
        let of_process = book.lines.iter().filter(|line| line.pid == pid).count();
        if of_process >= self.quota.areas_a_process {
            return Err(Full::Process(of_process));
        }
        let number = book.next;
        book.next += 1;
        book.lines.push(Line { number, pid, bytes: 0, table: None });
        Ok(Place { book: self.clone(), number })
    }

    /// Places that are taken.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.lines).lines.len()
    }
}

impl Place {
    /// Says what it is for.
    pub(crate) fn fill(&self, huge_frames: u32, table: Identity) -> Result<(), Full> {
        let mut book = lock(&self.book.lines);
        if book.lines.iter().any(|line| line.table == Some(table)) {
            return Err(Full::Twice);
        }
        let bytes = u64::from(huge_frames) * HUGE_SIZE;
        let sum = book.lines.iter().fold(bytes, |sum, line| sum.saturating_add(line.bytes));
        if sum > self.book.quota.bytes {
            return Err(Full::Bytes(self.book.quota.bytes));
        }
        if let Some(line) = book.lines.iter_mut().find(|line| line.number == self.number) {
            *line = Line { bytes, table: Some(table), ..*line };
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.book.lines).lines.retain(|line| line.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(inode: u64) -> Identity {
        Identity { device: 1, inode }
    }

    #[test]
    fn places_are_bounded_in_every_way_and_come_back() {
        let book = Book::new(Quota { areas: 3, areas_a_process: 2, bytes: 4 * HUGE_SIZE });
        let first = book.place(Some(7)).expect("room");
        let second = book.place(Some(7)).expect("room");
        assert_eq!(book.place(Some(7)).err(), Some(Full::Process(2)));
        let third = book.place(Some(8)).expect("room");
        assert_eq!(book.place(None).err(), Some(Full::Areas(3)));
        first.fill(3, table(1)).expect("room");
        assert_eq!(second.fill(1, table(1)), Err(Full::Twice));
        assert_eq!(second.fill(2, table(2)), Err(Full::Bytes(4 * HUGE_SIZE)));
        second.fill(1, table(2)).expect("just as much");
        drop(first);
        third.fill(3, table(1)).expect("it is gone");
        assert_eq!(book.len(), 2);
    }
}
