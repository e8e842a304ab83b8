//! What the kernel itself complains of: its log, its taints, and whether lockdep gave up.

/// Lockdep counts its own findings, and stops with the first.
pub(crate) fn lockdep_is_on() -> Option<bool> {
    let text = std::fs::read_to_string("/proc/lockdep_stats").ok()?;
    let line = text.lines().find(|line| line.trim_start().starts_with("debug_locks:"))?;
    Some(line.split_whitespace().nth(1) == Some("1"))
}

/// The last time that the log tells of somebody killed for lack of memory: by which allocation, and what there was.
pub(crate) fn last_kill() -> String {
    let log = std::process::Command::new("dmesg").output().map(|output| output.stdout).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<_> = log.lines().collect();
    let start = lines.iter().rposition(|line| line.contains("invoked oom-killer"));
    let of_it = start.map_or(&[][..], |start| &lines[start..]);
    of_it.iter().take(60).map(|line| format!("\n    {line}")).collect()
}

/// What the module itself taints the kernel with: it is none of the kernel's own, and nobody signed it.
const OUT_OF_TREE: u64 = 1 << 12 | 1 << 13;

/// No complaint of the kernel.
pub(crate) fn clean_log() -> Result<String, String> {
    let log = std::process::Command::new("dmesg").output().map_err(|error| error.to_string())?;
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    let bad = [
        "BUG:",
        "WARNING:",
        "KASAN",
        "INFO: task",
        "general protection",
        "Oops",
        "possible circular",
        "possible recursive",
        "possible irq",
        "inconsistent lock",
        "rcu: INFO",
        "detected stalls",
        "bad page",
        "Bad page",
        "ODEBUG",
        "kernel BUG",
        "page_table_check",
    ];
    let found: Vec<_> = log.lines().filter(|line| bad.iter().any(|word| line.contains(word))).collect();
    let tainted = std::fs::read_to_string("/proc/sys/kernel/tainted").map_err(|error| error.to_string())?;
    let tainted = tainted.trim().parse::<u64>().map_err(|error| error.to_string())? & !OUT_OF_TREE;
    let lockdep = lockdep_is_on();
    if found.is_empty() && tainted == 0 && lockdep != Some(false) {
        Ok(lockdep.map_or(String::new(), |_| "lockdep is still at work".to_owned()))
    } else {
        Err(format!("tainted: {tainted:#x}; {}", found.join("\n    ")))
    }
}
