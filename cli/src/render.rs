//! Reports as text for people. Pure functions: a report in, aligned lines out.
//!
//! What a guest or another process wrote is filtered on the way.

use llfree_base::printable;
use llfree_base::units::Bytes;
use llfree_control::report::FrameCounts;
use llfree_control::report::LinuxAgentStatus;
use llfree_control::report::{
    AutoReclaimReport, DiskStatus, ElasticStatus, GuestOutcome, GuestReport, GuestSays, GuestStatsReport, LifeReport,
    NetReport, ReclaimReport, ResizeReport, SampleReport, StatusReport, ValidateReport, VmState,
};
use std::fmt::Write;

/// Rows of a label and a value, the values under each other.
fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0) + 2;
    rows.iter().map(|(label, value)| format!("{label:<width$}{value}\n")).collect()
}

/// A time in a readable unit, from microseconds.
#[must_use]
pub fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
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
pub fn resize(verb: &str, report: &ResizeReport) -> String {
    let state = if report.complete { "complete" } else { "partial" };
    let speed = match report.huge_frames {
        0 => String::new(),
        frames => format!(", {:.2} us a frame", report.duration_us as f64 / frames as f64),
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
        rows.push(("why", printable(&shortfall.wording)));
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
        ("reclaim", format!("{} frames of 2 MiB in {}", report.huge_frames, micros(report.duration_us))),
        ("freed on host", Bytes(report.freed_bytes).to_string()),
    ])
}

/// What `auto-reclaim` prints, and a line of `status`.
#[must_use]
pub fn auto_reclaim(report: &AutoReclaimReport) -> String {
    table(&[("auto-reclaim", auto_reclaim_line(report))])
}

fn auto_reclaim_line(report: &AutoReclaimReport) -> String {
    let evicted = format!("{} taken back in {} scans", Bytes(report.evicted_bytes), report.scans);
    let Some(settings) = report.settings.as_deref().filter(|_| report.on) else {
        return if report.scans > 0 { format!("off; {evicted}") } else { "off".to_owned() };
    };
    let last = report.last_scan_ms_ago.map_or_else(String::new, |ms| {
        let back_off = match report.back_off_bytes {
            0 => String::new(),
            bytes => format!(", {} of it for recent installs", Bytes(bytes)),
        };
        let (free, headroom) = (Bytes(report.free_bytes), Bytes(report.headroom_bytes));
        format!("; {} ago {free} free with memory, headroom {headroom}{back_off}", micros(ms.saturating_mul(1000)))
    });
    format!("on, {}; {evicted}{last}", printable(settings))
}

/// What `pause` and `resume` print.
#[must_use]
pub fn life(report: &LifeReport) -> String {
    let took = micros(report.duration_us);
    let paused = report.paused_ms.map(millis).unwrap_or_default();
    match (report.state, report.changed) {
        (VmState::Paused, true) => format!("paused in {took}\n"),
        (VmState::Paused, false) => format!("paused already, for {paused}\n"),
        (VmState::Running, true) => format!("running again in {took}, after {paused}\n"),
        (VmState::Running, false) => "running already\n".to_owned(),
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
        ("by the host", format!("{} installed, {} evicted, {} held", report.installed, report.evicted, report.held)),
    ];
    for finding in &report.findings {
        let blame = if finding.guest_can_cause { "" } else { "; A FAULT OF THE HOST" };
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
    let outcome = match report.outcome {
        GuestOutcome::Ok => "ok",
        GuestOutcome::FellShort => "the guest held less than that",
        GuestOutcome::OutOfMemory => "out of memory",
        GuestOutcome::InstallFailed => "the host refused memory",
        GuestOutcome::Corrupt => "WRONG DATA",
        GuestOutcome::Unknown => "the guest does not know that",
    };
    let mut rows = vec![(verb, format!("{outcome}, {}", micros(report.duration_us)))];
    if report.blocks > 0 || report.bytes > 0 {
        rows.push(("done", format!("{} in {} blocks", Bytes(report.bytes), report.blocks)));
    }
    if let Some(samples) = &report.samples {
        rows.extend(sample_rows(samples));
    }
    rows.push(("holds", format!("{} in {} blocks", Bytes(report.held_bytes), report.held_blocks)));
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
            "{} allocs, {} frees, {} install calls, {} frames asked ahead",
            report.allocs, report.frees, report.install_calls, report.ahead_frames
        ),
    ));
    table(&rows)
}

fn sample_rows(s: &SampleReport) -> Vec<(&'static str, String)> {
    if s.count == 0 {
        return vec![("samples", "none: the guest has no clock, or nothing to measure".to_owned())];
    }
    let unit = printable(&s.unit);
    let mut rows = vec![
        ("samples", format!("{}, mean {} {unit}, least {}, most {}", s.count, s.mean, s.min, s.max)),
        ("percentiles", format!("1 %: {}, 50 %: {}, 99 %: {}, 99.9 %: {}", s.p1, s.p50, s.p99, s.p999)),
    ];
    if s.beside_ns > 0 {
        rows.push(("beside them", micros(s.beside_ns / 1000)));
    }
    rows
}

/// What `status` prints.
#[must_use]
pub fn status(report: &StatusReport) -> String {
    let memory = |bytes: u64, note: &str| format!("{:>10}  {note}", Bytes(bytes).to_string()).trim_end().to_owned();
    let count = |count: u64, note: String| format!("{count:>10}  {note}").trim_end().to_owned();
    let huge = format!("{} of it in huge pages", percent(report.huge_page_bytes, report.resident_bytes));
    let failed = |what: u64, word: &str| if what == 0 { String::new() } else { format!("{what} {word}") };
    let stats = report.elastic.balloon.as_ref().and_then(|balloon| balloon.guest.as_ref());
    let said = |bytes: Option<u64>, note: &str| match bytes {
        Some(bytes) => memory(bytes, note),
        None => format!("{:>10}  {}", "unknown", not_said(report, stats)).trim_end().to_owned(),
    };
    let by = match (report.guest_says, stats) {
        (GuestSays::Statistics, Some(stats)) => format!("by its own words, {} ago", millis(stats.age_ms)),
        _ => "by its own words".to_owned(),
    };
    let mut rows = vec![
        ("state", state(report)),
        ("memory", memory(report.memory_bytes, &format!("backing {}", printable(&report.backing)))),
        ("limit", memory(report.limit_bytes, "the guest may hold this much")),
        ("resident", memory(report.resident_bytes, &format!("by the host kernel's accounting; {huge}"))),
        ("held", memory(report.held_bytes, "taken by shrinks")),
        ("guest uses", said(report.guest_used_bytes, &by)),
        ("guest has free", said(report.guest_free_bytes, &by)),
    ];
    // Nothing is taken from a VM without a way to take it.
    if report.elastic.kind != "none" {
        let note = match report.guest_says {
            GuestSays::Table => "a shrink could take it now".to_owned(),
            _ => format!("a shrink could take it, {by}"),
        };
        rows.push(("reclaimable", said(report.reclaimable_now_bytes, &note)));
    }
    let tracked = report.installed_bytes > 0;
    if tracked {
        let installed = [
            ("installed", memory(report.installed_bytes, "has memory behind it")),
            ("evicted", memory(report.evicted_bytes, "free for the guest, nothing behind it")),
        ];
        rows.splice(4..4, installed);
    }
    if report.wanted_bytes > 0 {
        rows.push(("wanted", memory(report.wanted_bytes, "asked of the guest until the next resize")));
    }
    if report.auto_reclaim.on || report.auto_reclaim.scans > 0 {
        rows.push(("auto-reclaim", auto_reclaim_line(&report.auto_reclaim)));
    }
    rows.push(("VMM overhead", memory(report.vmm_overhead_bytes, "resident, without guest memory and pool")));
    if let Some(cgroup) = &report.cgroup {
        let note = format!("in use of {} in {}", Bytes(cgroup.memory_max_bytes), printable(&cgroup.path));
        rows.push(("cgroup", memory(cgroup.memory_current_bytes, &note)));
    }
    if tracked {
        rows.push(("installs", count(report.installs, failed(report.install_failures, "failed"))));
        let pool = report.install_pool;
        if pool.size_bytes > 0 {
            let note = format!("of {} ready for installs, {} came from it", Bytes(pool.size_bytes), pool.hits);
            rows.push(("install pool", memory(pool.resident_bytes, &note)));
        }
        rows.push(("violations", count(report.violations, violations(report))));
    }
    rows.extend(elastic(&report.elastic));
    rows.extend(report.disks.iter().map(|disk| ("disk", disk_line(disk))));
    rows.extend(report.nets.iter().map(|net| ("network", net_line(net))));
    rows.extend(report.agent.map(|agent| ("agent", agent_line(&agent))));
    rows.extend(driver_errors(report));
    if report.corrupt_entries > 0 || report.bad_calls > 0 {
        rows.push((
            "nonsense",
            count(report.corrupt_entries, format!("table entries, {} refused calls", report.bad_calls)),
        ));
    }
    let mut text = format!("{}  pid {}, up {}\n", printable(&report.name), report.pid, uptime(report.uptime_ms));
    text.push_str(&table(&rows));
    if !report.vcpus.is_empty() {
        text.push_str(&vcpus(report));
    }
    text
}

fn state(report: &StatusReport) -> String {
    match report.state {
        VmState::Running => "running".to_owned(),
        VmState::Paused => format!("PAUSED for {}", millis(report.paused_ms.unwrap_or_default())),
    }
}

fn driver_errors(report: &StatusReport) -> impl Iterator<Item = (&'static str, String)> {
    let erred = report.devices.iter().filter(|device| device.errors > 0);
    erred.map(|device| ("device", format!("{}: {} errors of its driver", printable(&device.name), device.errors)))
}

fn violations(report: &StatusReport) -> String {
    let seen = match report.enforcement.as_str() {
        "userfaultfd" => format!("seen in the act, policy {}", printable(&report.on_violation)),
        _ => "found afterwards, not prevented".to_owned(),
    };
    if report.held_violations > 0 { format!("{} of held frames; {seen}", report.held_violations) } else { seen }
}

/// What is known of the device by which memory comes and goes; nothing without one.
fn elastic(report: &ElasticStatus) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let size = |bytes: u64| Bytes(bytes).to_string();
    let driver = if report.driven || report.kind == "none" { "" } else { ", without a driver in the guest" };
    let errors = match report.device_errors {
        0 => String::new(),
        errors => format!(", {errors} errors of its driver"),
    };
    if report.balloon.is_some() || report.mem.is_some() || report.kind == "none" {
        rows.push(("elastic", format!("{}{driver}{errors}", printable(&report.kind))));
    }
    if let Some(b) = &report.balloon {
        let bad = b.bad_pages.saturating_add(b.repeated_pages);
        let bad = if bad == 0 { String::new() } else { format!(", {bad} wrong page numbers") };
        rows.push(("balloon", format!("{} of {}{bad}", size(b.inflated_bytes), size(b.target_bytes))));
        let reported =
            if b.reported_bytes == 0 { String::new() } else { format!(", {} of it reported", size(b.reported_bytes)) };
        rows.push(("discarded", format!("{} in {} calls{reported}", size(b.discarded_bytes), b.discards)));
        if let Some(guest) = &b.guest {
            rows.push(("guest says", guest_says(guest)));
        }
    }
    if let Some(m) = &report.mem {
        let refused =
            if m.refused_requests == 0 { String::new() } else { format!(", {} requests refused", m.refused_requests) };
        let of = format!(
            "{} plugged, {} requested, behind {}",
            size(m.plugged_bytes),
            size(m.requested_bytes),
            size(m.boot_bytes)
        );
        rows.push(("blocks", of + &refused));
    }
    rows
}

fn disk_line(disk: &DiskStatus) -> String {
    let mut line = format!("{}, {}", printable(&disk.path), Bytes(disk.size_bytes));
    let some = |line: &mut String, what: u64, text: String| line.push_str(if what == 0 { "" } else { &text });
    some(&mut line, u64::from(disk.read_only), ", read-only".to_owned());
    some(&mut line, disk.read_bytes, format!(", {} read", Bytes(disk.read_bytes)));
    some(&mut line, disk.written_bytes, format!(", {} written", Bytes(disk.written_bytes)));
    some(&mut line, disk.cleared_bytes, format!(", {} discarded", Bytes(disk.cleared_bytes)));
    some(&mut line, disk.io_errors, format!(", {} I/O errors", disk.io_errors));
    some(&mut line, disk.refused_requests, format!(", {} requests refused", disk.refused_requests));
    line
}

fn net_line(net: &NetReport) -> String {
    let way = |counts: &FrameCounts| {
        let lost = match counts.dropped.saturating_add(counts.errors) {
            0 => String::new(),
            lost => format!(" ({lost} lost)"),
        };
        format!("{} in {} frames{lost}", Bytes(counts.bytes), counts.frames)
    };
    let (tap, mac) = (printable(&net.tap), printable(&net.mac));
    format!("{tap}, {mac}: {} to the guest, {} from it", way(&net.traffic.to_guest), way(&net.traffic.from_guest))
}

fn agent_line(agent: &LinuxAgentStatus) -> String {
    let nonsense = match agent.garbage_frames {
        0 => String::new(),
        frames => format!(", {frames} messages made no sense"),
    };
    format!("{}{nonsense}", if agent.open { "up" } else { "not up" })
}

/// Why a number that the guest should say is unknown.
fn not_said(report: &StatusReport, stats: Option<&GuestStatsReport>) -> String {
    match stats {
        Some(stats) if stats.stale => format!("the guest's last words are {} old", millis(stats.age_ms)),
        _ if report.elastic.driven || report.elastic.kind == "none" => "the guest does not say so".to_owned(),
        _ => "the guest has no driver for its device yet".to_owned(),
    }
}

/// A guest's statistics: what it says of them.
fn guest_says(guest: &GuestStatsReport) -> String {
    let said = [
        (guest.free_bytes, "free"),
        (guest.available_bytes, "available"),
        (guest.cache_bytes, "in caches"),
        (guest.total_bytes, "in all"),
    ];
    let said: Vec<String> =
        said.into_iter().filter_map(|(bytes, what)| Some(format!("{} {what}", Bytes(bytes?)))).collect();
    let said = if said.is_empty() { "nothing".to_owned() } else { said.join(", ") };
    let stale = if guest.stale { ": too old to be true now" } else { "" };
    format!("{said}; {} ago{stale}", millis(guest.age_ms))
}

fn millis(ms: u64) -> String {
    micros(ms.saturating_mul(1000))
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
            printable(&vcpu.state),
            vcpu.calls,
            exits.mmio,
            exits.pio,
            exits.other
        );
    }
    text
}

/// What `list` prints: one line a VM, or why there is none for it.
#[must_use]
pub fn list(vms: &[(String, Result<StatusReport, String>)]) -> String {
    if vms.is_empty() {
        return "no VM is running\n".to_owned();
    }
    let name_width = vms.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(4) + 2;
    let mut text =
        format!("{:<name_width$}{:>8}{:>12}{:>12}{:>12}{:>12}\n", "name", "pid", "memory", "limit", "resident", "up");
    for (name, status) in vms {
        let line = match status {
            Ok(status) => format!(
                "{:>8}{:>12}{:>12}{:>12}{:>12}",
                status.pid,
                Bytes(status.memory_bytes),
                Bytes(status.limit_bytes),
                Bytes(status.resident_bytes),
                uptime(status.uptime_ms)
            ),
            Err(why) => format!("    {}", printable(why)),
        };
        let _ = writeln!(text, "{name:<name_width$}{line}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_control::report::BalloonStatus;

    fn line<'a>(text: &'a str, label: &str) -> &'a str {
        text.lines().find(|line| line.starts_with(label)).unwrap_or_else(|| panic!("no {label} in\n{text}"))
    }

    fn linux(guest: Option<GuestStatsReport>) -> StatusReport {
        let balloon = BalloonStatus { guest, ..BalloonStatus::default() };
        let elastic = ElasticStatus {
            kind: "balloon".to_owned(),
            driven: true,
            balloon: Some(balloon),
            ..ElasticStatus::default()
        };
        StatusReport { guest_says: GuestSays::Nowhere, elastic, ..StatusReport::default() }
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
            guest_says: GuestSays::Statistics,
            guest_used_bytes: Some(1 << 30),
            guest_free_bytes: Some(3 << 30),
            ..linux(Some(guest))
        };
        let text = status(&report);
        assert!(line(&text, "guest uses").ends_with("1 GiB  by its own words, 1.50 s ago"), "{text}");
        assert!(line(&text, "guest says").ends_with("3 GiB free, 4 GiB in all; 1.50 s ago"), "{text}");
    }

    #[test]
    fn what_a_guest_did_not_say_is_unknown_and_never_zero() {
        let text = status(&linux(None));
        assert!(line(&text, "guest uses").ends_with("unknown  the guest does not say so"), "{text}");
        assert!(line(&text, "reclaimable").contains("unknown"), "{text}");
        let stale =
            GuestStatsReport { age_ms: 60_000, stale: true, free_bytes: Some(7), ..GuestStatsReport::default() };
        let text = status(&linux(Some(stale)));
        assert!(line(&text, "guest has free").ends_with("unknown  the guest's last words are 60.00 s old"), "{text}");
        assert!(line(&text, "guest says").contains("too old to be true now"), "{text}");
        let mut report = linux(None);
        report.elastic.driven = false;
        assert!(line(&status(&report), "guest uses").contains("no driver for its device yet"));
        let text = resize("shrink", &ResizeReport::default());
        assert!(line(&text, "reclaimable now").ends_with("unknown"), "{text}");
    }
}
