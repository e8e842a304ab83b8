//! The kernel's figures on this process's memory and on huge pages of this machine.
//!
//! Reads `/proc` and `/sys`, writes nothing. Each number comes from a parser that is a plain
//! function over text, so that formats are tested without the machine being in a certain state.
//! A file that lacks what it should hold is an [`io::ErrorKind::InvalidData`] error, never a zero.

use std::ops::Range;
use std::path::PathBuf;
use std::{fmt, fs, io};

const SMAPS_ROLLUP: &str = "/proc/self/smaps_rollup";
const STATUS: &str = "/proc/self/status";
const MEMINFO: &str = "/proc/meminfo";
const SMAPS: &str = "/proc/self/smaps";
const THP_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// The directory of the pool of 2 MiB pages, whatever its default huge page size is.
pub const POOL_DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// What this process costs, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProcessMemory {
    /// Its resident memory; of pages that other processes map too, such as code, its share of them (`Pss`).
    /// Pages of memory files count, hugetlb pages do **not**: those show up only as [`HugePagePool::free`]
    /// falling.
    pub share: u64,
    /// The kernel's page tables for it (`VmPTE`). Tables of a hypervisor for its guest are not among them.
    pub page_tables: u64,
}

/// Reads `/proc/self/smaps_rollup`, which walks the page tables and is exact, and `/proc/self/status`.
///
/// # Errors
/// `/proc` is not mounted, or a line is missing.
pub fn process_memory() -> io::Result<ProcessMemory> {
    let field = |path, name| kib_field(&fs::read_to_string(path)?, name).ok_or_else(|| malformed(path, name));
    Ok(ProcessMemory { share: field(SMAPS_ROLLUP, "Pss")?, page_tables: field(STATUS, "VmPTE")? })
}

/// A field of `/proc/meminfo`, such as `MemAvailable`, in bytes.
///
/// # Errors
/// `/proc` is not mounted, or the file has no such line.
pub fn meminfo_bytes(field: &str) -> io::Result<u64> {
    kib_field(&fs::read_to_string(MEMINFO)?, field).ok_or_else(|| malformed(MEMINFO, field))
}

/// The machine's pool of 2 MiB hugetlb pages, in pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HugePagePool {
    /// Pages in the pool, used or not.
    pub total: u64,
    /// Pages that hold no data, among them the reserved ones.
    pub free: u64,
    /// Free pages that are promised to a mapping which has not touched them yet.
    pub reserved: u64,
}

impl HugePagePool {
    /// Pages that a new mapping can still reserve.
    #[must_use]
    pub const fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved)
    }
}

/// Reads the pool of 2 MiB pages.
///
/// # Errors
/// The kernel has no 2 MiB hugetlb pages, or `/sys` is not mounted.
pub fn huge_page_pool() -> io::Result<HugePagePool> {
    let read = |name: &str| {
        let path = format!("{POOL_DIR}/{name}");
        let text = fs::read_to_string(&path)?;
        text.trim().parse().map_err(|_| malformed(&path, "a page count"))
    };
    Ok(HugePagePool { total: read("nr_hugepages")?, free: read("free_hugepages")?, reserved: read("resv_hugepages")? })
}

/// When the kernel backs anonymous memory with transparent huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ThpMode {
    /// Wherever 2 MiB fit.
    Always,
    /// Only where a mapping asks for it, as guest RAM does.
    Madvise,
    /// Nowhere: guest RAM is made of 4 KiB pages, and every discard costs a hundredfold.
    Never,
}

impl fmt::Display for ThpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Always => "always",
            Self::Madvise => "madvise",
            Self::Never => "never",
        })
    }
}

/// Reads the mode for anonymous memory. Shared memory (memfd) has a mode of its own.
///
/// # Errors
/// The kernel has no transparent huge pages, or `/sys` is not mounted.
pub fn thp_mode() -> io::Result<ThpMode> {
    parse_thp_mode(&fs::read_to_string(THP_ENABLED)?).ok_or_else(|| malformed(THP_ENABLED, "a chosen mode"))
}

/// Bytes that a huge page-table entry maps inside `addresses`, from `/proc/self/smaps`.
///
/// The slow way to learn it, for kernels that cannot scan page tables by `ioctl`.
pub fn huge_mapped_bytes(addresses: &Range<u64>) -> io::Result<u64> {
    Ok(parse_huge_mapped(&fs::read_to_string(SMAPS)?, addresses))
}

/// The mount point of cgroup v2, from `/proc/self/mountinfo`.
pub fn parse_cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        // Mount id, parent, device, root, mount point, options, tags ... - type, source, options.
        let (mount, kind) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        (kind.split(' ').next() == Some("cgroup2")).then(|| PathBuf::from(point))
    })
}

fn malformed(path: &str, missing: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{path} does not hold {missing}"))
}

/// The bytes of a line `name:   123 kB`.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| kib_value(line, name))
}

fn kib_value(line: &str, name: &str) -> Option<u64> {
    let value = line.strip_prefix(name)?.strip_prefix(':')?;
    value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

/// The word in brackets: `always [madvise] never`.
fn parse_thp_mode(text: &str) -> Option<ThpMode> {
    let (_, rest) = text.split_once('[')?;
    match rest.split_once(']')?.0 {
        "always" => Some(ThpMode::Always),
        "madvise" => Some(ThpMode::Madvise),
        "never" => Some(ThpMode::Never),
        _ => None,
    }
}

/// Adds up the huge mappings of every area that lies wholly inside `addresses`.
fn parse_huge_mapped(smaps: &str, addresses: &Range<u64>) -> u64 {
    let mut inside = false;
    let mut bytes = 0;
    for line in smaps.lines() {
        if let Some(area) = parse_area(line) {
            inside = addresses.start <= area.start && area.end <= addresses.end;
        } else if inside {
            let huge = ["AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"];
            bytes += huge.iter().find_map(|name| kib_value(line, name)).unwrap_or(0);
        }
    }
    bytes
}

/// The addresses of an area's first line, `7f00-7f10 rw-p ...`; `None` for its other lines.
fn parse_area(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rss_is_read_from_its_own_line() {
        let text = "55d0-7ffe ---p 00000000 00:00 0   [rollup]\nRss:                1836 kB\nPss_Anon: 88 kB\n";
        assert_eq!(kib_field(text, "Rss"), Some(1836 * 1024));
        assert_eq!(kib_field(text, "Pss"), None, "a longer name is another field");
        assert_eq!(kib_field("Rss: 12 MB\n", "Rss"), None);
        assert_eq!(kib_field("Rss: 18446744073709551615 kB\n", "Rss"), None, "does not wrap");
    }

    #[test]
    fn the_chosen_thp_mode_is_the_one_in_brackets() {
        assert_eq!(parse_thp_mode("always [madvise] never\n"), Some(ThpMode::Madvise));
        assert_eq!(parse_thp_mode("[always] madvise never\n"), Some(ThpMode::Always));
        assert_eq!(parse_thp_mode("always madvise [never]\n"), Some(ThpMode::Never));
        assert_eq!(parse_thp_mode("always madvise never\n"), None);
        assert_eq!(parse_thp_mode("[sometimes]"), None);
        assert_eq!(parse_thp_mode("["), None);
    }

    #[test]
    fn huge_mappings_count_only_inside_the_range() {
        let smaps = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0\nSize: 4096 kB\nAnonHugePages:      2048 kB\n\
             ShmemPmdMapped: 0 kB\nVmFlags: rd wr hg\n\
             7f0000400000-7f0000800000 rw-s 00000000 00:01 5   /memfd:ram (deleted)\nShmemPmdMapped: 4096 kB\n\
             7f0000800000-7f0000c00000 rw-p 00000000 00:00 0\nAnonHugePages: 4096 kB\n";
        let mib = |first: u64, last: u64| 0x7f00_0000_0000 + (first << 20)..0x7f00_0000_0000 + (last << 20);
        assert_eq!(parse_huge_mapped(smaps, &mib(0, 8)), 6 << 20);
        assert_eq!(parse_huge_mapped(smaps, &mib(4, 12)), 8 << 20);
        assert_eq!(parse_huge_mapped(smaps, &mib(2, 4)), 0, "an area across the edge is not ours");
    }

    #[test]
    fn cgroup_v2_is_found_among_the_mounts() {
        let mounts = "31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             32 24 0:28 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_cgroup2_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(parse_cgroup2_mount("31 24 0:27 / /x rw - ext4 cgroup2 rw\n - \n"), None);
    }

    #[test]
    fn available_pages_are_free_and_not_promised() {
        assert_eq!(HugePagePool { total: 9, free: 5, reserved: 2 }.available(), 3);
        assert_eq!(HugePagePool { total: 0, free: 0, reserved: 1 }.available(), 0, "a racing read does not wrap");
    }

    #[test]
    fn this_process_is_resident() {
        let ProcessMemory { share, page_tables } = process_memory().expect("/proc is mounted");
        assert!(share > 64 * 1024 && page_tables > 0);
    }
}
