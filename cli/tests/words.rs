//! Words for shells and readers: what completes, and that each command has its manual page.

use crate::common::{Process, Scratch, need_kvm};
use clap::CommandFactory;
use cli::args::Cli;
use std::process::Command;
use test_support::skipped;

/// What bash would offer for the last of these words.
fn offered(scratch: &Scratch, words: &[&str]) -> Option<Vec<String>> {
    let script = r#"
        eval "$("$1" completions bash)" || exit 1
        shift
        # The function that was registered, called as bash does it.
        spec=$(complete -p llfree-vmm) || exit 2
        function=${spec#*-F }
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_TYPE=9 COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        "${function%% *}" llfree-vmm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let mut command = Command::new("bash");
    let binary = env!("CARGO_BIN_EXE_llfree-vmm");
    let dir = std::path::Path::new(binary).parent().expect("a directory");
    let path = std::env::join_paths(
        [dir.to_owned()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    )
    .expect("paths");
    scratch.prepare(&mut command).env("PATH", path).args(["-c", script, "bash", binary]).args(words);
    if Command::new("bash").arg("--version").output().is_err() {
        skipped("no bash");
        return None;
    }
    let output = Process::spawn(&mut command).wait().exits(0);
    assert_eq!(output.stderr, "");
    Some(output.stdout.lines().map(|word| word.trim().to_owned()).collect())
}

#[test]
fn commands_flags_and_names_of_vms_complete() {
    need_kvm!();
    let scratch = Scratch::new();
    let web = scratch.launch("--mem 64M --cpus 1 --name web");
    let db = scratch.launch("--mem 64M --cpus 1 --name web-db");
    for (words, expected) in [
        (&["llfree-vmm", "shr"][..], &["shrink"][..]),
        (&["llfree-vmm", "shrink", "--forc"], &["--force"]),
        (&["llfree-vmm", "stop", "we"], &["web", "web-db"]),
        (&["llfree-vmm", "status", "web-"], &["web-db"]),
        (&["llfree-vmm", "--name", "web-"], &["web-db"]),
        (&["llfree-vmm", "guest", "verify", "--name", "web-"], &["web-db"]),
        (&["llfree-vmm", "wait", "--for", "a"], &["agent"]),
        (&["llfree-vmm", "status", "x"], &[""]),
    ] {
        let Some(found) = offered(&scratch, words) else { return };
        assert_eq!(found, expected, "{words:?}");
    }
    assert_eq!(web.json("stop")["stopped"], true);
    web.process.wait().exits(0);
    db.stop();
    let found = offered(&scratch, &["llfree-vmm", "stop", "we"]).expect("bash");
    assert_eq!(found, [""], "none runs, and none is offered");
}

#[test]
fn other_shells_get_their_part_and_unknown_ones_a_line() {
    let scratch = Scratch::new();
    for (shell, words) in [("bash", "complete "), ("zsh", "#compdef llfree-vmm"), ("fish", "complete ")] {
        let text = scratch.run(&["completions", shell]).exits(0).stdout;
        assert!(text.contains(words) && text.contains("LLFREE_VMM_COMPLETE"), "{shell}: {text}");
    }
    for args in [&["completions", "tcsh"][..], &["completions"], &["--name", "x", "completions", "bash"]] {
        scratch.run(args).exits(1).one_error_line();
    }
}

/// `ops/check` renders them; here it is enough that each command says what it is for.
#[test]
fn each_command_and_flag_has_help_for_its_page() {
    fn look(command: &clap::Command, path: &str) {
        let path = format!("{path} {}", command.get_name());
        assert!(command.get_about().is_some(), "{path}");
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
            assert!(arg.get_help().is_some(), "{path} {}", arg.get_id());
        }
        command.get_subcommands().for_each(|command| look(command, &path));
    }
    let mut command = Cli::command();
    command.build();
    look(&command, "");
}
