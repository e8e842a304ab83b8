//! Advice names the right flag, in a line that says what failed, and no flag that there is not.

use super::*;
use crate::args::Cli;
use crate::client_commands::CommandError;
use crate::run::RunError;
use clap::CommandFactory;
use llfree_base::choices::Switch;
use llfree_base::units::Bytes;
use llfree_control::client::ClientError;
use llfree_control::protocol::{ErrorKind, ShrinkGoal};
use llfree_control::report::Word;
use llfree_monitor::OnViolation;
use llfree_monitor::Violation;
use llfree_monitor::install_config::{InstallConfig, InstallPool};
use llfree_monitor::memory::{Backing, UseUserfaultfd, UserfaultError};
use std::path::PathBuf;
use vmm::elastic::Elastic;

const MIB: u64 = 1 << 20;

fn launch_line(error: impl Into<LaunchError>) -> String {
    line(&RunError::Launch(error.into()))
}

fn socket_line(error: SocketError) -> String {
    line(&CommandError::Socket(error))
}

fn io() -> std::io::Error {
    std::io::ErrorKind::NotFound.into()
}

#[test]
fn a_pool_or_policy_without_userfaultfd_names_both_flags() {
    let memory = Bytes(32 << 20);
    let chosen = InstallConfig {
        pool: Some(InstallPool { size: Bytes(64 << 20), ..InstallPool::NONE }),
        on_violation: Some(OnViolation::Stop),
        userfaultfd: UseUserfaultfd::Auto,
    };
    let refused = |config: InstallConfig, backing, shares_table| {
        launch_line(config.resolve(memory, backing, shares_table).expect_err("no"))
    };
    let text = refused(chosen, Backing::Anon, true);
    assert!(text.contains("64 MiB is larger than the guest's memory, 32 MiB"), "{text}");
    assert!(text.ends_with("; use --install-pool within that"), "{text}");
    let text = refused(chosen, Backing::Memfd, true);
    assert!(text.contains("--install-pool needs userfaultfd") && text.contains("--backing anon"), "{text}");
    assert!(text.contains("pages of memfd memory cannot be moved"), "{text}");
    let without = InstallConfig { pool: None, userfaultfd: UseUserfaultfd::Off, ..chosen };
    let text = refused(without, Backing::Anon, true);
    assert!(text.contains("--on-violation needs userfaultfd, which --userfaultfd off"), "{text}");
    let must = InstallConfig { pool: None, on_violation: None, userfaultfd: UseUserfaultfd::On };
    let text = refused(must, Backing::Anon, false);
    assert!(text.contains("--userfaultfd on works with --elastic llfree only"), "{text}");
}

#[test]
fn memory_that_cannot_be_made_names_the_flag_that_asked_for_it() {
    let pool = launch_line(MemoryError::Pool { huge_frames: 999, source: io() });
    assert_eq!(
        pool,
        "cannot make an install pool of 999 huge frames: entity not found; ask for less with --install-pool, or 0 for \
         none"
    );
    let text = launch_line(MemoryError::UserfaultBacking(Backing::Memfd));
    assert!(text.contains("memfd") && text.contains("--backing anon"), "{text}");
    let text = launch_line(MemoryError::Userfault(UserfaultError::Lacks("move pages")));
    assert!(text.contains("Linux 6.8") && text.contains("--userfaultfd on"), "{text}");
}

#[test]
fn a_client_that_finds_no_vm_or_several_is_told_what_to_write() {
    assert_eq!(
        socket_line(SocketError::NoneRunning(vec![])),
        "no VM is running; start one with 'llfree-vmm --mem 16G'"
    );
    let several = SocketError::SeveralRunning(vec!["a".to_owned(), "b".to_owned()]);
    assert_eq!(socket_line(several), "2 VMs are running; name one of them: a, b");
    let path = || PathBuf::from("/run/llfree-vmm");
    let text = socket_line(SocketError::Directory {
        path: path(),
        uid: 1,
        found: "its mode is 0777".to_owned(),
        is_ours: true,
    });
    assert!(text.ends_with("its mode is 0777; remove it or use --socket"), "{text}");
    let text = socket_line(SocketError::InUse { path: path(), pid: Some(7) });
    assert!(text.ends_with("(pid 7); choose another --name or stop that one"), "{text}");
}

#[test]
fn automatic_reclaim_that_cannot_be_names_the_flags() {
    let refusal = |text: &str, switch: &str| {
        let switch: Switch = switch.parse().expect(switch);
        let elastic: Elastic = text.parse().expect(text);
        line(&RunError::Flags(elastic.with_auto_reclaim(switch).expect_err(text)))
    };
    assert!(refusal("balloon,reporting=off", "on").contains("reporting=off"));
    assert!(refusal("balloon", "interval=1s").contains("--auto-reclaim on"));
    for kind in ["virtio-mem", "none"] {
        let text = refusal(kind, "on");
        assert!(text.contains(&format!("--elastic {kind}")) && text.contains("--auto-reclaim needs"), "{text}");
    }
}

#[test]
fn a_guest_that_linux_alone_takes_flags_for_is_told_to_leave_them_out() {
    for (what, flag) in [
        (LinuxOnly::Initrd, "--initrd"),
        (LinuxOnly::CommandLine, "--append"),
        (LinuxOnly::Disk, "--disk"),
        (LinuxOnly::Net, "--net"),
    ] {
        let text = launch_line(LinuxError::NotLinux { what, guest: "the built-in guest".to_owned() });
        assert!(text.contains(flag) && text.contains("built-in guest") && text.contains("--kernel"), "{text}");
    }
}

#[test]
fn a_guest_without_room_is_told_to_ask_for_more_and_an_initrd_without_any_is_not() {
    let name = || "vmlinuz".to_owned();
    let small = LinuxError::TooSmall { name: name(), needed: Bytes(58 * MIB), memory: Bytes(32 * MIB) };
    let text = launch_line(small);
    assert!(text.contains("58 MiB") && text.contains("32 MiB") && text.contains("--mem"), "{text}");
    // No machine has room for it.
    let text = launch_line(LinuxError::InitrdTooLarge { name: name(), bytes: 5000, limit: Bytes(4096) });
    assert!(text.contains("5000 bytes") && text.contains("--disk") && !text.contains("--mem"), "{text}");
}

#[test]
fn a_violation_names_the_policy_that_permits_it() {
    let violation = Violation { address: 0, held: true, write: true, vcpu: Some(0) };
    let text = line(&RunError::Guest(ExitReason::Violation(violation)));
    assert!(text.ends_with("; with --on-violation log it would continue"), "{text}");
}

#[test]
fn a_shrink_that_did_not_wait_is_told_that_it_may() {
    let shrink = |wait_ms| Request::Shrink { goal: ShrinkGoal::ToBytes(MIB), wait_ms };
    assert!(shortfall(&shrink(0)).is_some_and(|advice| advice.contains("--wait")));
    assert_eq!(shortfall(&shrink(1)), None);
    assert_eq!(shortfall(&Request::Grow { to_bytes: MIB }), None);
}

#[test]
fn a_refusal_is_explained_by_its_own_reason() {
    let refused = |reason: Option<Word<Reason>>| {
        let refused = ClientError::Refused { kind: ErrorKind::Refused, reason, message: "no".to_owned() };
        line(&CommandError::Client(refused))
    };
    let known = |reason: Reason| refused(Some(reason.into()));
    assert_eq!(known(Reason::AboveLimit), "no; use grow to raise it");
    assert_eq!(known(Reason::BelowLimit), "no; use shrink to lower it");
    assert_eq!(known(Reason::NotElastic), "no; launch it without --elastic none");
    assert!(known(Reason::NoTable).ends_with("launched with --elastic llfree can do that"));
    assert!(known(Reason::BelowBoot).contains("--elastic virtio-mem,boot=SIZE"));
    assert!(known(Reason::SetAtLaunch).contains("--elastic balloon,reporting=on|off"));
    assert!(known(Reason::NoConsole).contains("--serial socket"));
    // The words of the VM say all there is to say.
    assert_eq!(known(Reason::AboveMemory), "no");
    assert_eq!(known(Reason::KeepTooLarge), "no");
    // An older VM gives no reason, a newer one a reason that is not known here.
    assert_eq!(refused(None), "no");
    assert_eq!(refused(Some(Word::Other("too_late".to_owned()))), "no");
}

#[test]
fn no_advice_names_a_flag_that_there_is_not() {
    let command = Cli::command();
    let known: Vec<String> = std::iter::once(&command)
        .chain(command.get_subcommands())
        .flat_map(|command| command.get_arguments().filter_map(|argument| argument.get_long()))
        .map(|long| format!("--{long}"))
        .collect();
    let source = include_str!("../advice.rs");
    let word = |c: char| c.is_ascii_lowercase() || c == '-';
    let named: Vec<&str> = source
        .match_indices("--")
        .map(|(at, _)| &source[at..])
        .map(|rest| &rest[..rest.find(|c| !word(c)).unwrap_or(rest.len())])
        .collect();
    assert!(named.len() > 20, "{named:?}");
    for flag in named {
        assert!(known.iter().any(|known| known == flag), "{flag} is not among {known:?}");
    }
}
