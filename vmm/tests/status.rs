//! What a status promises: each of its numbers is a metric, named by its path in the JSON. Real machines
//! on /dev/kvm, through the library.

use llfree_base::metrics::{Kind, Metric, Unit, walk};
use llfree_base::units::Bytes;
use llfree_control::report::StatusReport;
use llfree_monitor::memory::Backing;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use test_machine::MIB;
use test_machine::machine::{alloc, fill, free, start};
use vmm::service::{self, Service};
use vmm::vm::{Vm, VmConfig};

const KINDS: [&str; 4] = ["llfree", "balloon,stats=10ms", "virtio-mem,boot=64M", "none"];

fn launch(elastic: &str) -> Option<Vm> {
    let elastic = elastic.parse().expect("a kind");
    start(VmConfig { elastic, ..VmConfig::new(Bytes(256 * MIB), 2, Backing::Anon) })
}

fn status(vm: &Vm) -> StatusReport {
    service::status(vm, "numbers").expect("the kernel answers")
}

/// All numbers of a JSON value, each by its path; a place in a list is one part of the path.
fn numbers(path: &str, value: &Value, found: &mut BTreeMap<String, u64>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}_{name}") };
    match value {
        Value::Number(number) => drop(found.insert(path.to_owned(), number.as_u64().expect("no fraction, no sign"))),
        Value::Object(fields) => fields.iter().for_each(|(name, value)| numbers(&below(name), value, found)),
        Value::Array(values) => {
            values.iter().enumerate().for_each(|(index, value)| numbers(&format!("{path}[{index}]"), value, found));
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// The path of a metric as [`numbers`] has it: the place in a list is a label.
fn path(metric: &Metric<'_>) -> String {
    let index = metric.labels.iter().find(|(name, _)| *name == "index");
    let Some((_, index)) = index else { return metric.name.to_owned() };
    let lists = ["vcpus", "disks", "nets", "devices"];
    let list = lists.into_iter().find(|list| metric.name.starts_with(list)).expect("only they are lists");
    metric.name.replacen(list, &format!("{list}[{index}]"), 1)
}

#[test]
fn every_number_of_a_status_is_a_metric_under_its_own_name() {
    for kind in KINDS {
        let Some(vm) = launch(kind) else { return };
        let report = status(&vm);
        let mut json = BTreeMap::new();
        numbers("", &serde_json::to_value(&report).expect("plain data"), &mut json);
        // Identifiers rather than measurements.
        json.retain(|path, _| path != "pid" && !path.ends_with("_index"));
        // Not one number each: `what_takes_time_is_counted_by_its_duration`.
        json.retain(|path, _| !path.starts_with("install_durations") && !path.starts_with("resize_durations"));
        let mut metrics = BTreeMap::new();
        walk(&report, &mut |metric| {
            let again = metrics.insert(path(metric), metric.value);
            assert_eq!(again, None, "{kind}: two metrics {metric:?}");
        });
        assert_eq!(metrics, json, "{kind}");
    }
}

#[test]
fn a_metric_has_help_and_its_name_says_its_unit() {
    for kind in KINDS {
        let Some(vm) = launch(kind) else { return };
        let mut families = BTreeMap::new();
        walk(&status(&vm), &mut |metric| {
            assert!(
                metric.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
                "{metric:?}"
            );
            assert!(metric.help.ends_with('.') && metric.help.len() > 10, "{metric:?}");
            let words: Vec<&str> = metric.name.split('_').collect();
            let unit = match (words.contains(&"bytes"), words.contains(&"ms")) {
                (true, false) => Unit::Bytes,
                (false, true) => Unit::Milliseconds,
                (false, false) => Unit::Count,
                (true, true) => panic!("two units: {metric:?}"),
            };
            assert_eq!(metric.unit, unit, "{metric:?}");
            // All metrics of one name have the same meaning.
            let family = (metric.kind, metric.help);
            assert_eq!(*families.entry(metric.name.to_owned()).or_insert(family), family, "{metric:?}");
        });
        assert!(families.len() > 30, "{families:?}");
    }
}

#[test]
fn counters_only_rise() {
    let Some(vm) = launch("llfree") else { return };
    let counters = || {
        let mut counters = BTreeMap::new();
        walk(&status(&vm), &mut |metric| {
            if metric.kind == Kind::Counter {
                counters.insert(path(metric), metric.value);
            }
        });
        counters
    };
    let mut before = counters();
    for _ in 0..3 {
        fill(&vm, 128);
        free(&vm, None, false);
        vm.shrink(64 * MIB, |_| false).expect("in range");
        vm.grow(256 * MIB).expect("in range");
        let after = counters();
        assert!(after["installs"] > before["installs"] && after["vcpus[0]_calls"] > before["vcpus[0]_calls"]);
        for (name, value) in &after {
            assert!(*value >= before[name], "{name}: {value} after {}", before[name]);
        }
        before = after;
    }
}

/// Resident memory and the limit belong together, also in the middle of a resize.
#[test]
fn a_status_is_of_one_moment() {
    for elastic in ["llfree", "balloon-huge"] {
        let elastic = elastic.parse().expect("a kind");
        let config = VmConfig { elastic, ..VmConfig::new(Bytes(512 * MIB), 2, Backing::Anon) };
        let Some(vm) = start(config) else { return };
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let look = scope.spawn(|| {
                let (mut looks, mut torn) = (0, Vec::new());
                while !over.load(Ordering::Relaxed) {
                    let status = service::status(&vm, "test").expect("the kernel answers");
                    // What a guest may touch without having it: 64 KiB a vCPU.
                    if status.resident_bytes > status.limit_bytes + MIB {
                        torn.push((status.resident_bytes / MIB, status.limit_bytes / MIB));
                    }
                    looks += 1;
                }
                (looks, torn)
            });
            for _ in 0..15 {
                alloc(&vm, 440, 9);
                free(&vm, None, false);
                vm.shrink(64 * MIB, |elapsed| elapsed < Duration::from_secs(60)).expect("in range");
                vm.grow(512 * MIB).expect("in range");
            }
            over.store(true, Ordering::Relaxed);
            let (looks, torn) = look.join().expect("no panic");
            assert!(torn.is_empty(), "{} of {looks}: {torn:?}", torn.len());
        });
    }
}

#[test]
fn what_takes_time_is_counted_by_its_duration() {
    let Some(vm) = launch("llfree") else { return };
    let vm = Arc::new(vm);
    let service = Service::start(vm.clone(), "numbers").expect("threads");
    fill(&vm, 64);
    let report = service.status().expect("the kernel answers");
    let installs = report.install_durations;
    assert!(installs.total() > 0 && installs.total() <= report.monitor.installs, "{installs:?}");
    assert!(installs.sum_us > 0, "{installs:?}");
    // Only what is asked of the service is a resize to be counted: `a_resize_is_counted` of the command line's tests.
    assert_eq!(report.resize_durations.total(), 0);
    service.finish();
    service.status().expect_err("its threads have ended");
}
