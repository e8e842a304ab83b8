//! What is shown again and again: the list of VMs, rates between two statuses, and a block that is redrawn in
//! place.

use super::uptime;
use llfree_base::printable;
use llfree_base::units::Bytes;
use llfree_control::report::StatusReport;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

/// The size of the terminal on stdout, rows first, or the usual one if it does not say.
#[must_use]
pub fn terminal_size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row.into(), size.ws_col.into()),
        _ => (24, 80),
    }
}

/// A block as it replaces the last one on a terminal: from the top, without a flicker, and never taller or wider
/// than the terminal, which would scroll.
#[must_use]
pub fn in_place(text: &str, (rows, columns): (usize, usize)) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let fits = lines.len() < rows;
    let shown = if fits { lines.len() } else { rows.saturating_sub(2) };
    // Home, each line cleared to its end, then all that is below.
    let mut block = "\x1b[H".to_owned();
    for line in &lines[..shown] {
        block.extend(line.chars().take(columns));
        block.push_str("\x1b[K\n");
    }
    if !fits {
        let more = format!("... {} more lines in a taller terminal", lines.len() - shown);
        block.extend(more.chars().take(columns));
        block.push_str("\x1b[K\n");
    }
    block + "\x1b[J"
}

/// What happened between two statuses, a second.
#[must_use]
pub fn rates(last: &StatusReport, now: &StatusReport, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds <= 0.0 {
        return String::new();
    }
    let calls = |report: &StatusReport| report.vcpus.iter().map(|vcpu| vcpu.counts.calls).sum::<u64>();
    let exits = |report: &StatusReport| {
        report.vcpus.iter().map(|vcpu| vcpu.exits.mmio + vcpu.exits.pio + vcpu.exits.other).sum::<u64>()
    };
    let rate = |of: &dyn Fn(&StatusReport) -> u64| of(now).saturating_sub(of(last)) as f64 / seconds;
    let moved = now.resident_bytes.abs_diff(last.resident_bytes) as f64 / seconds;
    let sign = if now.resident_bytes < last.resident_bytes { "-" } else { "+" };
    format!(
        "per second    {:.0} installs, {:.0} calls, {:.0} exits, {sign}{} resident\n",
        rate(&|report| report.monitor.installs),
        rate(&calls),
        rate(&exits),
        Bytes(moved as u64),
    )
}

/// What `list` prints: one line per VM and, of several, their sums; or that there is none.
#[must_use]
pub fn list(vms: &[(String, Result<StatusReport, String>)], looked: &[PathBuf]) -> String {
    if vms.is_empty() {
        let looked: Vec<_> = looked.iter().map(|place| place.display().to_string()).collect();
        return format!("no VM is running (looked in {})\n", looked.join(", "));
    }
    let name_width = vms.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(5) + 2;
    let mut text = format!("{:<name_width$}{:>8}", "name", "pid");
    text.extend(["memory", "limit", "resident", "cost", "up"].map(|head| format!("{head:>12}")));
    text.push('\n');
    for (name, status) in vms {
        let line = match status {
            Ok(status) => format!("{:>8}{}{:>12}", status.pid, sizes(&[status]), uptime(status.uptime_ms)),
            Err(why) => format!("    {}", printable(why)),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<name_width$}{line}");
    }
    let known: Vec<&StatusReport> = vms.iter().filter_map(|(_, status)| status.as_ref().ok()).collect();
    if known.len() > 1 {
        let _ = writeln!(text, "{:<name_width$}{:>8}{}", "total", known.len(), sizes(&known));
    }
    text
}

/// The columns of sizes in `list`, added up.
fn sizes(vms: &[&StatusReport]) -> String {
    let columns: [fn(&StatusReport) -> u64; 4] =
        [|vm| vm.memory_bytes, |vm| vm.limit_bytes, |vm| vm.resident_bytes, |vm| vm.cost_bytes];
    let sum = |column: fn(&StatusReport) -> u64| vms.iter().fold(0_u64, |sum, vm| sum.saturating_add(column(vm)));
    columns.map(|column| format!("{:>12}", Bytes(sum(column)).to_string())).concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_base::counters::MonitorCounts;

    fn lines(text: &str) -> Vec<String> {
        text.replace("\x1b[H", "").replace("\x1b[J", "").replace("\x1b[K", "").lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_block_never_scrolls_its_terminal() {
        let text = (0..20).map(|line| format!("line {line} {}\n", "x".repeat(90))).collect::<String>();
        for rows in 1..30 {
            let block = in_place(&text, (rows, 40));
            let shown = lines(&block);
            assert!(block.matches('\n').count() < rows.max(2), "{rows} rows: {shown:#?}");
            assert!(shown.iter().all(|line| line.chars().count() <= 40), "{shown:#?}");
            assert_eq!(shown.len() == 20, rows > 20);
        }
        let shown = lines(&in_place(&text, (5, 80)));
        assert!(shown[0].starts_with("line 0 "), "its head is there: {shown:#?}");
        assert_eq!(shown[3], "... 17 more lines in a taller terminal");
    }

    #[test]
    fn rates_are_what_changed_in_a_second() {
        let last = StatusReport { resident_bytes: 3 << 20, ..StatusReport::default() };
        let monitor = MonitorCounts { installs: 50, ..MonitorCounts::default() };
        let now = StatusReport { resident_bytes: 1 << 20, monitor, ..StatusReport::default() };
        let text = rates(&last, &now, Duration::from_millis(500));
        assert_eq!(text, "per second    100 installs, 0 calls, 0 exits, -4 MiB resident\n");
        assert_eq!(rates(&last, &now, Duration::ZERO), "");
    }

    #[test]
    fn several_vms_have_a_sum() {
        let status = |mib: u64| {
            Ok(StatusReport {
                memory_bytes: mib << 20,
                limit_bytes: mib << 20,
                resident_bytes: 1 << 20,
                ..StatusReport::default()
            })
        };
        let text = list(&[("a".to_owned(), status(64)), ("b".to_owned(), status(128))], &[]);
        let total: Vec<&str> = text.lines().last().unwrap_or_default().split_whitespace().collect();
        assert_eq!(total, ["total", "2", "192", "MiB", "192", "MiB", "2", "MiB", "0", "B"], "{text}");
        let text = list(&[("a".to_owned(), status(64)), ("b".to_owned(), Err("hangs".to_owned()))], &[]);
        assert!(!text.contains("total"), "{text}");
    }
}
