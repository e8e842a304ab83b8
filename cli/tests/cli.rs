//! The command line: every example that the help shows, and every refusal on one line.

use cli::args::{ClientCommand, Command, GuestCommand, parse};
use cli::exit;
use cli::workload::FreeAmount;
use llfree_base::units::Bytes;
use llfree_monitor::memory::Backing;
use std::time::Duration;

/// Splits as a shell would, as far as the examples need it.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().expect("never empty").push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn refusal(line: &str) -> String {
    let end = parse(words(line)).expect_err(line);
    assert_eq!(end.code, exit::ERROR, "{line}");
    assert_eq!(end.text.matches('\n').count(), 1, "one line: {}", end.text);
    assert!(end.text.starts_with("llfree-vmm: error: "), "{}", end.text);
    end.text
}

#[test]
fn every_example_of_the_help_is_understood() {
    let help = parse(["llfree-vmm", "--help"]).expect_err("help");
    assert_eq!(help.code, exit::OK);
    println!("{}", help.text);
    let examples = help.text.split("Examples:\n").nth(1).expect("examples");
    let mut count = 0;
    for line in examples.lines().take_while(|line| !line.is_empty()) {
        let example = line.trim().split("  ").next().expect("a command");
        parse(words(example)).expect(example);
        count += 1;
    }
    assert!(count >= 8, "{}", help.text);
}

#[test]
fn every_command_is_understood() {
    for line in [
        "--mem 16G",
        "--mem 16G --cpus 2 --name web --kernel guest.elf --backing memfd -v",
        "--mem 16G --socket /tmp/x.sock --workload \"alloc 8G, verify, stop\" -vv --json",
        "--mem 16G --elastic balloon,reporting=on,deflate-on-oom=on,coalesce=off,stats=off",
        "--mem 16G --elastic virtio-mem,boot=1G",
        "shrink --to 4G",
        "shrink --by 2G --wait 10s --json",
        "--json shrink --by 2G",
        "--name a shrink --by 2G",
        "grow --to 16G --name a",
        "reclaim",
        "reclaim --by 1G",
        "status",
        "status --watch 1s --socket /x",
        "list --json",
        "guest alloc 8G",
        "guest alloc 8G --order 3",
        "guest alloc --order 0 8G",
        "guest verify",
        "guest free all",
        "guest free 1.5G --random",
        "guest churn 10s",
        "guest burst 1G --touch frames --keep --single",
        "guest stream 2s --bytes 96M --beside 64M",
        "guest ftq 100ms --quantum 0.1ms",
        "--mem 1G --pin 0,1",
        "guest idle",
        "guest stats --json",
        "stop",
        "demo",
        "demo --mem 16G --touch 8G --json",
    ] {
        parse(words(&format!("llfree-vmm {line}"))).expect(line);
    }
}

#[test]
fn values_arrive() {
    let launch = parse(words("llfree-vmm --mem 1.5G --cpus 3 --backing hugetlb")).expect("a launch");
    assert_eq!(launch.launch.mem, Some(Bytes(3 << 29)));
    assert_eq!((launch.launch.cpus(), launch.launch.backing()), (3, Backing::Hugetlb));
    assert_eq!(launch.command, None);

    let shrink = parse(words("llfree-vmm shrink --to 4G --wait 500ms --name a")).expect("a shrink");
    assert_eq!(shrink.global.name.as_deref(), Some("a"));
    let Some(Command::Client(ClientCommand::Shrink(args))) = shrink.command else { panic!("a shrink") };
    assert_eq!((args.to, args.by), (Some(Bytes(4 << 30)), None));
    assert_eq!((args.patience.wait, args.patience.once), (Duration::from_millis(500), false));

    let free = parse(words("llfree-vmm guest free all --random")).expect("a free");
    let Some(Command::Client(ClientCommand::Guest { command, .. })) = free.command else { panic!("a command") };
    assert!(matches!(command, GuestCommand::Free { amount: FreeAmount::All, random: true, .. }));
    let alloc = parse(words("llfree-vmm guest alloc 8G")).expect("an alloc");
    let Some(Command::Client(ClientCommand::Guest { command, .. })) = alloc.command else { panic!("a command") };
    assert!(matches!(command, GuestCommand::Alloc { bytes: 0x2_0000_0000, order: 9, .. }));
    let pin = parse(words("llfree-vmm --mem 1G --pin 3,0-2,5")).expect("a launch");
    assert_eq!(pin.launch.pin(), [3, 0, 1, 2, 5]);
}

#[test]
fn a_vm_may_be_named_before_after_or_by_the_command() {
    for line in [
        "--name web status",
        "status web",
        "status --name web",
        "shrink web --to 1G",
        "shrink --to 1G web",
        "resize web --to 1G",
        "grow web --by 1G",
        "auto-reclaim on web",
        "guest alloc 1G web",
        "guest alloc 1G --name web",
        "guest --name web stats",
        "guest stats web",
        "wait web --for end",
        "logs web -f -n 5",
        "console web",
        "events web",
        "pause web",
        "stop --name web",
    ] {
        let cli = parse(words(&format!("llfree-vmm {line}"))).unwrap_or_else(|end| panic!("{line}: {}", end.text));
        assert_eq!(cli.global.name.as_deref(), Some("web"), "{line}");
    }
    let socket = parse(words("llfree-vmm reclaim --socket /x")).expect("a reclaim");
    assert_eq!(socket.global.socket.as_deref(), Some(std::path::Path::new("/x")));
    let stop = parse(words("llfree-vmm stop a b c --force")).expect("a stop");
    let Some(Command::Client(ClientCommand::Stop(args))) = stop.command else { panic!("a stop") };
    assert_eq!((args.vms.len(), args.force), (3, true));
    assert_eq!(
        parse(words("llfree-vmm ls")).expect("a list").command,
        parse(words("llfree-vmm list")).expect("a list").command
    );
}

#[test]
fn help_offers_only_what_is_taken_and_tells_of_any_command() {
    let help = |line: &str| {
        let end = parse(words(&format!("llfree-vmm {line}"))).expect_err("help");
        assert_eq!(end.code, exit::OK, "{line}: {}", end.text);
        end.text
    };
    assert_eq!(help("help shrink"), help("shrink --help"));
    assert_eq!(help("help guest alloc"), help("guest alloc --help"));
    for command in ["list", "demo"] {
        let text = help(&format!("{command} --help"));
        assert!(!text.contains("--name") && !text.contains("--socket"), "{text}");
    }
    for command in ["status", "stop", "guest verify"] {
        assert!(help(&format!("help {command}")).contains("--socket"), "{command}");
    }
}

#[test]
fn refusals_are_one_line_and_teach() {
    for (line, part) in [
        ("", "nothing to do; launch a VM with --mem SIZE, or give a command"),
        ("--cpus 2", "a launch needs --mem SIZE, like --mem 16G"),
        ("--mem 16X", "unknown unit 'X' in '16X'; the units are K, M, G and T"),
        ("--mem 0", "the size is 0; memory comes in steps of 2 MiB"),
        ("--mem 3M", "the nearest sizes are 2M and 4M"),
        ("--mem -1G", "'-1G' is negative"),
        ("--mem NaN", "'NaN' is not a size"),
        ("--mem 99999999999T", "too large"),
        ("--mem 1G --cpus 0", "0 vCPUs are out of range; choose 1 to 1024"),
        ("--mem 1G --cpus 1025", "1025 vCPUs are out of range"),
        ("--mem 1G --cpus many", "not a number of vCPUs"),
        ("--mem 1G --cpus -2", "not a number of vCPUs"),
        ("--mem 1G --backing disk", "unknown memory backing `disk`: use anon, memfd or hugetlb"),
        ("--mem 1G --workload \"allok 1G\"", "unknown command 'allok'"),
        ("--mem 1G --name a --socket /b", "--name and --socket exclude each other"),
        ("--name a status --socket /b", "name the VM once"),
        ("--name a status b", "name the VM once"),
        ("status a --name b", "cannot be used with"),
        ("stop --all a", "cannot be used with"),
        ("guest --name a stats b", "name the VM once"),
        ("--mem 1G --limit 2G", "--limit 2 GiB is above --mem 1 GiB"),
        ("--mem 1G --serial disk", "use stdio, file:PATH, socket or off"),
        ("--detach status", "--detach is for a launch"),
        ("wait --for ever", "invalid value 'ever'"),
        ("--mem 1G --pin 3-1", "the range 3-1 is empty; write 1-3"),
        ("list --name a", "unexpected argument '--name'"),
        ("--name a list", "list shows all VMs"),
        ("--mem 1G status", "--mem is for a launch"),
        ("--mem 1G demo", "write --mem after 'demo'"),
        ("shrink", "--to <SIZE>"),
        ("shrink --to 1G --by 1G", "cannot be used with"),
        ("shrink --to -1G", "'-1G' is negative"),
        ("shrink --to 1G --wait 10", "'10' has no known unit"),
        ("grow", "--to <SIZE>"),
        ("grow --to 0", "the size is 0"),
        ("status --watch 0s", "the shortest interval is 10ms"),
        ("guest", "a command is missing"),
        ("guest fly", "unrecognized subcommand 'fly'"),
        ("guest alloc 0", "does nothing"),
        ("guest alloc -5G", "'-5G' is negative"),
        ("guest alloc 1G --order 11", "'11' is not an order"),
        ("guest free", "<SIZE|all>"),
        ("guest churn 0s", "for 0 seconds does nothing"),
        ("guest ftq 1s --quantum 2s", "a quantum is 10us to 1s"),
        ("guest stream 1s --bytes 0", "'stream' of 0 bytes does nothing"),
        ("guest burst 1G --touch all", "invalid value 'all'"),
        ("status --pin 1", "--pin"),
        ("--mem 1G --pin a", "invalid value 'a'"),
        ("fly", "unrecognized subcommand 'fly'"),
        ("shrnk --to 1G", "a similar subcommand exists: 'shrink'"),
        ("--fly", "unexpected argument '--fly'"),
    ] {
        let text = refusal(&format!("llfree-vmm {line}"));
        println!("{}", text.trim_end());
        assert!(text.contains(part), "{line}: {text}");
    }
}

#[test]
fn arguments_that_are_no_text_are_refused_not_fatal() {
    use std::os::unix::ffi::OsStringExt;
    let bytes = std::ffi::OsString::from_vec(vec![0xff, b'\n', 0x1b]);
    for flag in ["--mem", "--name", "--workload"] {
        let end = parse(["llfree-vmm".into(), flag.into(), bytes.clone()]).expect_err("not text");
        assert_eq!((end.code, end.text.matches('\n').count()), (exit::ERROR, 1), "{}", end.text);
    }
}

proptest::proptest! {
    #[test]
    fn no_arguments_panic(args in proptest::collection::vec("(--[a-z]{2,6}|-?[0-9]{0,22}[KMGTms]?|\
        shrink|guest|alloc|free|churn|status|demo|all|.{0,9})", 0..6)) {
        if let Err(end) = parse(std::iter::once("llfree-vmm".to_owned()).chain(args)) {
            proptest::prop_assert!(end.code == exit::OK || end.text.matches('\n').count() == 1, "{}", end.text);
        }
    }
}
