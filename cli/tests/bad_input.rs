//! What a user can get wrong: each mistake costs one clear line on stderr and exit code 1, and
//! leaves nothing behind.

use crate::common::image::{BASE, Image, LOOP};
use crate::common::{MIB, Process, Scratch, need_kvm};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use test_support::skipped;

/// Runs the binary and checks its refusal against what it must say.
#[track_caller]
fn refused(scratch: &Scratch, args: &[&str], words: &[&str]) {
    let output = scratch.run(args);
    assert_eq!(output.code(), 1, "{args:?}: {output:#?}");
    let line = output.one_error_line();
    for word in words {
        assert!(line.contains(word), "{args:?}: {word:?} is not in: {line}");
    }
    assert_eq!(scratch.leftovers(), [] as [String; 0], "{args:?}");
}

/// Splits at spaces; `''` is an empty argument.
fn split(line: &str) -> Vec<&str> {
    line.split_whitespace().map(|word| if word == "''" { "" } else { word }).collect()
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused_in_one_line() {
    let scratch = Scratch::new();
    for (line, words) in [
        ("", &["nothing to do", "--mem SIZE"][..]),
        // Sizes.
        ("--mem", &["--mem", "value is required"]),
        ("--mem ''", &["--mem"]),
        ("--mem 0", &["the size is 0", "2M"]),
        ("--mem 0G", &["the size is 0"]),
        ("--mem 1", &["not a multiple of 2 MiB", "the nearest size is 2M"]),
        ("--mem 3M", &["not a multiple of 2 MiB", "2M and 4M"]),
        ("--mem 4097M", &["not a multiple of 2 MiB", "4G and 4098M"]),
        ("--mem 1.5", &["fraction of a byte"]),
        ("--mem 16X", &["unknown unit 'X'", "K, M, G and T"]),
        ("--mem 1E", &["unknown unit 'E'"]),
        ("--mem 16GG", &["unknown unit 'GG'"]),
        ("--mem G", &["'G' is not a size"]),
        ("--mem banana", &["'banana' is not a size"]),
        ("--mem -1G", &["'-1G' is negative"]),
        ("--mem 16777216T", &["too large"]),
        ("--mem 99999999999999999999999999999999999999999999G", &["too large"]),
        ("--mem 1G --mem 2G", &["--mem", "multiple times"]),
        // Processors.
        ("--mem 64M --cpus 0", &["0 vCPUs are out of range", "1 to 1024"]),
        ("--mem 64M --cpus -1", &["not a number of vCPUs", "1 to 1024"]),
        ("--mem 64M --cpus 100000", &["100000 vCPUs are out of range", "1 to 1024"]),
        ("--mem 64M --cpus 99999999999999999999", &["1 to 1024"]),
        ("--mem 64M --cpus two", &["not a number of vCPUs"]),
        // Words.
        ("frobnicate", &["frobnicate"]),
        ("--frobnicate", &["--frobnicate"]),
        ("--mem 64M extra", &["extra"]),
        ("--mem 64M --backing tape", &["tape", "anon, memfd or hugetlb"]),
        ("--mem 64M --auto-reclaim maybe", &["'maybe' is not a setting", "on, off"]),
        ("--mem 64M --auto-reclaim interval=1ms", &["'interval=1ms' is out of range", "100ms to 1h"]),
        ("--mem 64M --auto-reclaim keep=-1", &["'keep'", "negative"]),
        ("--auto-reclaim on", &["a launch needs --mem SIZE"]),
        // Devices.
        ("--mem 64M --elastic tape", &["unknown kind 'tape'", "llfree, balloon, balloon-huge, virtio-mem or none"]),
        ("--mem 64M --elastic balloon,boot=1M", &["'boot=1M' is not an option of balloon", "reporting=on|off"]),
        ("--mem 64M --elastic balloon,reporting=1", &["'1' is neither on nor off"]),
        ("--mem 64M --elastic balloon,stats=0s", &["stats", "10ms or more, or off"]),
        ("--mem 1G --elastic virtio-mem,boot=-1G", &["boot", "'-1G' is negative"]),
        ("--mem 1G --elastic virtio-mem,boot=3M", &["boot", "not a multiple of 2 MiB"]),
        ("--mem 64M --elastic virtio-mem", &["leaves the first 256 MiB alone", "boot= with less"]),
        ("--mem 64M --elastic none,stats=1s", &["not an option of none"]),
        ("--mem 64M --elastic llfree,start=full", &["start: 'full' is neither evicted", "nor installed"]),
        ("--mem 64M --elastic balloon,start=installed", &["'start=installed' is not an option of balloon"]),
        ("--mem 64M --elastic virtio-mem,start=installed", &["'start=installed' is not an option of virtio-mem"]),
        ("--mem 64M --elastic llfree,start=evicted,start=installed", &["'start' is set twice"]),
        ("--mem 64M --elastic none --auto-reclaim on", &["--auto-reclaim needs the table", "--elastic none"]),
        (
            "--mem 64M --elastic balloon,reporting=off --auto-reclaim on",
            &["reporting=off forbids", "leave one of them out"],
        ),
        ("--mem 64M --elastic balloon --auto-reclaim keep=1G", &["has no settings", "--auto-reclaim on"]),
        ("--mem 64M --elastic balloon --install-pool 8M", &["--install-pool", "--elastic llfree only"]),
        ("--mem 64M --elastic none --userfaultfd on", &["--userfaultfd on", "--elastic llfree only"]),
        ("--mem 64M --elastic balloon,stats=1s,stats=off", &["'stats' is set twice"]),
        ("--elastic balloon", &["a launch needs --mem SIZE"]),
        // How frames get their memory.
        ("--mem 64M --install-pool 128M", &["128 MiB is larger than the guest's memory, 64 MiB"]),
        ("--mem 64M --install-pool 3M", &["not a multiple of 2 MiB", "2M and 4M"]),
        ("--mem 64M --install-pool -8M", &["'-8M' is negative"]),
        ("--mem 64M --install-pool 8M,rate=1M/s", &["'1M/s' is no refill rate", "at least 2M/s"]),
        ("--mem 64M --install-pool 8M,rate=2M/s,rate=4M/s", &["the rate is set twice"]),
        ("--mem 64M --install-pool 8M --backing memfd", &["--install-pool needs userfaultfd", "--backing anon"]),
        ("--mem 64M --install-pool 8M --userfaultfd off", &["--install-pool needs userfaultfd", "--userfaultfd off"]),
        ("--mem 64M --on-violation log --userfaultfd off", &["--on-violation needs userfaultfd", "leave one of them"]),
        ("--mem 64M --on-violation shout", &["use stop, install or log"]),
        ("--mem 64M --userfaultfd maybe", &["use auto, on or off"]),
        ("--install-pool 8M", &["a launch needs --mem SIZE"]),
        ("--install-pool 8M status", &["--install-pool", "makes no sense before a command"]),
        ("--on-violation log demo", &["--on-violation", "after 'demo'"]),
        ("--userfaultfd on shrink --to 2M", &["--userfaultfd", "makes no sense before a command"]),
        // The sandbox, and cores.
        ("--mem 64M --seccomp loud", &["loud", "use on, log or off"]),
        ("--mem 64M --cgroup=/nonexistent", &["/nonexistent is not a cgroup v2 directory", "cgroup2"]),
        ("--mem 64M --cgroup=/etc", &["/etc is not a cgroup v2 directory"]),
        ("--mem 64M --pin a", &["'a'", "not the number of a core", "like 0,2 or 0-3"]),
        ("--mem 64M --pin 0,", &["not the number of a core"]),
        ("--mem 64M --pin -1", &["'-1'", "not the number of a core"]),
        ("--cpus 2", &["a launch needs --mem SIZE"]),
        ("--mem 64M --name a --socket /tmp/a.sock", &["--name and --socket exclude each other"]),
        ("--mem 64M status", &["--mem", "makes no sense before a command"]),
        ("--mem 64M demo", &["--mem", "after 'demo'"]),
        ("--workload stop", &["a launch needs --mem SIZE"]),
        ("--mem 64M --workload ''", &["no commands given"]),
        ("--mem 64M --workload dance", &["unknown command 'dance'", "alloc, verify"]),
        ("--mem 64M --workload alloc", &["'alloc' needs a size"]),
        ("--mem 64M --workload stop,verify", &["'stop' must be the last command"]),
        // Commands.
        ("shrink", &["--to", "--by"]),
        ("shrink --to 1G --by 1G", &["--to", "--by"]),
        ("shrink --to 0", &["the size is 0"]),
        ("shrink --by 0", &["the size is 0"]),
        ("shrink --to -1G", &["'-1G' is negative"]),
        ("shrink --by -1G", &["'-1G' is negative"]),
        ("shrink --to 1M", &["not a multiple of 2 MiB"]),
        ("shrink --to 1G --wait", &["--wait"]),
        ("shrink --to 1G --wait 10", &["'10' has no known unit", "ms, s, m (minutes) and h"]),
        ("shrink --to 1G --wait -1s", &["negative"]),
        ("shrink --to 1G --wait 25h", &["24h"]),
        ("grow", &["--to"]),
        ("grow --to 2G --by 1G", &["--to", "--by"]),
        ("grow --to 5X", &["unknown unit 'X'"]),
        ("reclaim --by 0", &["the size is 0"]),
        ("status --watch 0s", &["10ms"]),
        ("status --watch fast", &["'fast' is not a time"]),
        ("status now", &["now"]),
        ("validate now", &["now"]),
        ("auto-reclaim", &["SPEC"]),
        ("auto-reclaim rate=1/s", &["'rate=1/s' is too slow", "2M/s"]),
        ("list all", &["all"]),
        ("list --name a", &["unexpected argument"]),
        ("stop now", &["now"]),
        ("guest", &["a command is missing"]),
        ("guest dance", &["dance"]),
        ("guest alloc", &["SIZE"]),
        ("guest alloc 0", &["0 bytes"]),
        ("guest alloc -4M", &["negative"]),
        ("guest alloc 4M --order 11", &["'11' is not an order", "0 (4 KiB blocks) to 10"]),
        ("guest alloc 4M --order -1", &["'-1' is not an order"]),
        ("guest free", &["SIZE"]),
        ("guest free some", &["'some' is not a size"]),
        ("guest free 0", &["0 bytes"]),
        ("guest churn 0s", &["for 0 seconds"]),
        ("guest churn", &["TIME"]),
        ("guest burst 0", &["0 bytes"]),
        ("guest stream 0s", &["for 0 seconds"]),
        ("guest ftq 1s --quantum 0s", &["a quantum is"]),
        // A VM that does not exist.
        ("status --name nobody", &["no VM is called 'nobody'"]),
        ("status --name a/b", &["'a/b' is not a VM name"]),
        ("stop --socket /nonexistent/x.sock", &["no VM listens on /nonexistent/x.sock"]),
        ("status --socket /dev/null", &["/dev/null"]),
        // A demo that could not show anything.
        ("demo --mem 0", &["the size is 0"]),
        ("demo --mem 3M", &["not a multiple of 2 MiB"]),
        ("demo --mem 64M", &["--mem 64 MiB is too small", "128 MiB"]),
        ("demo --mem 256M --touch 0", &["the size is 0"]),
        ("demo --mem 256M --touch 2M", &["--touch 2 MiB is too small", "4 MiB"]),
        ("demo --mem 256M --touch 256M", &["--touch 256 MiB leaves the guest no memory", "240 MiB"]),
        ("demo --mem 256M --touch 1T", &["--touch 1 TiB leaves the guest no memory"]),
        ("demo --mem 256M --cpus 0", &["1 to 1024"]),
        ("demo --mem 256M --name a", &["unexpected argument", "--name"]),
        ("demo --mem 256M --socket a", &["unexpected argument", "--socket"]),
    ] {
        refused(&scratch, &split(line), words);
    }
}

#[test]
fn control_characters_of_an_argument_do_not_reach_the_terminal() {
    let scratch = Scratch::new();
    for args in [&["--mem", "\x1b[2J16G\n"][..], &["--frob\x1b[2J"], &["--name", "\x1b\n", "stop"]] {
        let output = scratch.run(args).exits(1);
        assert!(!output.one_error_line().contains('\x1b'), "{output:?}");
    }
}

#[test]
fn a_name_or_socket_that_cannot_be_is_refused() {
    let scratch = Scratch::new();
    let launch = |args: &[&str], words: &[&str]| refused(&scratch, &[&["--mem", "64M"], args].concat(), words);
    for name in ["", ".", "..", "-", ".x", "a/b", "../x", "/tmp/x", "a b", "ä", &"x".repeat(65)] {
        launch(&[&format!("--name={name}")], &["is not a VM name", "up to 64 letters"]);
    }
    launch(&["--socket", ""], &["--socket"]);
    launch(&["--socket", &format!("/tmp/{}", "x".repeat(103))], &["108 bytes", "107", "shorter"]);
    launch(&["--socket", "/nonexistent/dir/x.sock"], &["/nonexistent/dir/x.sock", "No such file or directory"]);
    let directory = scratch.path().display().to_string();
    launch(&["--socket", &directory], &[&directory, "not a socket"]);
    let file = scratch.file("precious", b"data").display().to_string();
    launch(&["--socket", &file], &[&file, "not a socket", "choose another path"]);
    assert_eq!(std::fs::read(&file).expect("still there"), b"data");
    let lock = scratch.file("Cargo.lock", b"# precious").display().to_string();
    launch(&["--socket", lock.trim_end_matches(".lock")], &["Cargo.lock", "choose another path"]);
    assert_eq!(std::fs::read(&lock).expect("still there"), b"# precious");
    let below_a_file = format!("{file}/x.sock");
    launch(&["--socket", &below_a_file], &[&below_a_file]);
    let mut left: Vec<_> =
        std::fs::read_dir(scratch.path()).expect("scratch").map(|e| e.expect("entry").file_name()).collect();
    left.retain(|name| name != "llfree-vmm");
    left.sort();
    assert_eq!(left, ["Cargo.lock", "precious"]);
}

#[test]
fn a_runtime_directory_that_others_may_enter_gets_no_vm_and_is_not_looked_into() {
    let scratch = Scratch::new();
    let dir = scratch.path().join("llfree-vmm");
    std::fs::create_dir(&dir).expect("scratch");
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).expect("ours");
    refused(&scratch, &["--mem", "64M"], &["llfree-vmm", "0700", "0777"]);
    let list = scratch.run(&["list"]).exits(0);
    assert!(list.stderr.contains("WARN") && list.stderr.contains("0777"), "{list:#?}");
    std::fs::remove_dir(&dir).expect("empty");
    std::os::unix::fs::symlink("/tmp", &dir).expect("scratch");
    refused_at_link(&scratch);
}

/// The link's target is not looked into: it is not one of our directories.
#[track_caller]
fn refused_at_link(scratch: &Scratch) {
    let output = scratch.run(&["--mem", "64M"]).exits(1);
    assert!(output.one_error_line().contains("it is not a directory"), "{output:?}");
}

#[test]
fn more_memory_than_there_can_be_is_refused() {
    need_kvm!();
    let scratch = Scratch::new();
    for (mem, words) in [
        ("2M", &["2 MiB is too small", "at least 4 MiB"][..]),
        ("65T", &["64 TiB"]),
        ("16777214T", &["64 TiB"]),
        ("64T", &["64 TiB", "less"]),
        ("16T", &["16 TiB", "less"]),
    ] {
        refused(&scratch, &["--mem", mem], words);
    }
    let mut command = std::process::Command::new("sh");
    scratch.prepare(command.args([
        "-c",
        r#"ulimit -v 4000000; exec "$0" --mem 16G"#,
        env!("CARGO_BIN_EXE_llfree-vmm"),
    ]));
    let output = Process::spawn(&mut command).wait().exits(1);
    assert!(output.one_error_line().contains("ulimit -v"), "{output:?}");
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    need_kvm!();
    let scratch = Scratch::new();
    let good = Image::new(&[LOOP]);
    let file = |name: &str, bytes: &[u8]| scratch.file(name, bytes).display().to_string();
    let image = |name: &str, image: Image| file(name, &image.bytes());
    let missing = scratch.path().join("missing").display().to_string();
    let directory = scratch.path().display().to_string();
    for (path, words) in [
        (missing, &["missing", "no such file"][..]),
        (directory, &["is a directory"]),
        ("/dev/null".to_owned(), &["/dev/null", "not a regular file"]),
        (file("empty", b""), &["is empty"]),
        (file("script", b"#!/bin/sh\nexit 0\n"), &["not an ELF file", "23 21"]),
        (file("short", &good.bytes()[..40]), &["cut off"]),
        (file("truncated", &good.bytes()[..240]), &["truncated"]),
        (image("32-bit", Image { class: 1, ..good.clone() }), &["32-bit ELF", "x86_64"]),
        (image("arm", Image { machine: 183, ..good.clone() }), &["AArch64", "x86_64"]),
        (image("pie", Image { kind: 3, ..good.clone() }), &["position-independent", "-no-pie"]),
        (image("low", Image { address: 0x1000, ..good.clone() }), &["below 0x200000"]),
        (image("high", Image { address: 64 * MIB, ..good.clone() }), &["outside the 0x4000000 bytes of RAM"]),
        (image("large", Image { memory_bytes: 62 * MIB + 1, ..good.clone() }), &["outside the 0x4000000 bytes of RAM"]),
        (image("twice", Image { again_at: Some(BASE + 1), ..good.clone() }), &["overlap"]),
        (image("stranger", Image { abi: None, ..good.clone() }), &["no ABI note"]),
        (image("future", Image { abi: Some(7), ..good.clone() }), &["ABI version 7", "VMM speaks 2"]),
        ("/proc/self/exe".to_owned(), &["/proc/self/exe", "position-independent"]),
    ] {
        refused(&scratch, &["--mem", "64M", "--kernel", &path], words);
    }
}

#[test]
fn who_may_not_use_kvm_is_told_what_to_do() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        skipped("only root can try as somebody else");
        return;
    }
    need_kvm!();
    let scratch = Scratch::new();
    for (path, mode) in [("", 0o755), ("run", 0o777), ("bin", 0o755)] {
        let path = scratch.path().join(path);
        std::fs::create_dir_all(&path).expect("scratch");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("ours");
    }
    // A copy, because the build's own directory may not be accessible to every user.
    let binary = scratch.path().join("bin/llfree-vmm");
    std::fs::copy(env!("CARGO_BIN_EXE_llfree-vmm"), &binary).expect("room in /tmp");
    let as_nobody = |command: &mut std::process::Command| {
        scratch.prepare(command).env("LLFREE_VMM_DIR", scratch.path().join("run/llfree-vmm")).uid(NOBODY).gid(NOBODY);
        Process::spawn(command).wait()
    };
    let test = as_nobody(std::process::Command::new("sh").args(["-c", "exec 3<>/dev/kvm"]));
    if test.code() == 0 {
        skipped("everybody may use /dev/kvm here");
        return;
    }
    for args in [&["--mem", "64M"][..], &["demo", "--mem", "256M"]] {
        let output = as_nobody(std::process::Command::new(&binary).args(args)).exits(1);
        let line = output.one_error_line();
        assert!(line.contains("no permission to open /dev/kvm") && line.contains("usermod -aG kvm"), "{line}");
    }
    let left = std::fs::read_dir(scratch.path().join("run/llfree-vmm")).map_or(0, Iterator::count);
    assert_eq!(left, 0);
}

#[test]
fn help_and_version_are_no_errors() {
    let scratch = Scratch::new();
    for (args, word) in [
        (&["--help"][..], "Examples:"),
        (&["-h"], "Usage:"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
        (&["shrink", "--help"], "--by"),
        (&["guest", "--help"], "churn"),
        (&["demo", "--help"], "--touch"),
    ] {
        let output = scratch.run(args).exits(0);
        assert!(output.stdout.contains(word) && output.stderr.is_empty(), "{output:#?}");
    }
}
