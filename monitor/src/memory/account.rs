//! The kernel's account of what is resident, from whichever of its books knows this kind of memory.
//!
//! A file knows what it holds, page tables what is mapped. Only reads.

use super::pages::{self, Pagemap};
use super::{Backing, GuestRam, RamResidency};
use llfree_base::{faults, kernel_stats};
use std::io;
use std::ops::Range;

impl GuestRam {
    pub(super) fn pagemap(&self) -> io::Result<&Pagemap> {
        self.pagemap.as_ref().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "/proc/self/pagemap is missing"))
    }

    /// Its bytes in the file that it lies in.
    fn in_its_file(&self) -> Range<u64> {
        self.file_start..self.file_start + self.bytes()
    }

    pub(super) fn read_residency(&self) -> io::Result<RamResidency> {
        faults::point(faults::RESIDENCY)?;
        let file_bytes = match &self.file {
            // A page can be in the file and in no page table. Where the file holds more than this memory, it is counted.
            Some(file) if self.file_start > 0 => {
                let mut bytes = 0;
                pages::file_data(file, self.in_its_file(), |range| bytes += range.end - range.start)?;
                Some(bytes)
            }
            Some(file) => Some(u64::try_from(rustix::fs::fstat(file)?.st_blocks).unwrap_or(0) * 512),
            None => None,
        };
        if let (Some(resident_bytes), Backing::Hugetlb) = (file_bytes, self.backing) {
            return Ok(RamResidency { resident_bytes, huge_bytes: resident_bytes });
        }
        if let (Some(resident_bytes), false) = (file_bytes, self.mapping.is_here()) {
            // How its owner maps it is not known.
            return Ok(RamResidency { resident_bytes, huge_bytes: 0 });
        }
        let mut mapped = RamResidency::default();
        let scanned = self.pagemap()?.scan(self.mapping.start(), self.mapping.len(), |range, state| {
            let bytes = if state.present && state.is_resident() { range.end - range.start } else { 0 };
            mapped.resident_bytes += bytes;
            mapped.huge_bytes += if state.huge { bytes } else { 0 };
        });
        match scanned {
            Err(error) if lacks_scan(&error) => return self.read_residency_without_scan(file_bytes),
            other => other?,
        }
        Ok(RamResidency { resident_bytes: file_bytes.unwrap_or(mapped.resident_bytes), ..mapped })
    }

    /// The same on kernels before 6.7; `file_bytes` is what the file says, if there is one.
    pub(super) fn read_residency_without_scan(&self, file_bytes: Option<u64>) -> io::Result<RamResidency> {
        let addresses = self.host_address()..self.host_address() + self.bytes();
        let huge_bytes = kernel_stats::huge_mapped_bytes(&addresses)?;
        if let Some(resident_bytes) = file_bytes {
            return Ok(RamResidency { resident_bytes, huge_bytes });
        }
        let mut resident_bytes = 0;
        pages::mincore(self.mapping.start(), self.mapping.len(), |range| resident_bytes += range.end - range.start)?;
        Ok(RamResidency { resident_bytes, huge_bytes })
    }

    pub(super) fn walk_mapped(&self, mut visit: impl FnMut(Range<u64>, bool)) -> io::Result<()> {
        faults::point(faults::RESIDENCY)?;
        let (start, len) = (self.mapping.start(), self.mapping.len());
        match &self.file {
            Some(file) if self.backing == Backing::Memfd => {
                pages::file_data(file, self.in_its_file(), |range| visit(range, true))
            }
            // Hugetlb files do not tell data from holes, but their pages come and go with the
            // mapping's entries: nobody else has the file.
            _ => match self.pagemap()?.scan(start, len, |range, state| visit(range, state.is_resident())) {
                Err(error) if lacks_scan(&error) => pages::mincore(start, len, |range| visit(range, true)),
                other => other,
            },
        }
    }
}

/// Whether the kernel is older than `PAGEMAP_SCAN`.
pub(super) fn lacks_scan(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOTTY)
}
