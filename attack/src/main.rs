//! `llfree-attack`: attacks a VMM in every way that its threat model names, for as long as it is told, and prints
//! a table of how much was tried and what was found. Exit code 1 if anything was.
//!
//! Each attack runs in a process of its own, whose death or silence is a finding, too. Two of them attack the
//! library in that process, the others the binary `llfree-vmm` that lies beside this one.
//!
//! | file | attack |
//! |---|---|
//! | `memory` | a hostile guest, and a bystander who writes into the words of a good one |
//! | `control` | lines on the control socket that are no requests, or nearly some |
//! | `kill` | `kill -9` at any moment |
//! | `launch` | a launch under which the kernel refuses any one system call |
//! | `descriptors` | fewer descriptors than clients |
//! | `fleet` | fifty VMs in the background, listed and stopped at once |

mod control;
mod descriptors;
mod fleet;
mod kill;
mod launch;
mod memory;
mod outcome;
mod vm;

use clap::Parser;
use llfree_base::forecast;
use llfree_base::panics;
use llfree_base::units::parse_duration;
use outcome::{Outcome, Round};
use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Attacks a VMM and prints what was tried and what was found.
#[derive(Parser)]
#[command(name = "llfree-attack", max_term_width = 110)]
struct Cli {
    /// Time for all attacks together
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "30m")]
    time: Duration,
    /// Run some of them only
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = names())]
    only: Vec<String>,
    /// Repeat what this number leads to; each run prints its own
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Print one JSON object per attack
    #[arg(long)]
    json: bool,
    /// Run one attack in this process
    #[arg(long, hide = true, requires = "seed")]
    here: Option<String>,
}

type Attack = (&'static str, fn(&Round) -> Outcome);

const ATTACKS: [Attack; 7] = [
    ("hostile-guest", memory::hostile_guest),
    ("bystander", memory::bystander),
    ("control-lines", control::run),
    ("kill", kill::run),
    ("launch-faults", launch::run),
    ("descriptors", descriptors::run),
    ("fleet", fleet::run),
];

fn names() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(ATTACKS.map(|(name, _)| name))
}

fn main() -> ExitCode {
    panics::end_the_process();
    let cli = Cli::parse();
    let seed = cli.seed.unwrap_or_else(|| fastrand::u64(..));
    if let Some((_, attack)) = ATTACKS.iter().find(|(name, _)| cli.here.as_deref() == Some(*name)) {
        let outcome = attack(&Round { end: Instant::now() + cli.time, seed });
        // Plain data with string keys.
        println!("{}", serde_json::to_string(&outcome).expect("plain data serializes"));
        return ExitCode::SUCCESS;
    }
    let chosen: Vec<&Attack> =
        ATTACKS.iter().filter(|(name, _)| cli.only.is_empty() || cli.only.iter().any(|only| only == name)).collect();
    let share = cli.time / chosen.len() as u32;
    // Its time is not the attack's, which says why it has no guest.
    let _ = memory::build();
    forecast::announce("llfree-attack", "this", cli.time);
    if !cli.json {
        println!("seed {seed}, {share:.0?} for each attack\n");
        println!("{:<14} {:>7}  {:<8}  amounts", "attack", "time", "findings");
    }
    let mut found = 0;
    for (name, _) in chosen {
        let start = Instant::now();
        let outcome = in_a_process(name, share, seed);
        found += outcome.findings.len();
        report(name, start.elapsed(), &outcome, cli.json);
    }
    if found > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn report(name: &str, time: Duration, outcome: &Outcome, json: bool) {
    if json {
        let line = serde_json::json!({ "attack": name, "seconds": time.as_secs_f64(), "outcome": outcome });
        println!("{line}");
        return;
    }
    let amounts: Vec<String> =
        outcome.amounts.iter().map(|(what, count)| format!("{} {what}", spaced(*count))).collect();
    let (findings, amounts) = match &outcome.skipped {
        Some(why) => ("skipped".to_owned(), why.clone()),
        None => (outcome.findings.len().to_string(), amounts.join(", ")),
    };
    println!("{name:<14} {:>5.0} s  {findings:<8}  {amounts}", time.as_secs_f64());
    for finding in &outcome.findings {
        println!("    FOUND: {finding}");
    }
}

/// Thousands apart: 1,234,567.
fn spaced(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// Runs an attack in a process of its own.
fn in_a_process(name: &str, time: Duration, seed: u64) -> Outcome {
    let started = std::env::current_exe().and_then(|this| {
        Command::new(this)
            .args(["--here", name, "--seed", &seed.to_string(), "--time", &format!("{}ms", time.as_millis())])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    });
    let mut child = match started {
        Ok(child) => child,
        Err(error) => return Outcome::skip(format_args!("it cannot be started: {error}")),
    };
    let collect = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            // A pipe that breaks ends the text.
            let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut text));
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let stdout = collect(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = collect(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let ended = vm::wait(&mut child, time + Duration::from_secs(120));
    if ended.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    let mut outcome: Outcome = serde_json::from_str(&stdout).unwrap_or_default();
    match ended {
        None => outcome.find("it hung and was killed"),
        Some(status) if !status.success() => {
            let last: Vec<&str> = stderr.lines().rev().take(12).collect();
            outcome.find(format!(
                "its process ended with {status}: {}",
                last.into_iter().rev().collect::<Vec<_>>().join(" | ")
            ));
        }
        Some(_) => {}
    }
    outcome
}
