//! Every counter of a VM, declared once.
//!
//! Each part has two structs: `...Counters`, the atomics that the part owns and counts with, and
//! `...Counts`, the plain numbers in a report. A line declares a counter: its name, which is also its
//! key in the JSON of `status` and the last part of its name as a [metric](crate::metrics); its unit,
//! which is a word of the name; its help; and, after `=`, its label in the part's row of the `status`
//! table, which lists it if it is above 0. To add a counter, add a line here and count where it
//! happens.

use crate::metrics::Counter;
use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($(
        $(#[$about:meta])*
        $counters:ident, $counts:ident {
            $($(#[$($help:tt)*])* $field:ident $(= $word:literal)?,)*
        }
    )*) => { $(
        $(#[$about])*
        #[derive(Default, Debug)]
        pub struct $counters {
            $($(#[$($help)*])* pub $field: Counter,)*
        }

        impl $counters {
            /// Their values now. They are read one by one, so two may be from different moments.
            #[must_use]
            pub fn counts(&self) -> $counts {
                $counts { $($field: self.$field.get(),)* }
            }
        }

        crate::metered! {
            $(#[$about])*
            ///
            /// As numbers. What an older VM does not count is 0.
            #[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
            #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
            #[serde(default)]
            pub struct $counts {
                $($(#[$($help)*])* pub $field: u64 => counter $(($word))?,)*
            }
        }
    )* };
}

counters! {
    /// What the monitor did for its guest, and what the guest did behind its back.
    MonitorCounters, MonitorCounts {
        /// Huge frames that were backed with memory because a vCPU asked.
        installs,
        /// Install calls that ended with another status than `Ok`.
        install_failures,
        /// Touches of huge frames that the guest had not asked for: each of them where the RAM is under
        /// a userfaultfd, else the frames that audits found.
        violations,
        /// The part of the violations that hit held frames.
        held_violations,
        /// Huge frames that a guest with an allocator of its own touched before its hand-over was complete.
        boot_touches,
    }

    /// The sources of memory for installs.
    SupplyCounters, SupplyCounts {
        /// Huge frames that were installed from the pool.
        hits,
        /// Huge frames whose memory was zeroed while the guest waited.
        misses,
        /// Times that the pool gave back all it held because the host was short of memory.
        given_back,
        /// Huge frames of the pool that the kernel had emptied by itself, and that no guest got.
        stale,
    }

    /// Calls that were refused.
    DoorbellCounters, DoorbellCounts {
        /// Doorbell calls that were refused, and writes to the doorbell that are not a call.
        bad_calls,
        /// Times that a guest was about to kill for want of memory and asked for held memory.
        needs,
        /// Huge frames that a guest in need got back.
        released,
    }

    /// A vCPU's exits from the guest.
    ExitCounters, ExitCounts {
        /// For a memory-mapped device, the doorbell, or memory that is not there.
        mmio,
        /// For an I/O port.
        pio,
        /// For anything else.
        other,
    }

    /// The calls of a vCPU.
    CallCounters, CallCounts {
        /// Doorbell calls it made, by MMIO or port.
        calls,
    }

    /// Errors of a virtio device's driver.
    DriverCounters, DriverCounts {
        /// Violations of the specification.
        errors,
    }

    /// The guest's use of a disk.
    DiskCounters, DiskCounts {
        /// Reads that succeeded.
        reads,
        /// Bytes that were read.
        read_bytes = "read",
        /// Writes that succeeded.
        writes,
        /// Bytes that were written.
        written_bytes = "written",
        /// Flushes that succeeded.
        flushes,
        /// Bytes that were discarded or filled with zeroes.
        cleared_bytes = "discarded",
        /// Requests that the host could not carry out: I/O errors of the file.
        io_errors = "I/O errors",
        /// Requests that made no sense, such as those past the end of the disk.
        refused_requests = "requests refused",
    }

    /// Traffic of a network card in one direction.
    FrameCounters, FrameCounts {
        /// Frames that went through.
        frames,
        /// Bytes in them.
        bytes,
        /// Frames that did not fit: larger than the guest's buffer, or more than the tap takes at a time.
        dropped,
        /// Reads and writes of the tap that failed.
        errors,
    }

    /// Messages that the agent in a Linux guest sent unasked.
    AgentCounters, AgentCounts {
        /// Reports that came when nobody waited for them any more.
        late_reports,
        /// Frames that were neither a hello nor a report on anything requested.
        garbage_frames = "malformed messages",
    }

    /// A guest's use of its virtio-balloon.
    BalloonCounters, BalloonCounts {
        /// Requests to inflate.
        inflate_requests,
        /// Requests to deflate.
        deflate_requests,
        /// Runs of pages that were discarded, a system call each.
        discards,
        /// Memory discarded, in bytes, whether it was backed or not.
        discarded_bytes,
        /// Discards that the kernel refused.
        failed_discards,
        /// Memory that the guest reported as free, in bytes.
        reported_bytes,
        /// Page numbers out of range, or not at the start of a block.
        bad_pages,
        /// Pages given twice, or taken back without having been given.
        repeated_pages,
    }

    /// Requests of a guest's driver to its virtio-mem.
    MemCounters, MemCounts {
        /// Requests to plug that were granted.
        plug_requests,
        /// All other requests that were granted.
        other_requests,
        /// Requests that were refused.
        refused_requests = "requests refused",
        /// Runs of blocks that were discarded, a system call each.
        discards,
        /// Discards that the kernel refused.
        failed_discards,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::walk;

    #[test]
    fn what_is_counted_is_what_a_report_says() {
        let counters = DiskCounters::default();
        counters.reads.inc();
        counters.read_bytes.add(512);
        let counts = counters.counts();
        assert_eq!(counts, DiskCounts { reads: 1, read_bytes: 512, ..DiskCounts::default() });
        let mut sum = 0;
        walk(&counts, &mut |metric| sum += metric.value);
        assert_eq!(sum, 513);
    }

    #[test]
    fn counts_of_another_release_are_read() {
        let counts: SupplyCounts = serde_json::from_str(r#"{"hits":1,"swims":2}"#).expect("lenient");
        assert_eq!(counts, SupplyCounts { hits: 1, ..SupplyCounts::default() });
    }
}
