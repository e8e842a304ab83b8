//! Reports as text for people. Pure functions: a report in, aligned lines out.
//!
//! Text from a guest or another process is filtered on the way.

use crate::advice::{self, Advice};
use llfree_base::counters::FrameCounts;
use llfree_base::printable;
use llfree_base::units::Bytes;
use llfree_control::report::{
    AutoReclaimReport, DiskStatus, ElasticKind, Enforcement, GuestOutcome, GuestReport, GuestSays, GuestStatsReport,
    LifeReport, LinuxAgentStatus, NetReport, ReclaimReport, ResizeReport, SampleReport, StatusReport, ValidateReport,
    VmState,
};
use std::fmt::Write;

mod elastic;
mod watch;
mod words;

pub use watch::{in_place, list, rates, terminal_size};
pub use words::micros;
use words::{Row, is_none, listed, millis, plural, word};

/// Rows of a label and a value, the values under each other.
fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0) + 2;
    rows.iter().map(|(label, value)| format!("{label:<width$}{value}\n")).collect()
}

fn uptime(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{}.{} s", seconds, ms % 1000 / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.0} %", part as f64 / whole as f64 * 100.0) }
}

/// What `shrink` and `grow` print.
#[must_use]
pub fn resize(verb: &str, report: &ResizeReport, advice: Option<Advice>) -> String {
    let state = if report.complete { "complete" } else { "partial" };
    let speed = match report.huge_frames {
        0 => String::new(),
        frames => format!(", {:.2} us per frame", report.duration_us as f64 / frames as f64),
    };
    let waited = match report.waited_us {
        // Too short for people to have waited for anything.
        0..100_000 => String::new(),
        waited => format!(", after waiting {} for the guest", micros(waited)),
    };
    let mut rows = vec![
        (verb, format!("{state} in {}{speed}{waited}", micros(report.duration_us))),
        ("target", Bytes(report.target_bytes).to_string()),
        ("actual", Bytes(report.actual_bytes).to_string()),
        ("frames", format!("{} of 2 MiB", report.huge_frames)),
        ("freed on host", Bytes(report.freed_bytes).to_string()),
        ("reclaimable now", size_or_unknown(report.reclaimable_now_bytes)),
    ];
    if let Some(shortfall) = &report.shortfall {
        rows.push(("in use", size_or_unknown(shortfall.in_use_bytes)));
        // A guest without a table of ours never says that.
        if let Some(fragmented) = shortfall.fragmented_bytes {
            rows.push(("fragmented", Bytes(fragmented).to_string()));
        }
        rows.push(("why", advice::join(printable(&shortfall.wording), advice)));
    }
    if report.pursued {
        rows.push(("then", "the VM goes on until the target is reached or replaced; status shows it".to_owned()));
    }
    table(&rows)
}

fn size_or_unknown(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unknown".to_owned(), |bytes| Bytes(bytes).to_string())
}

/// What `reclaim` prints.
#[must_use]
pub fn reclaim(report: &ReclaimReport) -> String {
    table(&[
        ("reclaim", format!("{} of 2 MiB in {}", plural(report.huge_frames, "frame"), micros(report.duration_us))),
        ("freed on host", Bytes(report.freed_bytes).to_string()),
    ])
}

/// What `auto-reclaim` prints, and a line of `status`.
#[must_use]
pub fn auto_reclaim(report: &AutoReclaimReport) -> String {
    table(&[("auto-reclaim", auto_reclaim_line(report))])
}

fn auto_reclaim_line(report: &AutoReclaimReport) -> String {
    let evicted = format!("{} taken back in {}", Bytes(report.evicted_bytes), plural(report.scans, "scan"));
    let Some(settings) = report.settings.as_deref().filter(|_| report.on) else {
        return if report.scans > 0 { format!("off; {evicted}") } else { "off".to_owned() };
    };
    let last = report.last_scan_ms_ago.map_or_else(String::new, |ms| {
        let back_off = match report.back_off_bytes {
            0 => String::new(),
            bytes => format!(", {} of it for recent installs", Bytes(bytes)),
        };
        let (free, headroom) = (Bytes(report.free_bytes), Bytes(report.headroom_bytes));
        format!("; {} ago {free} free but backed, headroom {headroom}{back_off}", micros(ms.saturating_mul(1000)))
    });
    format!("on, {}; {evicted}{last}", printable(settings))
}

/// What `pause` and `resume` print.
#[must_use]
pub fn life(report: &LifeReport) -> String {
    let took = micros(report.duration_us);
    let paused = report.paused_ms.map(millis).unwrap_or_default();
    match (report.state.known(), report.changed) {
        (Some(VmState::Paused), true) => format!("paused in {took}\n"),
        (Some(VmState::Paused), false) => format!("already paused, for {paused}\n"),
        (Some(VmState::Running), true) => format!("running again in {took}, after {paused}\n"),
        (Some(VmState::Running), false) => "already running\n".to_owned(),
        (None, _) => format!("{}\n", printable(&report.state.to_string())),
    }
}

/// What `validate` prints.
#[must_use]
pub fn validate(report: &ValidateReport) -> String {
    let state = match report.findings.len() {
        0 => "clean".to_owned(),
        1 => "1 FINDING".to_owned(),
        n => format!("{n} FINDINGS"),
    };
    let mut rows = vec![
        ("validate", format!("{state}, {} huge frames in {}", report.huge_frames, micros(report.duration_us))),
        ("host's view", format!("{} installed, {} evicted, {} held", report.installed, report.evicted, report.held)),
    ];
    for finding in &report.findings {
        let blame = if finding.guest_can_cause { "" } else { "; THE HOST'S FAULT" };
        let frames = match &finding.first_frames[..] {
            [] => String::new(),
            some => {
                let more = if finding.count > some.len() as u64 { " ..." } else { "" };
                let numbers: Vec<String> = some.iter().map(u32::to_string).collect();
                format!(": {}{more}", numbers.join(", "))
            }
        };
        rows.push(("finding", format!("{} {}{frames}{blame}", finding.count, printable(&finding.wording))));
    }
    table(&rows)
}

/// What `guest` prints; `verb` says what was asked.
#[must_use]
pub fn guest(verb: &str, report: &GuestReport) -> String {
    let outcome = match report.outcome.known() {
        Some(GuestOutcome::Ok) => "ok",
        Some(GuestOutcome::FellShort) => "the guest held less than that",
        Some(GuestOutcome::OutOfMemory) => "out of memory",
        Some(GuestOutcome::InstallFailed) => "the host refused memory",
        Some(GuestOutcome::Corrupt) => "WRONG DATA",
        Some(GuestOutcome::Unknown) => "the guest does not know that command",
        None => &word(&report.outcome),
    };
    let mut rows = vec![(verb, format!("{outcome}, {}", micros(report.duration_us)))];
    if report.blocks > 0 || report.bytes > 0 {
        rows.push(("done", format!("{} in {}", Bytes(report.bytes), plural(report.blocks, "block"))));
    }
    if let Some(samples) = &report.samples {
        rows.extend(sample_rows(samples));
    }
    rows.push(("holds", format!("{} in {}", Bytes(report.held_bytes), plural(report.held_blocks, "block"))));
    if report.mismatches > 0 {
        rows.push(("wrong pages", report.mismatches.to_string()));
    }
    if let Some(bad) = report.first_bad {
        let text = format!("{:#x}: expected {:#018x}, found {:#018x}", bad.address, bad.expected, bad.found);
        rows.push(("first wrong page", text));
    }
    rows.push((
        "free",
        format!("{}, {} of it in whole 2 MiB frames", Bytes(report.free_bytes), Bytes(report.free_huge_bytes)),
    ));
    rows.push((
        "since boot",
        format!(
            "{}, {}, {}, {} requested ahead",
            plural(report.allocs, "alloc"),
            plural(report.frees, "free"),
            plural(report.install_calls, "install call"),
            plural(report.ahead_frames, "frame")
        ),
    ));
    table(&rows)
}

fn sample_rows(s: &SampleReport) -> Vec<Row> {
    if s.count == 0 {
        return vec![("samples", "none: the guest has no clock, or nothing to measure".to_owned())];
    }
    let unit = word(&s.unit);
    let mut rows = vec![
        ("samples", format!("{}, mean {} {unit}, least {}, most {}", s.count, s.mean, s.min, s.max)),
        ("percentiles", format!("1 %: {}, 50 %: {}, 99 %: {}, 99.9 %: {}", s.p1, s.p50, s.p99, s.p999)),
    ];
    if s.beside_ns > 0 {
        rows.push(("time between", micros(s.beside_ns / 1000)));
    }
    rows
}

/// What `status` prints.
#[must_use]
pub fn status(report: &StatusReport) -> String {
    let mut rows = vec![("state", state(report))];
    rows.extend(memory_rows(report));
    rows.extend(upkeep_rows(report));
    rows.extend(install_rows(report));
    rows.extend(elastic::rows(&report.elastic));
    rows.extend(device_rows(report));
    if report.corrupt_entries > 0 || report.doorbell.bad_calls > 0 {
        let calls = format!("table entries, {} refused calls", report.doorbell.bad_calls);
        rows.push(("malformed requests", counted(report.corrupt_entries, &calls)));
    }
    let mut text = format!("{}  pid {}, up {}\n", printable(&report.name), report.pid, uptime(report.uptime_ms));
    text.push_str(&table(&rows));
    if !report.vcpus.is_empty() {
        text.push_str(&vcpus(report));
    }
    text
}

fn state(report: &StatusReport) -> String {
    match report.state.known() {
        Some(VmState::Running) => "running".to_owned(),
        Some(VmState::Paused) => format!("PAUSED for {}", millis(report.paused_ms.unwrap_or_default())),
        None => printable(&report.state.to_string()),
    }
}

/// A size, and what it is.
fn sized(bytes: u64, note: &str) -> String {
    format!("{:>10}  {note}", Bytes(bytes).to_string()).trim_end().to_owned()
}

/// A number, and what it is.
fn counted(count: u64, note: &str) -> String {
    format!("{count:>10}  {note}").trim_end().to_owned()
}

/// How much memory each party has.
fn memory_rows(report: &StatusReport) -> Vec<Row> {
    let huge = percent(report.huge_page_bytes, report.resident_bytes);
    let resident = format!("by the host kernel's accounting; {huge} of it in huge pages");
    let mut rows = vec![
        ("memory", sized(report.memory_bytes, &format!("backing {}", word(&report.backing)))),
        ("limit", sized(report.limit_bytes, "the most the guest may hold")),
        ("resident", sized(report.resident_bytes, &resident)),
        ("cost", sized(report.cost_bytes, &cost_parts(report))),
    ];
    if report.installed_bytes > 0 {
        rows.push(("installed", sized(report.installed_bytes, "backed by memory")));
        rows.push(("evicted", sized(report.evicted_bytes, "free in the guest, not backed")));
    }
    rows.push(("held", sized(report.held_bytes, "taken by shrinks")));
    rows.extend(said_rows(report));
    if let Some(target) = report.target_bytes {
        let (left, age) = (target.abs_diff(report.limit_bytes), millis(report.target_age_ms.unwrap_or_default()));
        rows.push(("target", sized(target, &format!("{} to go; pursued for {age}", Bytes(left)))));
    } else if report.wanted_bytes > 0 {
        rows.push(("wanted", sized(report.wanted_bytes, "requested of the guest until the next resize")));
    }
    rows
}

/// What the cost is made of, beside the guest's memory.
fn cost_parts(report: &StatusReport) -> String {
    let (pool, vmm) = (Bytes(report.install_pool.resident_bytes), Bytes(report.vmm_overhead_bytes));
    format!("with {pool} of install pool, {vmm} of VMM, {} of page tables", Bytes(report.page_table_bytes))
}

/// The guest's own account of its memory.
fn said_rows(report: &StatusReport) -> Vec<Row> {
    let stats = report.elastic.balloon.as_ref().and_then(|balloon| balloon.guest.as_ref());
    let said = |bytes: Option<u64>, note: &str| match bytes {
        Some(bytes) => sized(bytes, note),
        None => format!("{:>10}  {}", "unknown", not_said(report, stats)).trim_end().to_owned(),
    };
    let by = match (report.guest_says.known(), stats) {
        (Some(GuestSays::Statistics), Some(stats)) => format!("by its own account, {} ago", millis(stats.age_ms)),
        _ => "by its own account".to_owned(),
    };
    let mut rows = vec![
        ("guest uses", said(report.guest_used_bytes, &by)),
        ("guest has free", said(report.guest_free_bytes, &by)),
    ];
    // Nothing is taken from a VM without a way to take it.
    if !is_none(&report.elastic) {
        let note = match report.guest_says.known() {
            Some(GuestSays::Table) => "a shrink could take it now".to_owned(),
            _ => format!("a shrink could take it, {by}"),
        };
        rows.push(("reclaimable", said(report.reclaimable_now_bytes, &note)));
    }
    rows
}

/// The VMM's automatic work and its own memory.
fn upkeep_rows(report: &StatusReport) -> Vec<Row> {
    let mut rows = Vec::new();
    if report.auto_reclaim.on || report.auto_reclaim.scans > 0 {
        rows.push(("auto-reclaim", auto_reclaim_line(&report.auto_reclaim)));
    }
    if let Some(cgroup) = &report.cgroup {
        let note = format!("of {} in use, in {}", Bytes(cgroup.memory_max_bytes), printable(&cgroup.path));
        rows.push(("cgroup", sized(cgroup.memory_current_bytes, &note)));
    }
    rows
}

/// Installs and violations, which exist only where the VMM tracks the memory.
fn install_rows(report: &StatusReport) -> Vec<Row> {
    if report.installed_bytes == 0 {
        return Vec::new();
    }
    let failed = match report.monitor.install_failures {
        0 => String::new(),
        failures => format!("{failures} failed"),
    };
    let mut rows = vec![("installs", counted(report.monitor.installs, &failed))];
    let pool = report.install_pool;
    if pool.size_bytes > 0 {
        let note = format!("of at most {} ready for installs, {} taken", Bytes(pool.size_bytes), pool.counts.hits);
        rows.push(("install pool", sized(pool.resident_bytes, &note)));
    }
    rows.push(("violations", counted(report.monitor.violations, &violations(report))));
    rows
}

/// Disks, networks, the agent, and devices whose driver erred.
fn device_rows(report: &StatusReport) -> Vec<Row> {
    let disks = report.disks.iter().map(|disk| ("disk", disk_line(disk)));
    let nets = report.nets.iter().map(|net| ("network", net_line(net)));
    let agent = report.agent.iter().map(|agent| ("agent", agent_line(agent)));
    let erred = report.devices.iter().filter(|device| device.counts.errors > 0);
    let devices = erred.map(|device| {
        ("device", format!("{}: {}", printable(&device.name), plural(device.counts.errors, "driver error")))
    });
    disks.chain(nets).chain(agent).chain(devices).collect()
}

fn violations(report: &StatusReport) -> String {
    let seen = match report.enforcement.known() {
        Some(Enforcement::Userfaultfd) => format!("caught in the act, policy {}", word(&report.on_violation)),
        Some(Enforcement::Audit | Enforcement::None) | None => "found afterwards, not prevented".to_owned(),
    };
    match report.monitor.held_violations {
        0 => seen,
        held => format!("{held} of held frames; {seen}"),
    }
}

fn disk_line(disk: &DiskStatus) -> String {
    let read_only = if disk.read_only { ", read-only" } else { "" };
    format!("{}, {}{read_only}{}", printable(&disk.path), Bytes(disk.size_bytes), listed(&disk.counts))
}

fn net_line(net: &NetReport) -> String {
    let way = |counts: &FrameCounts| {
        let lost = match counts.dropped.saturating_add(counts.errors) {
            0 => String::new(),
            lost => format!(" ({lost} lost)"),
        };
        format!("{} in {}{lost}", Bytes(counts.bytes), plural(counts.frames, "frame"))
    };
    let (tap, mac) = (printable(&net.tap), printable(&net.mac));
    format!("{tap}, {mac}: {} to the guest, {} from it", way(&net.traffic.to_guest), way(&net.traffic.from_guest))
}

fn agent_line(agent: &LinuxAgentStatus) -> String {
    format!("{}{}", if agent.open { "up" } else { "not up" }, listed(&agent.counts))
}

/// Why a number that the guest should say is unknown.
fn not_said(report: &StatusReport, stats: Option<&GuestStatsReport>) -> String {
    match stats {
        Some(stats) if stats.stale => format!("the guest's last report is {} old", millis(stats.age_ms)),
        _ if report.elastic.driven || is_none(&report.elastic) => "the guest does not report it".to_owned(),
        _ if report.elastic.kind == ElasticKind::Undecided => "the guest's kernel has said nothing yet".to_owned(),
        _ => "the guest has no driver for its device yet".to_owned(),
    }
}

fn vcpus(report: &StatusReport) -> String {
    let mut text =
        format!("{:<6}{:<12}{:>12}{:>12}{:>12}{:>12}\n", "vCPU", "state", "calls", "MMIO exits", "PIO exits", "other");
    for vcpu in &report.vcpus {
        let exits = vcpu.exits;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:<6}{:<12}{:>12}{:>12}{:>12}{:>12}",
            vcpu.index,
            word(&vcpu.state),
            vcpu.counts.calls,
            exits.mmio,
            exits.pio,
            exits.other
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_control::report::{BalloonStatus, ChosenBy, ElasticStatus, HandOver, TableStatus};

    fn line<'a>(text: &'a str, label: &str) -> &'a str {
        text.lines().find(|line| line.starts_with(label)).unwrap_or_else(|| panic!("no {label} in\n{text}"))
    }

    #[test]
    fn a_list_has_a_sum_if_there_is_something_to_add() {
        let vm = |mib: u64| StatusReport {
            memory_bytes: 64 << 20,
            limit_bytes: 32 << 20,
            resident_bytes: mib << 20,
            cost_bytes: (mib + 5) << 20,
            ..StatusReport::default()
        };
        let mut vms = vec![("a".to_owned(), Ok(vm(2))), ("b".to_owned(), Err("it hangs".to_owned()))];
        assert!(!list(&vms, &[]).contains("total"), "{}", list(&vms, &[]));
        vms.push(("c".to_owned(), Ok(vm(8))));
        let text = list(&vms, &[]);
        let words: Vec<&str> = line(&text, "total").split_whitespace().collect();
        assert_eq!(words, ["total", "2", "128", "MiB", "64", "MiB", "10", "MiB", "20", "MiB"], "{text}");
        let ends = |label: &str, word: &str| line(&text, label).find(word).map(|at| at + word.len());
        assert_eq!(ends("name", "cost"), ends("total", "20 MiB"), "{text}");
    }

    fn linux(guest: Option<GuestStatsReport>) -> StatusReport {
        let balloon = BalloonStatus { guest, ..BalloonStatus::default() };
        let elastic = ElasticStatus {
            kind: ElasticKind::Balloon.into(),
            driven: true,
            balloon: Some(balloon),
            ..ElasticStatus::default()
        };
        StatusReport { guest_says: GuestSays::Nowhere.into(), elastic, ..StatusReport::default() }
    }

    #[test]
    fn one_thing_is_not_many() {
        assert_eq!(
            (plural(0, "block"), plural(1, "block"), plural(2, "block")),
            ("0 blocks".to_owned(), "1 block".to_owned(), "2 blocks".to_owned())
        );
        let report = ReclaimReport { huge_frames: 1, ..ReclaimReport::default() };
        assert!(reclaim(&report).contains("1 frame of 2 MiB in"), "{}", reclaim(&report));
    }

    #[test]
    fn a_guests_own_view_has_its_age() {
        let guest = GuestStatsReport {
            age_ms: 1500,
            free_bytes: Some(3 << 30),
            total_bytes: Some(4 << 30),
            ..GuestStatsReport::default()
        };
        let report = StatusReport {
            guest_says: GuestSays::Statistics.into(),
            guest_used_bytes: Some(1 << 30),
            guest_free_bytes: Some(3 << 30),
            ..linux(Some(guest))
        };
        let text = status(&report);
        assert!(line(&text, "guest uses").ends_with("1 GiB  by its own account, 1.50 s ago"), "{text}");
        assert!(line(&text, "guest says").ends_with("3 GiB free, 4 GiB in total; 1.50 s ago"), "{text}");
    }

    #[test]
    fn a_guest_with_an_allocator_of_its_own_says_how_far_it_is() {
        let with = |driven, hand_over: HandOver| {
            let table = Some(TableStatus { hand_over: hand_over.into(), ..TableStatus::default() });
            let elastic = ElasticStatus { driven, table, ..ElasticStatus::default() };
            let text = status(&StatusReport { elastic, ..StatusReport::default() });
            line(&text, "guest says").to_owned()
        };
        assert!(with(false, HandOver::Booting).contains("still booting"));
        assert!(with(true, HandOver::ByTouch).contains("comes by touch, as the host had no memory for it"));
        assert!(with(true, HandOver::Complete).ends_with("to be left free"));
    }

    #[test]
    fn what_moves_memory_is_said_with_its_reason_if_the_guest_gave_one() {
        let with = |kind: ElasticKind, chosen_by: ChosenBy, driven| {
            let elastic =
                ElasticStatus { kind: kind.into(), chosen_by: chosen_by.into(), driven, ..ElasticStatus::default() };
            status(&StatusReport { elastic, ..StatusReport::default() })
        };
        let said = |kind, by, driven| line(&with(kind, by, driven), "elastic").to_owned();
        assert!(
            said(ElasticKind::Llfree, ChosenBy::Hello, true).contains("llfree: the guest's kernel said that it shares")
        );
        let balloon = said(ElasticKind::Balloon, ChosenBy::Driver, true);
        assert!(balloon.contains("balloon: the guest has a driver") && !balloon.contains("no driver"), "{balloon}");
        assert!(said(ElasticKind::Balloon, ChosenBy::Driver, false).contains("no driver in the guest"), "by now");
        let open = said(ElasticKind::Undecided, ChosenBy::Nobody, false);
        assert!(open.contains("undecided: llfree if") && !open.contains("no driver"), "{open}");
        let chosen = with(ElasticKind::Llfree, ChosenBy::Launch, true);
        assert!(!chosen.contains("elastic"), "as it was told: {chosen}");
    }

    #[test]
    fn what_a_guest_did_not_say_is_unknown_and_never_zero() {
        let text = status(&linux(None));
        assert!(line(&text, "guest uses").ends_with("unknown  the guest does not report it"), "{text}");
        assert!(line(&text, "reclaimable").contains("unknown"), "{text}");
        let stale =
            GuestStatsReport { age_ms: 60_000, stale: true, free_bytes: Some(7), ..GuestStatsReport::default() };
        let text = status(&linux(Some(stale)));
        assert!(line(&text, "guest has free").ends_with("unknown  the guest's last report is 60.00 s old"), "{text}");
        assert!(line(&text, "guest says").contains("out of date"), "{text}");
        let mut report = linux(None);
        report.elastic.driven = false;
        assert!(line(&status(&report), "guest uses").contains("no driver for its device yet"));
        let text = resize("shrink", &ResizeReport::default(), None);
        assert!(line(&text, "reclaimable now").ends_with("unknown"), "{text}");
    }
}
