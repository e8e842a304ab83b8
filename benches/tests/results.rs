//! Where results go, and that the last ones stay when there are no new ones.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use test_support::skipped;

/// A figure that lasts for many seconds if nobody ends it.
const LONG: [&str; 5] = ["recovery", "--mem", "64G", "--iterations", "1000"];

fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llfree-bench"));
    command.args(args).env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> Output {
    bench(args).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("text")
}

/// Starts it, and waits until it has measured something.
fn started(args: &[&str]) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut child = bench(args).spawn().expect("the binary runs");
    let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
    // It begins with how long it will take.
    for says in ["takes about", "each candidate had its first step"] {
        let mut line = String::new();
        stderr.read_line(&mut line).expect("it says where it stands");
        assert!(line.contains(says), "{line}");
    }
    // That was to warm up; a step takes some milliseconds.
    std::thread::sleep(Duration::from_millis(300));
    (child, stderr)
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("it is ours");
}

fn files_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).expect("scratch").map(|entry| entry.expect("scratch").file_name());
    names.map(|name| name.into_string().expect("text")).collect()
}

#[test]
fn an_interrupted_figure_prints_what_it_has_and_keeps_the_last_results() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let csv = scratch.path().join("rows.csv");
    fs::write(&csv, "the last results\n").expect("scratch");
    let path = csv.to_str().expect("text");
    for (what, json) in [(Signal::INT, true), (Signal::TERM, false)] {
        let (child, mut stderr) =
            started(&[&LONG[..], &["--csv", path], if json { &["--json"] } else { &[] }].concat());
        signal(&child, what);
        let output = child.wait_with_output().expect("it ends");
        let mut said = String::new();
        stderr.read_to_string(&mut said).expect("text");
        assert_eq!(output.status.code(), Some(130), "{said}");
        if json {
            let rows: Vec<Value> = serde_json::from_slice(&output.stdout).expect("rows");
            assert!(!rows.is_empty() && rows.iter().all(|row| row["us_median"].is_number()), "{rows:#?}");
        } else {
            assert!(text(&output.stdout).starts_with("state ") && text(&output.stdout).lines().count() > 1);
        }
        assert!(said.contains("once more to end at once") && said.contains("files are as they were"), "{said}");
        assert_eq!(fs::read_to_string(&csv).expect("it is there"), "the last results\n");
    }
    // Nor does a hard end take them.
    let (mut child, _stderr) = started(&[&LONG[..], &["--csv", path]].concat());
    signal(&child, Signal::KILL);
    child.wait().expect("it ends");
    assert_eq!(fs::read_to_string(&csv).expect("it is there"), "the last results\n");
    assert_eq!(files_in(scratch.path()), ["rows.csv"]);
}

#[test]
fn results_replace_the_last_ones_and_a_dash_is_the_standard_output() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let csv = scratch.path().join("rows.csv");
    fs::write(&csv, "the last results\n").expect("scratch");
    let short = ["recovery", "--mem", "16M", "--iterations", "2", "--quiet"];
    let to_file = run(&[&short[..], &["--csv", csv.to_str().expect("text")]].concat());
    assert!(to_file.status.success() && text(&to_file.stdout).starts_with("state "), "{to_file:?}");
    let written = fs::read_to_string(&csv).expect("it is there");
    assert!(written.starts_with("bench,state,") && written.lines().count() == 6, "{written}");
    let printed = Command::new(env!("CARGO_BIN_EXE_llfree-bench"))
        .args([&short[..], &["--csv", "-"]].concat())
        .current_dir(scratch.path())
        .output()
        .expect("the binary runs");
    let printed = text(&printed.stdout);
    assert!(printed.starts_with("bench,state,") && printed.lines().count() == 6, "{printed}");
    assert_eq!(files_in(scratch.path()), ["rows.csv"], "no file is called -");
    let both = run(&[&short[..], &["--csv", "-", "--json"]].concat());
    assert!(!both.status.success() && text(&both.stderr).contains("give --csv a file"), "{both:?}");
}

#[test]
fn a_picture_of_another_kind_is_refused_in_one_line() {
    let output = run(&["frag", "--mem", "16M", "--plot", "x.png"]);
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("write a name that ends in .svg") && output.stdout.is_empty(), "{said}");
    assert!(!Path::new("x.png").exists());
}

#[test]
fn a_figure_that_needs_more_than_there_is_is_refused_before_it_touches_anything() {
    if !Path::new("/dev/kvm").exists() {
        return skipped("no /dev/kvm");
    }
    let figures = [&["inflate", "--mem", "16T"][..], &["interference", "--mem", "16T"], &["frag", "--mem", "64T"]];
    for figure in figures {
        let output = run(figure);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("available; use a smaller --mem") && said.lines().count() == 1, "{said}");
    }
}
