//! clap's reports as the lines that this program prints.

/// The message of clap's report and its tips, without the usage that follows.
pub(super) fn one_line(report: &str) -> String {
    let report = report.strip_prefix("error: ").unwrap_or(report);
    let body = report.split("\nUsage:").next().unwrap_or(report);
    let body = body.split("\nFor more information").next().unwrap_or(body);
    let lines: Vec<String> = body
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|l| !l.is_empty())
        .collect();
    let line = lines.join("; ").replace(":; ", ": ").replace("; [possible", " [possible").replace("; tip: ", "; ");
    // An argument may hold anything; a terminal should not have to take it.
    line.chars().flat_map(|c| if c.is_control() { c.escape_debug().collect::<Vec<_>>() } else { vec![c] }).collect()
}
