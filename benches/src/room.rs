//! Whether a figure fits into the memory that the host has: a process that touches more than there is gets
//! killed, or somebody else's is.

use crate::error::BenchError;
use llfree_base::memory_room::Room;
use llfree_base::units::Bytes;
use shared_layout::{FRAME_SIZE, HUGE_SIZE};

/// Beside each guest: its VMM and its pool for installs.
const BESIDE: u64 = 80 << 20;
/// What the costliest allocator and its test keep for a frame that they manage.
const BYTES_PER_FRAME: u64 = 64;

/// An entry and a bitfield in the region, and the same in each of its images.
const BYTES_PER_REGION_FRAME: u64 = 66 * 6;

/// What guests need that hold `bytes` of memory in all at the worst moment.
pub(crate) fn of_guests(guests: usize, bytes: u64) -> u64 {
    bytes.saturating_add(BESIDE * guests as u64)
}

/// What tables for so much memory need; none of that is touched.
pub(crate) fn of_tables(mem: Bytes) -> u64 {
    mem.0 / FRAME_SIZE * BYTES_PER_FRAME
}

/// What the region of a persistent instance for so much memory needs, with its copies.
pub(crate) fn of_regions(mem: Bytes) -> u64 {
    mem.0 / HUGE_SIZE * BYTES_PER_REGION_FRAME
}

/// Refuses a figure that needs more than there is.
pub(crate) fn check(needed: u64) -> Result<(), BenchError> {
    fits(needed, &Room::now()?)
}

/// A part stays free: others use memory too.
fn fits(needed: u64, room: &Room) -> Result<(), BenchError> {
    if needed <= room.available - room.available / 8 {
        return Ok(());
    }
    let (needed, available) = (Bytes(needed), Bytes(room.available));
    Err(BenchError::Room { needed, available, place: room.available_in.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_base::memory_room::Place;

    #[test]
    fn a_figure_that_does_not_fit_is_refused_with_numbers() {
        let room = Room { available: 8 << 30, available_in: Place::Host, total: 9 << 30, total_in: Place::Host };
        assert!(fits(7 << 30, &room).is_ok());
        let refusal = fits((7 << 30) + 1, &room).expect_err("others need some").to_string();
        assert!(refusal.contains("the host has 8 GiB available") && refusal.contains("--mem"), "{refusal}");
        assert!(check(u64::MAX).is_err() && check(0).is_ok());
    }
}
