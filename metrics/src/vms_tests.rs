//! What a status becomes, and that the page about metrics, the dashboard and the alerts name what there is.

use super::*;
use crate::text::Format;
use llfree_base::counters::{DiskCounts, MonitorCounts};
use llfree_base::histogram::DurationCounts;
use llfree_control::report::{
    BalloonStatus, CgroupStatus, DeviceStatus, DiskStatus, ElasticStatus, GuestCommandsReport, GuestStatsReport,
    LinuxAgentStatus, MemStatus, NetReport, TableStatus, VcpuStatus,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A status in which nothing is missing.
fn full() -> StatusReport {
    let guest = GuestStatsReport {
        free_bytes: Some(1),
        available_bytes: Some(1),
        total_bytes: Some(1),
        cache_bytes: Some(1),
        major_faults: Some(1),
        minor_faults: Some(1),
        ..GuestStatsReport::default()
    };
    let balloon = BalloonStatus { guest: Some(guest), ..BalloonStatus::default() };
    let elastic = ElasticStatus {
        balloon: Some(balloon),
        mem: Some(MemStatus::default()),
        table: Some(TableStatus::default()),
        ..ElasticStatus::default()
    };
    let counts = DiskCounts { reads: 4, ..DiskCounts::default() };
    let exits = llfree_base::counters::ExitCounts { mmio: 3, ..Default::default() };
    let mut status = StatusReport {
        version: "1.2.3".to_owned(),
        limit_bytes: 64 << 20,
        uptime_ms: 1500,
        paused_ms: Some(1),
        target_bytes: Some(1),
        target_age_ms: Some(1),
        guest_used_bytes: Some(1),
        guest_free_bytes: Some(1),
        reclaimable_now_bytes: Some(1),
        monitor: MonitorCounts { installs: 7, ..MonitorCounts::default() },
        guest_commands: Some(GuestCommandsReport { age_ms: Some(1), ..GuestCommandsReport::default() }),
        cgroup: Some(CgroupStatus { path: "/sys/fs/cgroup/x".to_owned(), ..CgroupStatus::default() }),
        vcpus: vec![VcpuStatus { exits, ..VcpuStatus::default() }; 3],
        elastic,
        disks: vec![DiskStatus { path: "a.img".to_owned(), counts, ..DiskStatus::default() }; 2],
        nets: vec![NetReport::default()],
        agent: Some(LinuxAgentStatus { open: true, counts: Default::default(), ignored_bytes: 1 }),
        devices: vec![DeviceStatus::default()],
        install_durations: DurationCounts { sum_us: 9, counts: vec![0, 0, 0, 2] },
        ..StatusReport::default()
    };
    status.auto_reclaim.last_scan_ms_ago = Some(1);
    status
}

fn observed(name: &str, status: Option<StatusReport>) -> Observed {
    Observed { name: name.to_owned(), status }
}

/// All names of metrics, with what they are.
fn all() -> BTreeMap<String, About> {
    let families = families(&[observed("a", Some(full()))]);
    families.abouts().map(|about| (about.sample_name(), about.clone())).collect()
}

#[test]
fn a_status_becomes_samples_with_its_name_and_units() {
    let text = families(&[observed("web", Some(full())), observed("hung", None)]).to_text(Format::Prometheus);
    for line in [
        "llfree_vm_up{vm=\"web\"} 1",
        "llfree_vm_up{vm=\"hung\"} 0",
        "llfree_vm_info{vm=\"web\",kind=\"vm\",version=\"1.2.3\",elastic=\"llfree\",backing=\"anon\",\
         enforcement=\"userfaultfd\",on_violation=\"install\"} 1",
        "llfree_vm_memory_limit_bytes{vm=\"web\"} 67108864",
        "llfree_vm_uptime_seconds{vm=\"web\"} 1.500",
        "llfree_vm_installs_total{vm=\"web\"} 7",
        "llfree_vm_vcpus{vm=\"web\"} 3",
        "llfree_vm_vcpu_exits_mmio_total{vm=\"web\"} 9",
        "llfree_vm_disk_reads_total{vm=\"web\",index=\"1\",path=\"a.img\"} 4",
        "llfree_vm_paused{vm=\"web\"} 0",
        "llfree_vm_install_duration_seconds_count{vm=\"web\"} 2",
    ] {
        assert!(text.lines().any(|other| other == line), "{line} in {text}");
    }
    assert_eq!(text.matches("vm=\"hung\"").count(), 1, "nothing is said of one that says nothing");
}

#[test]
fn a_vm_without_vcpus_is_an_area_and_a_name_counts_once() {
    let area = StatusReport::default();
    let text = families(&[observed("a", Some(area)), observed("a", None)]).to_text(Format::Prometheus);
    assert!(text.contains("vm=\"a\",kind=\"area\"") && !text.contains("llfree_vm_up{vm=\"a\"} 0"), "{text}");
}

/// The number of samples does not grow with what a guest does, nor with its vCPUs.
#[test]
fn labels_are_bounded() {
    let count = |vcpus: usize| {
        let status = StatusReport { vcpus: vec![VcpuStatus::default(); vcpus], ..full() };
        families(&[observed("a", Some(status))]).to_text(Format::OpenMetrics).lines().count()
    };
    assert_eq!(count(1), count(1024));
    assert!(count(1) < 600, "{}", count(1));
}

/// What Prometheus' own check of names finds, without it.
#[test]
fn names_are_as_prometheus_wants_them() {
    for (name, About { help, kind, unit, .. }) in all() {
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'), "{name}");
        assert!(help.ends_with('.') && !help.contains("millisecond"), "{name}: {help}");
        assert_eq!(name.ends_with("_total"), kind == Kind::Counter, "{name}");
        let stem = name.trim_end_matches("_total");
        assert_eq!(stem.ends_with("_bytes"), unit == Some("bytes"), "{name}");
        assert_eq!(stem.ends_with("_seconds"), unit == Some("seconds"), "{name}");
        for word in ["ms", "us", "milliseconds", "counter", "gauge", "histogram"] {
            assert!(!name.split('_').any(|part| part == word), "{name}");
        }
        assert!(!["_count", "_sum", "_bucket"].iter().any(|suffix| name.ends_with(suffix)), "{name}");
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The names of metrics in a text.
fn named(text: &str) -> BTreeSet<&str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.match_indices(PREFIX).filter_map(|(at, _)| text[at..].split(|c| !is_name(c)).next()).collect()
}

#[test]
fn the_page_lists_each_metric_with_its_meaning() {
    let page = read("docs/metrics.md");
    let rows: BTreeMap<&str, &str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    let expected: Vec<String> = all()
        .iter()
        .map(|(name, about)| {
            let kind = match about.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Info => "info",
                Kind::Histogram => "histogram",
            };
            format!("| `{name}` | {kind} | {} |", about.help)
        })
        .collect();
    let missing: Vec<_> = expected.iter().filter(|row| !page.lines().any(|line| line.starts_with(*row))).collect();
    assert!(missing.is_empty(), "docs/metrics.md lacks these rows, or has them otherwise:\n{missing:#?}");
    assert_eq!(rows.len(), expected.len(), "docs/metrics.md lists what there is not");
}

#[test]
fn dashboard_and_alerts_name_metrics_that_there_are() {
    let all = all();
    for path in ["ops/grafana/llfree-vmm.json", "ops/prometheus/alerts.yml"] {
        let text = read(path);
        let names = named(&text);
        assert!(!names.is_empty(), "{path}");
        for name in names {
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            assert!(all.contains_key(name) || family.is_some_and(|name| all.contains_key(name)), "{path}: {name}");
        }
    }
}

#[test]
fn the_dashboard_is_json_with_a_query_a_panel() {
    let board: serde_json::Value = serde_json::from_str(&read("ops/grafana/llfree-vmm.json")).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let ids: BTreeSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().expect("a number")).collect();
    assert_eq!(ids.len(), panels.len(), "two panels with one id");
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let targets = panel["targets"].as_array().expect("queries");
        assert!(!targets.is_empty() && targets.iter().all(|target| target["expr"].is_string()), "{}", panel["title"]);
        assert!(panel["gridPos"]["w"].as_u64().is_some_and(|width| width <= 24), "{}", panel["title"]);
    }
}
