//! What a number of a status is called as a metric.
//!
//! Its path in the status is also its name, but for what Prometheus asks of names: base units at the end, and one word
//! for all memory of a VM, so that its figures stand together. A counter that is added to a status needs no line here.

use crate::text::{About, Kind};
use llfree_base::metrics::{self, Metric, Unit};

/// What all names begin with.
pub const PREFIX: &str = "llfree_vm";

/// The VM's memory as a whole, by the path in a status and the name here.
const MEMORY: [(&str, &str); 14] = [
    ("memory_bytes", "memory_size_bytes"),
    ("limit_bytes", "memory_limit_bytes"),
    ("wanted_bytes", "memory_wanted_bytes"),
    ("target_bytes", "memory_target_bytes"),
    ("resident_bytes", "memory_resident_bytes"),
    ("huge_page_bytes", "memory_huge_page_bytes"),
    ("cost_bytes", "memory_cost_bytes"),
    ("page_table_bytes", "memory_page_table_bytes"),
    ("held_bytes", "memory_held_bytes"),
    ("evicted_bytes", "memory_evicted_bytes"),
    ("installed_bytes", "memory_installed_bytes"),
    ("guest_used_bytes", "memory_guest_used_bytes"),
    ("guest_free_bytes", "memory_guest_free_bytes"),
    ("reclaimable_now_bytes", "memory_reclaimable_bytes"),
];

/// How paths begin, and names do.
const PARTS: [(&str, &str); 5] = [
    ("vmm_overhead_", "memory_vmm_"),
    ("vcpus_", "vcpu_"),
    ("disks_", "disk_"),
    ("nets_traffic_", "net_"),
    ("devices_", "device_"),
];

/// What the help of metrics is about, by the beginning of their paths; a more special one comes first.
const ABOUT: [(&str, &str); 15] = [
    ("agent_", "Agent in a Linux guest"),
    ("auto_reclaim_", "Automatic reclaim"),
    ("cgroup_", "Cgroup of the VM"),
    ("devices_", "Driver of a virtio device"),
    ("disks_", "Disk"),
    ("elastic_balloon_guest_", "Statistics of the guest, by its balloon"),
    ("elastic_balloon_", "Balloon"),
    ("elastic_mem_", "virtio-mem"),
    ("elastic_table_", "Guest with an allocator of its own"),
    ("guest_commands_", "Command of the guest's agent"),
    ("install_pool_", "Install pool"),
    ("nets_traffic_to_guest_", "Network, to the guest"),
    ("nets_traffic_from_guest_", "Network, from the guest"),
    ("vcpus_exits_", "Exits of vCPUs"),
    ("vcpus_", "vCPUs"),
];

/// A metric's meaning, which in a status is said where it stands.
fn help(path: &str, help: &str) -> String {
    let help = help.replace("in milliseconds", "in seconds").replace("Milliseconds", "Seconds");
    let Some((_, about)) = ABOUT.iter().find(|(from, _)| path.starts_with(from)) else { return help };
    let (first, rest) = help.split_at(help.chars().next().map_or(0, char::len_utf8));
    format!("{about}: {}{rest}", first.to_lowercase())
}

/// The name of a metric with this path, without the prefix and without its unit.
fn stem(path: &str, unit: Unit) -> String {
    let path = MEMORY.iter().find(|(from, _)| *from == path).map_or(path, |(_, to)| to);
    let part = PARTS.iter().find_map(|(from, to)| Some(format!("{to}{}", path.strip_prefix(from)?)));
    let path = part.unwrap_or_else(|| path.to_owned());
    let word = match unit {
        Unit::Bytes => "bytes",
        Unit::Milliseconds => "ms",
        Unit::Count => return path,
    };
    path.split('_').filter(|part| *part != word).collect::<Vec<_>>().join("_")
}

/// What is said of a metric.
#[must_use]
pub fn about(metric: &Metric<'_>) -> About {
    let stem = stem(metric.name, metric.unit);
    let unit = match metric.unit {
        Unit::Bytes => Some("bytes"),
        Unit::Milliseconds => Some("seconds"),
        Unit::Count => None,
    };
    let kind = match metric.kind {
        metrics::Kind::Counter => Kind::Counter,
        metrics::Kind::Gauge => Kind::Gauge,
    };
    let name = [PREFIX, &stem].into_iter().chain(unit).collect::<Vec<_>>().join("_");
    About { name, help: help(metric.name, metric.help), kind, unit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_goes_to_the_end_and_parts_get_one_name() {
        for (path, name) in [
            ("limit_bytes", "llfree_vm_memory_limit_bytes"),
            ("vmm_overhead_bytes", "llfree_vm_memory_vmm_bytes"),
            ("uptime_ms", "llfree_vm_uptime_seconds"),
            ("auto_reclaim_last_scan_ms_ago", "llfree_vm_auto_reclaim_last_scan_ago_seconds"),
            ("install_pool_hits", "llfree_vm_install_pool_hits"),
            ("vcpus_exits_mmio", "llfree_vm_vcpu_exits_mmio"),
            ("disks_read_bytes", "llfree_vm_disk_read_bytes"),
            ("nets_traffic_to_guest_bytes", "llfree_vm_net_to_guest_bytes"),
            ("something_new", "llfree_vm_something_new"),
        ] {
            let metric = Metric {
                name: path,
                labels: &[],
                unit: Unit::of(path),
                kind: metrics::Kind::Gauge,
                help: "Help.",
                word: None,
                value: 0,
            };
            assert_eq!(about(&metric).name, name);
        }
    }
}
