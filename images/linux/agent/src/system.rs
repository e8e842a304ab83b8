//! What the kernel says about its memory, and what it is told to do about it.
//!
//! Text in, numbers out; a file that is missing or reads strangely is 0 or nothing, as nobody's
//! memory depends on it but the agent's own.

use shared_layout::FRAME_SIZE;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

/// Memory by `/proc/meminfo`, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Meminfo {
    /// All that the kernel manages.
    pub total: u64,
    /// Memory that nobody uses.
    pub free: u64,
    /// Memory available without swapping: free, or a cache.
    pub available: u64,
}

impl Meminfo {
    /// As the kernel counts now; zeroes where it does not say.
    #[must_use]
    pub fn now() -> Self {
        Self::parse(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let bytes = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            kib.unwrap_or(0).saturating_mul(1024)
        };
        Self { total: bytes("MemTotal"), free: bytes("MemFree"), available: bytes("MemAvailable") }
    }
}

/// Wholly free huge frames by `/proc/buddyinfo`.
#[must_use]
pub fn free_huge_frames() -> u64 {
    parse_buddyinfo(&fs::read_to_string("/proc/buddyinfo").unwrap_or_default())
}

/// `Node 0, zone DMA32 759 572 ...`: free blocks of each order, from 0 on; an order-10 block is two huge frames.
fn parse_buddyinfo(text: &str) -> u64 {
    let of_zone = |line: &str| {
        let counts = line.split_whitespace().skip(4).enumerate().skip(9);
        counts.map(|(order, count)| count.parse::<u64>().unwrap_or(0) << (order - 9).min(8)).sum::<u64>()
    };
    text.lines().map(of_zone).sum()
}

/// Gives caches back and moves pages together, so that the host finds whole huge frames.
///
/// # Errors
/// The kernel's answer to the first write that it refused.
pub fn drain() -> io::Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    fs::write("/proc/sys/vm/compact_memory", "1")
}

/// Asks the kernel to kill others first: what the agent holds is what the host is told about. Not
/// the highest value, with which a kernel without other victims panics.
///
/// # Errors
/// The kernel's, for users other than root.
pub fn be_killed_last() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-999")
}

/// The physical address of a virtual one of this process, for root.
#[must_use]
pub fn physical(address: u64) -> Option<u64> {
    const PRESENT: u64 = 1 << 63;
    const NUMBER: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    fs::File::open("/proc/self/pagemap").ok()?.read_exact_at(&mut entry, address / FRAME_SIZE * 8).ok()?;
    let entry = u64::from_le_bytes(entry);
    // Others than root read a number of 0.
    (entry & PRESENT != 0 && entry & NUMBER != 0).then_some((entry & NUMBER) * FRAME_SIZE + address % FRAME_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:        1012345 kB\nMemFree:          500000 kB\nMemAvailable:     800000 kB\n";
        let expected = Meminfo { total: 1_012_345 << 10, free: 500_000 << 10, available: 800_000 << 10 };
        assert_eq!(Meminfo::parse(text), expected);
        assert_eq!(Meminfo::parse("MemTotal: x kB\nMemFree:\n"), Meminfo::default());
        assert!(Meminfo::now().available <= Meminfo::now().total);
    }

    #[test]
    fn huge_frames_are_counted_from_order_nine_on() {
        let text = "Node 0, zone      DMA      1      1      0      0      0      0      0      0      0      1      3\n\
                    Node 0, zone    DMA32    759    572    791    475    194     45     12      0      0      5    100\n";
        assert_eq!(parse_buddyinfo(text), 1 + 6 + 5 + 200);
        assert_eq!(parse_buddyinfo("Node 0\n\n"), 0);
    }
}
