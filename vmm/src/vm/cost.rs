//! What a VM costs its host: guest, pool, the VMM itself, and page tables.
//!
//! Two words, one meaning each, wherever the program shows a number: *resident* is memory behind the guest's
//! RAM, *cost* is all that would be free without the VM.

use super::Vm;
use super::guest_tables::GuestTables;
use llfree_base::kernel_stats;
use llfree_monitor::memory::Backing;
use std::io;

/// Host memory of one VM, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Cost {
    /// Behind the guest's RAM.
    pub resident: u64,
    /// Kept ready for its installs.
    pub pool: u64,
    /// The VMM's own; of what it shares with other processes, such as its code, its share.
    pub vmm: u64,
    /// The kernel's page tables for this process, and the hypervisor's for the guest: by the account of the VM's cgroup,
    /// or else as many as KVM must have for what it maps.
    pub page_tables: u64,
}

impl Cost {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        [self.resident, self.pool, self.vmm, self.page_tables].iter().fold(0, |sum, part| sum.saturating_add(*part))
    }
}

impl Vm {
    /// What the VM costs now, according to the kernel. The parts are read one after the other.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn cost(&self) -> io::Result<Cost> {
        let resident = self.monitor.ram().residency().map_err(io::Error::other)?.resident_bytes;
        let pool = self.monitor.supply().pool_status().resident_bytes;
        let process = kernel_stats::process_memory()?;
        // hugetlb pages are in no such account.
        let of_guest = if self.config.backing == Backing::Hugetlb { 0 } else { resident };
        let vmm = process.share.saturating_sub(of_guest.saturating_add(pool));
        let in_cgroup = self.cgroup().and_then(|cgroup| cgroup.page_tables());
        let by_kvm = || self.guest_tables.as_ref().map_or(0, GuestTables::bytes);
        let page_tables = in_cgroup.unwrap_or_else(|| process.page_tables.saturating_add(by_kvm()));
        Ok(Cost { resident, pool, vmm, page_tables })
    }
}
