//! [`families`]: the metrics of some VMs.

use crate::names::{self, PREFIX};
use crate::text::{About, Families, Kind, Labels, Value};
use llfree_base::metrics::{Unit, walk};
use llfree_control::report::{StatusReport, VmState};
use std::collections::HashSet;

/// A VM, or an area of a process, and what it said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Observed {
    /// Its name.
    pub name: String,
    /// Its status; `None` if it did not answer.
    pub status: Option<StatusReport>,
}

/// The metrics of these VMs. Of two with one name the first counts.
#[must_use]
pub fn families(vms: &[Observed]) -> Families {
    let mut families = Families::default();
    let mut seen = HashSet::new();
    for Observed { name, status } in vms.iter().filter(|vm| seen.insert(&vm.name)) {
        let vm: Labels = vec![("vm", name.clone())];
        let up = "1 for a VM that answered, 0 for one that listens and did not.";
        families.add(gauge("up", up), vm.clone(), Value::Whole(status.is_some().into()));
        if let Some(status) = status {
            add_words(&mut families, &vm, status);
            add_numbers(&mut families, &vm, status);
            add_durations(&mut families, &vm, status);
        }
    }
    families
}

fn gauge(name: &str, help: &str) -> About {
    About { name: format!("{PREFIX}_{name}"), help: help.to_owned(), kind: Kind::Gauge, unit: None }
}

/// What a status says in words: what stays while the VM lives as labels of one sample, what changes as numbers.
fn add_words(families: &mut Families, vm: &Labels, status: &StatusReport) {
    let help = "What the VM is: an area of a process has no vCPUs.".to_owned();
    let about = About { name: PREFIX.to_owned(), help, kind: Kind::Info, unit: None };
    let kind = if status.vcpus.is_empty() { "area" } else { "vm" };
    let words = [
        ("kind", kind.to_owned()),
        ("version", status.version.clone()),
        ("elastic", status.elastic.kind.to_string()),
        ("backing", status.backing.to_string()),
        ("enforcement", status.enforcement.to_string()),
        ("on_violation", status.on_violation.to_string()),
    ];
    families.add(about, vm.iter().cloned().chain(words).collect(), Value::Whole(1));
    for (name, help, is_so) in [
        ("paused", "1 while the guest stands still.", status.state == VmState::Paused),
        ("elastic_driven", "1 if the guest has a driver at work, or shares its table.", status.elastic.driven),
        ("auto_reclaim_on", "1 while free memory is reclaimed without being asked for.", status.auto_reclaim.on),
    ] {
        families.add(gauge(name, help), vm.clone(), Value::Whole(is_so.into()));
    }
    let help = "How many vCPUs the VM has.";
    families.add(gauge("vcpus", help), vm.clone(), Value::Whole(status.vcpus.len() as u64));
}

fn add_numbers(families: &mut Families, vm: &Labels, status: &StatusReport) {
    walk(status, &mut |metric| {
        let mut labels = vm.clone();
        // vCPUs are added up: a metric a vCPU would be thousands.
        if !metric.name.starts_with("vcpus_") {
            labels.extend(metric.labels.iter().cloned());
        }
        let value = match metric.unit {
            Unit::Milliseconds => Value::Millis(metric.value),
            Unit::Bytes | Unit::Count => Value::Whole(metric.value),
        };
        families.add(names::about(metric), labels, value);
    });
}

fn add_durations(families: &mut Families, vm: &Labels, status: &StatusReport) {
    for (name, help, durations) in [
        ("install", "How long install calls took on the host.", &status.install_durations),
        ("resize", "How long resizes took, without the time that they waited for the guest.", &status.resize_durations),
    ] {
        let about = About {
            name: format!("{PREFIX}_{name}_duration_seconds"),
            help: help.to_owned(),
            kind: Kind::Histogram,
            unit: Some("seconds"),
        };
        families.add(about, vm.clone(), Value::Durations(durations.clone()));
    }
}

#[cfg(test)]
#[path = "vms_tests.rs"]
mod tests;
