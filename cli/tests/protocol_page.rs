//! What docs/protocol.md shows to programs, run as it stands there.

use crate::common::{MIB, Process, Scratch, need_kvm};
use cli::args::EXIT_CODES;
use cli::exit;
use llfree_control::protocol::{ErrorKind, Reply};
use llfree_control::report::Reason;
use std::path::Path;
use std::process::{Command, Stdio};
use test_support::skipped;

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/protocol.md");
    std::fs::read_to_string(path).expect("the page")
}

/// The first piece of code in this language behind a heading.
fn code(heading: &str, language: &str) -> String {
    let page = page();
    let (_, below) = page.split_once(&format!("### {heading}\n")).expect("the heading");
    let (_, below) = below.split_once(&format!("```{language}\n")).expect("such a piece");
    below.split_once("```").expect("its end").0.to_owned()
}

fn is_there(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    // socat takes -V.
    found.is_ok()
}

/// Runs a program with a piece of code, and the socket as its argument.
fn run(scratch: &Scratch, program: &str, before: &[&str], code: &str, socket: &Path) -> String {
    let mut command = Command::new(program);
    scratch.prepare(&mut command).args(before).arg(code);
    if program == "sh" {
        command.arg("sh");
    }
    Process::spawn(command.arg(socket)).wait().exits(0).stdout
}

#[test]
fn the_pages_python_and_socat_work() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 128M --cpus 1 --name web");
    if is_there("python3") {
        let said = run(&scratch, "python3", &["-c"], &code("From a program", "python"), &vm.socket);
        assert_eq!(said, "web 128 MiB\nTrue\n");
        assert_eq!(vm.status()["limit_bytes"], 64 * MIB);
    } else {
        skipped("no python3");
    }
    if is_there("socat") {
        let said = run(&scratch, "sh", &["-c"], &code("From a program", "sh"), &vm.socket);
        assert!(matches!(Reply::from_line(said.as_bytes()), Ok(Reply::Status(_))), "{said}");
    } else {
        skipped("no socat");
    }
    vm.stop();
}

/// Programs match on these words, so none may change or go, and each has its place on the page.
#[test]
fn error_codes_are_listed_and_stable() {
    let kinds = [
        (ErrorKind::BadRequest, "bad_request"),
        (ErrorKind::Version, "version"),
        (ErrorKind::TooLong, "too_long"),
        (ErrorKind::Busy, "busy"),
        (ErrorKind::Refused, "refused"),
        (ErrorKind::Guest, "guest"),
        (ErrorKind::Crashed, "crashed"),
        (ErrorKind::Stopping, "stopping"),
        (ErrorKind::Internal, "internal"),
    ];
    let page = page();
    let is_listed = |word: &str| assert!(page.contains(&format!("`{word}`")), "{word} is not in docs/protocol.md");
    for (kind, word) in kinds {
        assert_eq!(serde_json::to_value(kind).expect("a word"), word);
        is_listed(word);
    }
    let reasons = [
        (Reason::NotAMultiple, "not_a_multiple"),
        (Reason::AboveMemory, "above_memory"),
        (Reason::AboveLimit, "above_limit"),
        (Reason::BelowLimit, "below_limit"),
        (Reason::ByTooMuch, "by_too_much"),
        (Reason::BelowBoot, "below_boot"),
        (Reason::NotElastic, "not_elastic"),
        (Reason::NoTable, "no_table"),
        (Reason::SetAtLaunch, "set_at_launch"),
        (Reason::KeepTooLarge, "keep_too_large"),
        (Reason::Order, "order"),
        (Reason::Paused, "paused"),
        (Reason::NoAgent, "no_agent"),
        (Reason::NoAnswer, "no_answer"),
        (Reason::NoConsole, "no_console"),
        (Reason::NoPowerButton, "no_power_button"),
        (Reason::Cgroup, "cgroup"),
    ];
    for (reason, word) in reasons {
        assert_eq!(reason.name(), word);
        is_listed(word);
    }
    // A kind or a reason that is new needs its line above: the schema knows all of them.
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schema/reply.json");
    let schema: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(schema).expect("committed")).expect("JSON");
    let words = |name: &str| -> usize {
        schema["$defs"][name]["oneOf"].as_array().unwrap_or_else(|| panic!("no {name}")).len()
    };
    // And `other`, which stands for what is not known.
    assert_eq!((words("ErrorKind"), words("Reason")), (kinds.len() + 1, reasons.len()));
}

#[test]
fn exit_codes_are_on_the_page_and_in_the_help() {
    let page = page();
    let (_, below) = page.split_once("\nExit codes of `llfree-vmm`: ").expect("the paragraph");
    let (paragraph, _) = below.split_once("\n\n").expect("its end");
    let has = |text: &str, code: u8| {
        text.split(';').any(|part| part.split_whitespace().next() == Some(code.to_string().as_str()))
    };
    let codes = [
        exit::OK,
        exit::ERROR,
        exit::PARTIAL,
        exit::CRASHED,
        exit::REBOOTED,
        exit::PANICKED,
        exit::INTERRUPTED,
        exit::FORBIDDEN,
    ];
    for code in codes {
        assert!(has(paragraph, code), "{code} is not in docs/protocol.md: {paragraph}");
        assert!(has(EXIT_CODES, code), "{code} is not in the help: {EXIT_CODES}");
    }
}
