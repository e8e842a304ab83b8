//! The binary as a client: what it prints, and its exit codes, with the test playing the VM.

use llfree_base::check::Check;
use llfree_base::choices::{Backing, OnViolation};
use llfree_base::counters::{CallCounts, DiskCounts, ExitCounts, MonitorCounts, SupplyCounts};
use llfree_control::protocol::{ErrorKind, Reply, Request};
use llfree_control::report::{
    BadPage, DiskStatus, ElasticKind, Enforcement, FindingReport, GuestOutcome, GuestReport, InstallPoolStatus,
    ReclaimReport, ResizeReport, Shortfall, StatusReport, ValidateReport, VcpuState, VcpuStatus,
};
use llfree_control::socket::Claim;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

/// Answers every request with one reply, one client after the other, as long as the test lives.
struct Vm {
    dir: tempfile::TempDir,
    path: PathBuf,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Vm {
    fn answering(reply: Reply) -> Self {
        let dir = tempfile::Builder::new().prefix("vm").tempdir_in("/tmp").expect("a scratch directory");
        std::fs::create_dir(dir.path().join("llfree-vmm")).expect("fresh");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(dir.path().join("llfree-vmm"), mode).expect("ours");
        // Unlikely to be a name that a real VM on this machine has.
        let name = format!("test-{}-{}", std::process::id(), fastrand::u32(..));
        let claim = Claim::by_name(&dir.path().join("llfree-vmm"), &name).expect("free");
        let path = claim.path().to_owned();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            let listener = claim.listener().expect("a descriptor");
            for stream in listener.incoming() {
                let stream = stream.expect("a client");
                let mut lines = BufReader::new(&stream).lines();
                while let Some(Ok(line)) = lines.next() {
                    let request = Request::from_line(line.as_bytes()).expect("a request");
                    log.lock().expect("no panic").push(request.clone());
                    let reply = if request == Request::Stop { Reply::Stopping } else { reply.clone() };
                    let _ = (&stream).write_all(reply.to_line().as_bytes());
                    if request == Request::Stop {
                        return;
                    }
                }
            }
        });
        Self { dir, path, asked }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_llfree-vmm"));
        command.arg("--socket").arg(&self.path).args(line.split(' '));
        command.env("XDG_RUNTIME_DIR", self.dir.path()).env_remove("RUST_LOG");
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().expect("it runs")
    }

    fn text(&self, line: &str, code: i32) -> String {
        let output = self.run(line);
        let errors = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(code), "{line}: {errors}");
        String::from_utf8(output.stdout).expect("text") + &errors
    }
}

fn resize(complete: bool) -> Reply {
    Reply::Resize(ResizeReport {
        target_bytes: 1 << 30,
        actual_bytes: if complete { 1 << 30 } else { 3 << 29 },
        reclaimable_now_bytes: Some(0),
        complete,
        shortfall: (!complete).then(|| Shortfall {
            in_use_bytes: Some(1 << 30),
            fragmented_bytes: Some(512 << 20),
            wording: "the guest uses 1 GiB, and 512 MiB of free memory lie in partly used frames".to_owned(),
        }),
        pursued: false,
        huge_frames: 7000,
        freed_bytes: 7 << 30,
        duration_us: 42_000,
        waited_us: 0,
        guest: None,
    })
}

fn status() -> StatusReport {
    StatusReport {
        name: "vm0".to_owned(),
        pid: 4242,
        uptime_ms: 61_500,
        backing: Backing::Anon.into(),
        memory_bytes: 16 << 30,
        limit_bytes: 4 << 30,
        resident_bytes: (1 << 30) + (60 << 20),
        huge_page_bytes: 1 << 30,
        held_bytes: 12 << 30,
        evicted_bytes: 3 << 30,
        installed_bytes: 1 << 30,
        guest_used_bytes: Some(1 << 30),
        guest_free_bytes: Some(3 << 30),
        reclaimable_now_bytes: Some(3 << 30),
        vmm_overhead_bytes: 20 << 20,
        cost_bytes: (1 << 30) + (141 << 20),
        page_table_bytes: 1 << 20,
        cgroup: None,
        monitor: MonitorCounts { installs: 4096, ..MonitorCounts::default() },
        enforcement: Enforcement::Userfaultfd.into(),
        on_violation: OnViolation::Install.into(),
        install_pool: InstallPoolStatus {
            size_bytes: 64 << 20,
            goal_bytes: 64 << 20,
            resident_bytes: 60 << 20,
            counts: SupplyCounts { hits: 4000, ..SupplyCounts::default() },
        },
        vcpus: (0..2)
            .map(|index| VcpuStatus {
                index,
                exits: ExitCounts { mmio: 2048, pio: 0, other: 3 },
                counts: CallCounts { calls: 2048 },
                state: VcpuState::Waiting.into(),
            })
            .collect(),
        ..StatusReport::default()
    }
}

fn guest(outcome: GuestOutcome) -> Reply {
    let bad = outcome == GuestOutcome::Corrupt;
    Reply::Guest(GuestReport {
        outcome: outcome.into(),
        bytes: 8 << 30,
        blocks: 4096,
        held_bytes: 8 << 30,
        held_blocks: 4096,
        mismatches: u64::from(bad),
        first_bad: bad.then_some(BadPage { address: 0x20_0000, expected: 1, found: 2 }),
        allocs: 4096,
        frees: 0,
        install_calls: 4096,
        ahead_frames: 0,
        free_bytes: 8 << 30,
        free_huge_bytes: 8 << 30,
        duration_us: 2_500_000,
        samples: None,
    })
}

#[test]
fn a_complete_shrink_exits_0_and_a_partial_one_2_with_the_reason() {
    let vm = Vm::answering(resize(true));
    let text = vm.text("shrink --to 1G", 0);
    println!("{text}");
    assert!(text.contains("complete in 42.0 ms, 6.00 us per frame"), "{text}");
    vm.text("grow --to 16G", 0);
    let vm = Vm::answering(resize(false));
    let text = vm.text("shrink --by 1G --wait 10s", 2);
    println!("{text}");
    assert!(text.contains("the guest uses 1 GiB, and 512 MiB"), "{text}");
    let json: ResizeReport = serde_json::from_str(&vm.text("shrink --to 1G --json", 2)).expect("one object");
    assert!(!json.complete);
    let asked = vm.asked.lock().expect("no panic");
    assert_eq!(
        asked[0].to_line(),
        "{\"version\":1,\"request\":{\"shrink\":{\"goal\":{\"by_bytes\":1073741824},\"wait_ms\":10000}}}\n"
    );
}

#[test]
fn status_is_a_table_or_one_object() {
    let vm = Vm::answering(Reply::Status(Box::new(status())));
    let text = vm.text("status", 0);
    println!("{text}");
    assert!(text.lines().any(|line| line.starts_with("limit") && line.contains("4 GiB")), "{text}");
    assert_eq!(serde_json::from_str::<StatusReport>(&vm.text("status --json", 0)).expect("one object"), status());
}

#[test]
fn a_disk_is_a_line_of_the_status_and_an_object() {
    let mut report = status();
    let disk = DiskStatus { path: "a\x1b.img".to_owned(), size_bytes: 4 << 30, ..DiskStatus::default() };
    let (read_bytes, cleared_bytes) = (3 << 20, 1 << 30);
    report.disks = vec![
        DiskStatus { read_only: true, ..disk.clone() },
        DiskStatus { counts: DiskCounts { read_bytes, cleared_bytes, io_errors: 2, ..DiskCounts::default() }, ..disk },
    ];
    let vm = Vm::answering(Reply::Status(Box::new(report.clone())));
    let text = vm.text("status", 0);
    let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("disk")).map(str::trim).collect();
    assert_eq!(
        lines,
        ["a .img, 4 GiB, read-only", "a .img, 4 GiB, 3 MiB read, 1 GiB discarded, 2 I/O errors"],
        "{text}"
    );
    assert_eq!(serde_json::from_str::<StatusReport>(&vm.text("status --json", 0)).expect("one object"), report);
}

#[test]
fn a_status_promises_no_shrink_to_a_vm_that_has_none() {
    let mut report = status();
    report.elastic.kind = ElasticKind::None.into();
    report.elastic.driven = false;
    let text = Vm::answering(Reply::Status(Box::new(report))).text("status", 0);
    assert!(!text.contains("reclaimable") && !text.contains("without a driver"), "{text}");
}

#[test]
fn a_watched_status_is_a_line_an_interval_and_ends_quietly_with_its_reader() {
    let vm = Vm::answering(Reply::Status(Box::new(status())));
    let mut child = vm
        .command("status --watch 10ms --json")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    for _ in 0..3 {
        let line = lines.next().expect("another").expect("text");
        assert_eq!(serde_json::from_str::<StatusReport>(&line).expect("an object a line"), status());
    }
    drop(lines);
    let mut errors = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut errors).expect("text");
    assert_eq!((child.wait().expect("it ends").code(), errors.as_str()), (Some(0), ""));
}

#[test]
fn a_watched_status_shows_rates_from_the_second_time_on() {
    let vm = Vm::answering(Reply::Status(Box::new(status())));
    let mut child = vm.command("status --watch 10ms").stdout(Stdio::piped()).spawn().expect("it runs");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines().map(|line| line.expect("text"));
    let shown: Vec<String> = lines.take(300).take_while(|line| !line.starts_with("per second")).collect();
    assert!(shown.len() < 300, "{shown:#?}");
    let heads = shown.iter().filter(|line| line.starts_with("memory")).count();
    assert_eq!(heads, 2, "the first has nothing to compare with: {shown:#?}");
    child.wait().expect("its reader is gone");
}

#[test]
fn guest_commands_exit_by_their_outcome() {
    for (outcome, code) in [
        (GuestOutcome::Ok, 0),
        (GuestOutcome::FellShort, 2),
        (GuestOutcome::OutOfMemory, 2),
        (GuestOutcome::Corrupt, 2),
        (GuestOutcome::Unknown, 1),
    ] {
        let vm = Vm::answering(guest(outcome));
        let text = vm.text("guest verify", code);
        println!("{text}");
        assert!(serde_json::from_str::<GuestReport>(&vm.text("guest stats --json", code)).is_ok());
    }
}

#[test]
fn validate_exits_2_with_findings_and_says_whose_fault_they_are() {
    let clean = ValidateReport { clean: true, huge_frames: 8192, installed: 8192, ..ValidateReport::default() };
    let vm = Vm::answering(Reply::Validate(clean.clone()));
    assert!(vm.text("validate", 0).contains("clean, 8192 huge frames"));
    let finding = |check: Check, guest_can_cause, frames: &[u32]| FindingReport {
        check: check.into(),
        count: 9,
        first_frames: frames.to_vec(),
        guest_can_cause,
        wording: "frames like that".to_owned(),
    };
    let findings = vec![finding(Check::InvalidEntry, true, &[1, 2]), finding(Check::MissingMemory, false, &[])];
    let dirty = ValidateReport { clean: false, findings, ..clean };
    let vm = Vm::answering(Reply::Validate(dirty.clone()));
    let text = vm.text("validate", 2);
    println!("{text}");
    assert!(text.contains("2 FINDINGS") && text.contains("9 frames like that: 1, 2 ...\n"), "{text}");
    assert!(text.contains("9 frames like that; THE HOST'S FAULT\n"), "{text}");
    assert_eq!(serde_json::from_str::<ValidateReport>(&vm.text("validate --json", 2)).expect("one object"), dirty);
}

#[test]
fn what_the_vm_refuses_is_one_line() {
    let vm = Vm::answering(Reply::error(ErrorKind::Refused, "the limit cannot be above the VM's memory, 16 GiB"));
    let text = vm.text("grow --to 32G", 1);
    assert_eq!(text, "llfree-vmm: error: the limit cannot be above the VM's memory, 16 GiB\n");
    let crashed = Vm::answering(Reply::error(ErrorKind::Crashed, "the guest crashed: page fault"));
    assert_eq!(crashed.text("guest verify", 3), "llfree-vmm: error: the guest crashed: page fault\n");
    let confused = Vm::answering(Reply::Reclaim(ReclaimReport::default()));
    assert!(confused.text("status", 1).contains("answered a different request"));
    confused.text("reclaim", 0);
}

#[test]
fn stop_returns_when_the_vm_is_gone() {
    let vm = Vm::answering(resize(true));
    assert_eq!(vm.text("stop", 0), "stopped\n");
    let text = vm.text("status", 1);
    assert!(text.starts_with("llfree-vmm: error: no VM listens on "), "{text}");
}

#[test]
fn a_vm_is_listed_and_found_by_its_name() {
    let vm = Vm::answering(Reply::Status(Box::new(status())));
    let name = vm.path.file_stem().expect("a name").to_str().expect("text").to_owned();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_llfree-vmm"));
        let output = command.args(args).env("XDG_RUNTIME_DIR", vm.dir.path()).output().expect("it runs");
        (
            output.status.code(),
            String::from_utf8(output.stdout).expect("text") + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (code, text) = run(&["list"]);
    println!("{text}");
    assert!(code == Some(0) && text.contains(&name), "{text}");
    let (_, json) = run(&["list", "--json"]);
    let rows: Vec<serde_json::Value> = serde_json::from_str(&json).expect("one array");
    assert!(rows.iter().any(|row| row["name"] == name.as_str() && row["status"]["pid"] == 4242), "{json}");
    assert_eq!(run(&["status", "--name", &name]).0, Some(0));
    let (code, text) = run(&["status", "--name", "no-such-vm"]);
    assert!(
        code == Some(1) && text.starts_with("llfree-vmm: error: no VM is called 'no-such-vm'; running VMs: "),
        "{text}"
    );
}
