//! [`GuestTables`]: the page tables by which the CPU finds guest memory. They are kernel memory that is in no account
//! of this process; KVM's own statistics of the VM (Linux 5.14) tell how much they map.

use kvm_ioctls::VmFd;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use vmm_sys_util::ioctl::ioctl;

/// `KVM_GET_STATS_FD`, `_IO(KVMIO, 0xce)`.
const GET_STATS: libc::c_ulong = 0xaece;
/// Bytes of a table, and entries in it.
const TABLE: u64 = 4096;
const ENTRIES: u64 = 512;
/// `struct kvm_stats_header`, and `struct kvm_stats_desc` without its name.
const HEADER: usize = 24;
const DESCRIPTION: usize = 16;
/// Kernels have some twenty statistics of a VM, with names of 48 bytes.
const MOST_STATS: u32 = 256;
const LONGEST_NAME: u32 = 256;

/// The statistics of one VM. Holds a reference to KVM's VM, and must go before the memory behind it.
#[derive(Debug)]
pub(super) struct GuestTables {
    stats: File,
    /// Where the numbers lie: mappings of 4 KiB, 2 MiB and 1 GiB.
    leaves: [Option<u64>; 3],
    /// Tables that were made, and that are gone, where KVM counts them (not with TDP).
    made_and_gone: Option<(u64, u64)>,
}

impl GuestTables {
    /// Opens the statistics, and finds what is needed in them.
    ///
    /// # Errors
    /// This KVM has none.
    pub(super) fn open(vm: &VmFd) -> io::Result<Self> {
        // SAFETY: the call takes no argument and touches no memory.
        let fd = unsafe { ioctl(vm, GET_STATS) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel made this descriptor for us just now.
        let stats = unsafe { File::from_raw_fd(fd) };
        let mut header = [0; HEADER];
        stats.read_exact_at(&mut header, 0)?;
        let [name_bytes, count, descriptions, data] = [4, 8, 16, 20].map(|at| word(&header, at));
        if name_bytes > LONGEST_NAME || count > MOST_STATS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut all = vec![0; count as usize * (DESCRIPTION + name_bytes as usize)];
        stats.read_exact_at(&mut all, descriptions.into())?;
        let find = |name: &str| {
            let named = |stat: &&[u8]| stat[DESCRIPTION..].split(|byte| *byte == 0).next() == Some(name.as_bytes());
            let stat = all.chunks_exact(DESCRIPTION + name_bytes as usize).find(named)?;
            Some(u64::from(data) + u64::from(word(stat, 8)))
        };
        let leaves = ["pages_4k", "pages_2m", "pages_1g"].map(find);
        let made_and_gone = find("mmu_cache_miss").zip(find("mmu_shadow_zapped"));
        Ok(Self { stats, leaves, made_and_gone })
    }

    /// Bytes of tables that there are at least.
    pub(super) fn bytes(&self) -> u64 {
        let leaves = self.leaves.map(|place| self.read(place));
        let [made, gone] = [self.made_and_gone.map(|both| both.0), self.made_and_gone.map(|both| both.1)];
        tables(leaves).max(self.read(made).saturating_sub(self.read(gone))).saturating_mul(TABLE)
    }

    /// A number, or 0 where there is none.
    fn read(&self, place: Option<u64>) -> u64 {
        let mut number = [0; 8];
        match place.map(|place| self.stats.read_exact_at(&mut number, place)) {
            Some(Ok(())) => u64::from_le_bytes(number),
            _ => 0,
        }
    }
}

/// The 32-bit word at an offset; 0 past the end.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// The fewest tables that hold so many entries for pages of 4 KiB, 2 MiB and 1 GiB, with the tables above them.
fn tables([small, huge, giant]: [u64; 3]) -> u64 {
    let of_small = small.div_ceil(ENTRIES);
    let of_huge = huge.saturating_add(of_small).div_ceil(ENTRIES);
    let of_giant = giant.saturating_add(of_huge).div_ceil(ENTRIES);
    of_small.saturating_add(of_huge).saturating_add(of_giant).saturating_add(of_giant.div_ceil(ENTRIES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_level_has_tables_for_what_it_maps_and_for_the_tables_below() {
        assert_eq!(tables([0, 0, 0]), 0);
        assert_eq!(tables([1, 0, 0]), 4, "one of each level");
        assert_eq!(tables([513, 0, 0]), 5);
        assert_eq!(tables([0, 512, 0]), 3);
        assert_eq!(tables([512, 512, 0]), 1 + 2 + 1 + 1);
        assert_eq!(tables([u64::MAX; 3]), tables([u64::MAX; 3]), "any numbers are fine");
    }
}
