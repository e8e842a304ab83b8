//! What the binary says while it measures, and where: rows on standard output, all else on standard error.

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};

const FRAG: [&str; 9] =
    ["frag", "--mem", "16M", "--rounds", "3", "--allocators", "llfree,buddy", "--exchange", "batch,pairs"];
const RECOVERY: [&str; 5] = ["recovery", "--mem", "16M", "--iterations", "2"];
const ALLOC: [&str; 13] = [
    "alloc",
    "--mem",
    "64M",
    "--iterations",
    "1",
    "--benches",
    "bulk,host",
    "--orders",
    "0,9",
    "--threads",
    "1",
    "--allocators",
    "llfree,buddy",
];

fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llfree-bench"));
    command.args(args).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Both ends are pipes.
fn piped(args: &[&str]) -> Output {
    let output = bench(args).output().expect("the binary runs");
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

/// The lines that say that a candidate is through, by its name.
fn finished(stderr: &str, figure: &str) -> Vec<String> {
    let prefix = format!("llfree-bench: {figure}: ");
    // The first one says how long it will take.
    let lines = stderr.lines().skip(1).map(|line| line.strip_prefix(&prefix).unwrap_or_else(|| panic!("{line}")));
    let finished = lines.filter(|line| line.contains(" steps in ") && line.contains(" so far"));
    finished.filter_map(|line| Some(line.split_once(": ")?.0.to_owned())).collect()
}

#[test]
fn in_a_pipe_each_candidate_has_one_line_and_the_rows_stay_pure() {
    for (args, candidates) in [
        (&FRAG[..], &["llfree, batch", "buddy, batch", "llfree, pairs", "buddy, pairs"][..]),
        (&RECOVERY[..], &["closed", "killed, all free", "killed, all used", "killed, random bits"][..]),
        (&ALLOC[..], &["llfree", "buddy", "entry-cas"][..]),
    ] {
        let output = piped(&[args, &["--json"]].concat());
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout).expect("one array and nothing else");
        assert!(!rows.is_empty());
        let stderr = text(&output.stderr);
        let mut finished = finished(&stderr, args[0]);
        finished.sort();
        let mut candidates: Vec<&str> = candidates.to_vec();
        candidates.sort_unstable();
        assert_eq!(finished, candidates, "{stderr}");
        assert!(!stderr.contains('\x1b') && !stderr.contains('\r'), "{stderr:?}");
    }
}

#[test]
fn tables_for_a_document_are_all_that_is_printed() {
    let args = "alloc --benches mixed-80,refuse --mem 128M --operations 1000 --iterations 1 --threads 1 --markdown";
    let args: Vec<&str> = args.split(' ').chain(["--allocators", "llfree,buddy", "--orders", "0,9"]).collect();
    let text = text(&piped(&args).stdout);
    assert!(text.lines().all(|line| line.is_empty() || line.starts_with('|')), "{text}");
    // Two tables, each with a head and a line; two allocators in one size, and for refusals two orders each.
    assert_eq!(text.lines().filter(|line| !line.is_empty()).count(), 2 * 2 + 2 + 4, "{text}");
    for row in ["| mixed-80 | 128 MiB | - | 1 | llfree |", "| refuse | 128 MiB | 9 | 1 | buddy |"] {
        assert!(text.contains(row), "{text}");
    }
}

#[test]
fn where_candidates_take_turns_a_pipe_has_an_estimate_after_the_first() {
    let taking_turns = text(&piped(&RECOVERY).stderr);
    let first = taking_turns.lines().nth(1).expect("a line");
    assert!(first.contains("each candidate had its first step") && first.contains(" left"), "{taking_turns}");
    // One after the other: their own lines are all there is to say.
    assert_eq!(text(&piped(&FRAG).stderr).lines().count(), 1 + 4);
}

#[test]
fn a_figure_begins_by_saying_how_long_it_will_take() {
    for args in [&RECOVERY[..], &FRAG[..]] {
        let output = piped(&[args, &["--json"]].concat());
        let stderr = text(&output.stderr);
        assert!(stderr.starts_with(&format!("llfree-bench: {} takes some seconds\n", args[0])), "{stderr}");
        assert!(!text(&output.stdout).contains("takes"), "rows and nothing else");
    }
    // More rounds than anybody waits for here.
    let mut long = bench(&["frag", "--mem", "8G", "--rounds", "1000"]);
    let mut child = long.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    let mut line = String::new();
    let read = BufReader::new(child.stderr.take().expect("a pipe")).read_line(&mut line);
    child.kill().and_then(|()| child.wait()).expect("it is ours");
    read.expect("text");
    assert_eq!(line, "llfree-bench: frag takes about 2 min\n");
}

#[test]
fn quiet_means_rows_and_nothing_else() {
    for args in [&["--quiet"][..], &["-q"][..]] {
        let output = piped(&[&RECOVERY[..], args].concat());
        assert_eq!(text(&output.stderr), "");
        assert!(text(&output.stdout).starts_with("state "));
    }
}

/// The text that a terminal gets on standard error, and the rows.
fn on_a_terminal(args: &[&str], term: &str) -> (String, Output) {
    let mut ours = File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudoterminal"));
    grantpt(&ours).expect("it is ours");
    unlockpt(&ours).expect("it is ours");
    let path = ptsname(&ours, Vec::new()).expect("it has a name").into_string().expect("of plain letters");
    let theirs = File::options().read(true).write(true).open(path).expect("the other end");
    let mut command = bench(args);
    command.env("TERM", term).stderr(theirs).stdout(Stdio::piped());
    let child = command.spawn().expect("the binary runs");
    // Ours is the last that holds the other end: without it the end of the child is the end of the text.
    drop(command);
    let mut screen = Vec::new();
    // A pseudoterminal ends with an error.
    let _ = ours.read_to_end(&mut screen);
    (text(&screen), child.wait_with_output().expect("it ends"))
}

#[test]
fn on_a_terminal_one_line_is_redrawn_and_cleared_at_the_end() {
    let (screen, output) = on_a_terminal(&[&FRAG[..], &["--json"]].concat(), "xterm");
    assert!(output.status.success());
    assert!(serde_json::from_slice::<Vec<Value>>(&output.stdout).is_ok_and(|rows| !rows.is_empty()));
    assert!(screen.contains("frag [") && screen.contains("llfree, batch, 1 of"), "{screen:?}");
    assert!(screen.contains(" left: "), "{screen:?}");
    assert!(!screen.contains('\n') && !screen.contains("llfree-bench:"), "one line, in place: {screen:?}");
    // What stands there at the end was written after the last time that the line was cleared.
    let (_, rest) = screen.rsplit_once("\x1b[2K").expect("the line is cleared");
    assert_eq!(rest.trim(), "", "{screen:?}");
}

#[test]
fn an_error_stands_on_a_line_of_its_own_after_progress() {
    let (screen, output) = on_a_terminal(&["fill", "--mem", "2M"], "xterm");
    assert!(!output.status.success());
    let line = screen.rsplit("\x1b[2K").next().unwrap_or_default().trim();
    assert!(line.starts_with("llfree-bench: error: --mem 2 MiB is too small"), "{screen:?}");
}

#[test]
fn a_terminal_that_cannot_move_its_cursor_gets_lines() {
    let (screen, output) = on_a_terminal(&RECOVERY, "dumb");
    assert!(output.status.success());
    assert_eq!(finished(&screen, "recovery").len(), 4, "{screen:?}");
    assert!(!screen.contains('\x1b'), "{screen:?}");
}
