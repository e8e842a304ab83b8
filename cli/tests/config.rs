//! `--config`: a launch's flags in a file, what is wrong there, and `--print-config`, which writes one.

use crate::common::{Scratch, need_kvm, wait_for};
use rustix::fs::{CWD, FileType, mknodat};
use rustix::io::ioctl_fionread;
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::symlink;

/// A line of a file, and words of its refusal.
#[track_caller]
fn refused(scratch: &Scratch, text: &str, flags: &[&str], words: &[&str]) {
    scratch.file("vm.toml", text.as_bytes());
    let output = scratch.run(&[&["--config", "vm.toml"], flags].concat()).exits(1);
    let line = output.one_error_line();
    for word in words {
        assert!(line.contains(word), "{text:?} {flags:?}: {word:?} is not in: {line}");
    }
}

#[test]
fn what_is_wrong_in_a_config_is_said_with_file_line_and_key() {
    let scratch = Scratch::new();
    for (text, words) in [
        ("mem = \"1G\"\n\ncpu = 2", &["vm.toml:3: cpu: there is no such key; 'cpus' is one"][..]),
        ("mem = \"1G\"\nfrobnicate = 1", &["vm.toml:2: frobnicate: there is no such key"]),
        ("mem = \"1G\"\nCPUS = 2", &["vm.toml:2: CPUS: there is no such key"]),
        ("mem = \"1G\"\n\"\\u001b[2J\" = 2", &["vm.toml:2:", "there is no such key"]),
        ("mem = \"1G\"\n\"cpus=2 --mem\" = 2", &["vm.toml:2:", "there is no such key"]),
        ("help = true", &["vm.toml:1: help: it is for the command line only"]),
        ("mem = \"1G\"\nconfig = \"x\"", &["vm.toml:2: config: it is for the command line only"]),
        ("json = true", &["vm.toml:1: json: it is for the command line only"]),
        ("mem = true", &["vm.toml:1: mem: it takes text or a number, not true or false"]),
        ("mem = 1.5", &["vm.toml:1: mem: it takes text or a number, not a fraction"]),
        ("mem = [\"1G\"]", &["vm.toml:1: mem: it takes text or a number, not a list"]),
        ("[mem]\nsize = 1", &["vm.toml:1: mem: it takes text or a number, not a table"]),
        ("mem.size = 1", &["vm.toml:1: mem: it takes text or a number, not a table"]),
        ("mem = 2026-01-01", &["vm.toml:1: mem: it takes text or a number, not a date"]),
        ("mem = \"3M\"", &["vm.toml:1: mem: invalid value '3M'", "2M and 4M"]),
        ("mem = \"-1G\"", &["vm.toml:1: mem:", "negative"]),
        ("mem = \"\"", &["vm.toml:1: mem:"]),
        ("\n\nmem = 12", &["vm.toml:3: mem:", "not a multiple of 2 MiB"]),
        ("mem = 0x40000000", &["vm.toml:1: mem: it takes text or a number, not a number of this kind"]),
        ("mem = \"1G\"\ncpus = \"two\"", &["vm.toml:2: cpus:", "not a number of vCPUs"]),
        ("mem = \"1G\"\ndetach = \"yes\"", &["vm.toml:2: detach: it takes true or false, not text"]),
        ("mem = \"1G\"\ndetach = 1", &["vm.toml:2: detach: it takes true or false"]),
        (
            "mem = \"1G\"\ndisk = [\"a\", 1.5]",
            &["vm.toml:2: disk: it takes text or a number in its list, not a fraction"],
        ),
        ("mem = \"1G\"\ndisk = {path = \"a\"}", &["vm.toml:2: disk: it takes text or a number or a list", "table"]),
        // What clap says of several flags together.
        ("mem = \"1G\"\nlimit = \"2G\"", &["vm.toml:2: limit: --limit 2 GiB is above --mem 1 GiB"]),
        ("mem = \"1G\"\nmetrics-interval = \"5s\"", &["vm.toml:", "--metrics-file"]),
        ("mem = \"1G\"\nname = \"a\"\nsocket = \"b\"", &["vm.toml:2: name: --name and --socket exclude each other"]),
        ("cpus = 2", &["vm.toml: a launch needs --mem SIZE"]),
        ("", &["vm.toml: a launch needs --mem SIZE"]),
        // No TOML.
        ("mem = 1G", &["vm.toml:1:"]),
        ("mem = \"1G\"\ncpus", &["vm.toml:2:"]),
        ("mem = \"1G\"\nmem = \"2G\"", &["vm.toml:2:", "duplicate"]),
        ("mem = \"1G", &["vm.toml:1:"]),
        ("\0", &["vm.toml:1:"]),
    ] {
        refused(&scratch, text, &[], words);
    }
    refused(
        &scratch,
        &format!("# {}\n", "x".repeat(70_000)),
        &[],
        &["cannot read the config vm.toml", "larger than 64 KiB"],
    );
    scratch.file("binary.toml", b"mem = \"\xff\"");
    scratch.run(&["--config", "binary.toml"]).exits(1).one_error_line();
    // Nobody writes into it, and nobody waits for that.
    mknodat(CWD, scratch.path().join("pipe"), FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    let _socket = std::os::unix::net::UnixListener::bind(scratch.path().join("socket")).expect("a socket");
    for (path, words) in [
        ("absent.toml", "No such file"),
        (".", "it is a directory; name a regular file"),
        ("pipe", "cannot read the config pipe: it is a pipe; name a regular file"),
        ("socket", "it is a socket; name a regular file"),
        ("/dev/zero", "it is a device; name a regular file"),
        ("", "--config"),
    ] {
        let output = scratch.run(&["--config", path]).exits(1);
        assert!(output.one_error_line().contains(words), "{output:#?}");
    }
}

#[test]
fn a_config_may_come_by_a_pipe_that_the_launch_was_given() {
    let scratch = Scratch::new();
    symlink("/dev/stdin", scratch.path().join("link")).expect("scratch");
    for path in ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0", "link"] {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let mut command = scratch.command(&["--config", path, "--print-config"]);
        writer.write_all(b"mem = ").expect("a pipe");
        let launch = command.stdin(reader.try_clone().expect("a pipe")).spawn().expect("the binary starts");
        drop(command);
        // The writer may pause in the middle of it.
        wait_for("the first part is read", || (ioctl_fionread(&reader).expect("a pipe") == 0).then_some(()));
        drop(reader);
        // It fails where nobody reads on, which shows below.
        let _ = writer.write_all(b"\"1G\"\n");
        drop(writer);
        let output = launch.wait_with_output().expect("a child");
        let said = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(said, ("mem = \"1G\"\n".into(), "".into()), "{path}");
    }
    // One with a name whose writer is through and gone: nobody waits for another.
    let name = scratch.path().join("pipe");
    mknodat(CWD, &name, FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    let mut both = File::options().read(true).write(true).open(&name).expect("ours");
    let reader = File::open(&name).expect("the other end is open");
    both.write_all(b"mem = \"2G\"\n").expect("a pipe");
    drop(both);
    let output = scratch.command(&["--config", "/dev/stdin", "--print-config"]).stdin(reader).output();
    assert_eq!(String::from_utf8_lossy(&output.expect("the binary starts").stdout), "mem = \"2G\"\n");
}

#[test]
fn a_command_line_may_repeat_a_config_and_not_contradict_it() {
    let scratch = Scratch::new();
    let text = "# mine\nmem = \"1G\"\nname = \"web\"\ndisk = [\"a\", \"b,ro\"]\ndetach = false\ncpus = 1";
    for (flags, words) in [
        (&["--mem", "2G"][..], "vm.toml:2: mem = \"1G\" contradicts --mem 2G on the command line; say it in one place"),
        (&["--name", "db"], "vm.toml:3: name = \"web\" contradicts --name db"),
        (&["--disk", "a"], "vm.toml:4: disk = [\"a\", \"b,ro\"] contradicts --disk a"),
        (&["--detach"], "vm.toml:5: detach = false contradicts --detach on"),
        (&["--cpus", "2"], "vm.toml:6: cpus = 1 contradicts --cpus 2"),
        (&["--limit", "2G"], "vm.toml:2: mem: --limit 2 GiB is above --mem 1 GiB"),
        // What is wrong on the command line is not the file's.
        (&["--cpus", "two"], "error: invalid value 'two'"),
        (&["--frobnicate"], "error: unexpected argument"),
    ] {
        refused(&scratch, text, flags, &[words]);
    }
    scratch.file("vm.toml", text.as_bytes());
    let flags = ["--name", "web", "--mem=1G", "--disk", "a", "--disk", "b,ro", "--limit", "512M", "--print-config"];
    let printed = scratch.run(&[&["--config", "vm.toml"], &flags[..]].concat()).exits(0);
    let expected = "name = \"web\"\nmem = \"1G\"\nlimit = \"512M\"\ncpus = 1\ndisk = [\"a\", \"b,ro\"]\n";
    assert_eq!(printed.stdout, expected);
    for line in ["status --config vm.toml", "--config vm.toml status", "--print-config list"] {
        let output = scratch.run(&line.split(' ').collect::<Vec<_>>()).exits(1);
        output.one_error_line();
    }
}

#[test]
fn a_printed_config_says_what_the_flags_said() {
    let scratch = Scratch::new();
    let all = [
        ("--name", "web-1"),
        ("--mem", "16G"),
        ("--limit", "1073741824"),
        ("--cpus", "04"),
        ("--kernel", "/boot/a \"quoted\" \\ name"),
        ("--append", "console=ttyS0 -- 'x'\ty=\u{e9}\n"),
        ("--disk", "a.img,ro"),
        ("--disk", "b.img"),
        ("--net", "tap=tap0"),
        ("--workload", "alloc 1G, verify"),
        ("--elastic", "balloon,stats=1s"),
        ("--auto-reclaim", "interval=5s,min-age=2,keep=64M,rate=4G/s"),
        ("--pin", "0-1,3"),
        ("--pin", "2"),
        ("--install-pool", "64M,rate=4G/s"),
        ("--on-violation", "stop"),
        ("--userfaultfd", "auto"),
        ("--seccomp", "log"),
        ("--ready", "agent"),
        ("--log-file", "'"),
        ("--serial", "file:x"),
        ("--metrics-file", "m.prom"),
        ("--metrics-interval", "5s"),
    ];
    let flags: Vec<String> = all.iter().map(|(flag, value)| format!("{flag}={value}")).collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["--detach", "--cgroup", "--print-config"]).collect();
    let printed = scratch.run(&flags).exits(0).stdout;
    assert!(printed.contains("limit = 1073741824\n") && printed.contains("cpus = \"04\"\n"), "{printed}");
    assert!(printed.contains("detach = true\n") && printed.contains("cgroup = \"auto\"\n"), "{printed}");
    assert!(printed.contains("disk = [\"a.img,ro\", \"b.img\"]\n"), "{printed}");
    scratch.file("again.toml", printed.as_bytes());
    assert_eq!(scratch.run(&["--config", "again.toml", "--print-config"]).exits(0).stdout, printed);
    // And what is parsed is the same.
    let parse = |args: &[&str]| cli::args::parse([&["llfree-vmm"], args].concat()).expect("it is complete").launch;
    let path = scratch.path().join("again.toml");
    let read = parse(&["--config", path.to_str().expect("text")]);
    let typed = parse(&flags[..flags.len() - 1]);
    assert_eq!(cli::args::LaunchArgs { config: None, ..read }, typed);
    let object = scratch.run(&["--config", "again.toml", "--print-config", "--json"]).exits(0).json();
    assert_eq!((&object["cpus"], &object["detach"]), (&json!("04"), &json!(true)));
    assert_eq!(object["disk"], json!(["a.img,ro", "b.img"]));
}

#[test]
fn a_vm_is_as_its_config_says() {
    need_kvm!();
    let scratch = Scratch::new();
    let text = "name = \"web\"\nmem = 67_108_864\ncpus = 1\nlimit = \"32M\"\nauto-reclaim = \"on\"\n";
    scratch.file("vm.toml", text.as_bytes());
    let vm = scratch.launch("--config vm.toml --name web");
    let status = vm.status();
    assert_eq!((&status["name"], &status["memory_bytes"]), (&json!("web"), &json!(64 << 20)));
    assert_eq!((&status["limit_bytes"], &status["auto_reclaim"]["on"]), (&json!(32 << 20), &json!(true)));
    vm.stop();
}
