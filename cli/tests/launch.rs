//! The life of a VM as its user sees it: launched, used, shrunk, grown, listed, stopped.

use crate::common::{MIB, Process, Scratch, has_fields, need_kvm, number, wait_for};
use test_support::skipped;

/// More than the VMM itself ever needs, less than any amount tested here.
const SLACK: u64 = 24 * MIB;

#[test]
fn memory_goes_back_to_the_host_and_comes_again_with_contents_intact() {
    need_kvm!();
    let scratch = Scratch::new();
    // The install pool is memory on top of the guest's, reported in its own field.
    let vm = scratch.launch("--mem 512M --name story --install-pool 8M");
    let status = vm.status();
    assert_eq!(number(&status, "limit_bytes"), 512 * MIB);
    assert!(number(&status, "resident_bytes") <= 8 * MIB, "an untouched guest costs nothing: {status:#}");
    assert!(vm.vm_rss() <= SLACK, "nor does its VMM: {}", vm.vm_rss());

    let alloc = vm.json("guest alloc 64M");
    assert_eq!((number(&alloc, "bytes"), alloc["outcome"].as_str()), (64 * MIB, Some("ok")));
    vm.json("guest alloc 256M");
    let touched = number(&vm.status(), "resident_bytes");
    assert!(touched >= 320 * MIB, "{touched}");
    assert!(vm.vm_rss() >= 320 * MIB);
    assert_eq!(number(&vm.json("guest verify"), "bytes"), 320 * MIB);

    assert_eq!(number(&vm.json("guest free 256M --random"), "held_bytes"), 64 * MIB);
    assert!(number(&vm.status(), "resident_bytes") >= touched, "the host keeps paying for freed memory");

    let shrink = vm.json("shrink --to 128M");
    assert_eq!(number(&shrink, "actual_bytes"), 128 * MIB);
    assert!(number(&shrink, "freed_bytes") >= 256 * MIB - 16 * MIB, "{shrink:#}");
    let status = vm.status();
    assert_eq!((number(&status, "limit_bytes"), number(&status, "held_bytes")), (128 * MIB, 384 * MIB));
    assert!(number(&status, "resident_bytes") <= 128 * MIB, "{status:#}");
    assert!(vm.vm_rss() <= 128 * MIB + SLACK, "{}", vm.vm_rss());

    let verify = vm.json("guest verify");
    assert_eq!((number(&verify, "bytes"), number(&verify, "mismatches")), (64 * MIB, 0), "what was kept is intact");
    let beyond = vm.ask("guest alloc 256M --json").exits(2).json();
    assert_eq!(beyond["outcome"], "out_of_memory", "the limit holds");
    assert!(number(&vm.status(), "resident_bytes") <= 128 * MIB);

    let grow = vm.json("grow --to 512M");
    assert_eq!((number(&grow, "actual_bytes"), number(&grow, "huge_frames")), (512 * MIB, 192));
    vm.json("guest alloc 200M");
    assert_eq!(number(&vm.json("guest verify"), "mismatches"), 0);
    vm.json("guest free all");
    let status = vm.status();
    assert_eq!((number(&status, "violations"), number(&status, "corrupt_entries")), (0, 0));
    assert_eq!((number(&status, "install_failures"), number(&status, "bad_calls")), (0, 0));
    let output = vm.stop();
    assert_eq!(output.stderr, "");
}

#[test]
fn an_idle_vm_costs_a_few_mebibytes() {
    need_kvm!();
    let scratch = Scratch::new();
    let first = scratch.launch("--mem 64M --cpus 1 --name a");
    let second = scratch.launch("--mem 64M --cpus 1 --name b");
    let statuses = [first.status(), second.status()];
    for status in &statuses {
        let [cost, resident, vmm, tables] =
            ["cost_bytes", "resident_bytes", "vmm_overhead_bytes", "page_table_bytes"].map(|key| number(status, key));
        assert_eq!(number(&status["install_pool"], "resident_bytes"), 0, "nobody installs anything: {status:#}");
        assert_eq!(cost, resident + vmm + tables, "{status:#}");
        assert!(tables > 0 && cost <= 8 * MIB, "{status:#}");
        if status["enforcement"] == "userfaultfd" {
            assert!(resident < MIB, "of the image's frame the image alone: {status:#}");
        }
    }
    // A burst makes use of one.
    first.json("guest burst 48M");
    wait_for("the pool is kept ready", || {
        (number(&first.status()["install_pool"], "resident_bytes") > 0).then_some(())
    });
    scratch.run(&["stop", "--name", "b"]).exits(0);
    second.process.wait().exits(0);
    first.stop();
}

#[test]
fn a_launch_of_more_than_there_is_says_so() {
    need_kvm!();
    let scratch = Scratch::new();
    let gib = llfree_base::kernel_stats::meminfo_bytes("MemTotal").expect("/proc is mounted").div_ceil(1 << 30);
    for (memory, says) in [("64M".to_owned(), false), (format!("{}G", gib + 1), true)] {
        let output = scratch.run(&["--mem", &memory, "--cpus", "1", "--workload", "stop"]).exits(0);
        assert_eq!(output.stderr.contains("is more than the"), says, "{output:?}");
        assert!(output.stderr.lines().count() == usize::from(says), "{output:?}");
    }
}

#[test]
fn every_json_output_has_its_fields() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1 --name fields");
    has_fields(&vm.up, &["event", "name", "socket", "pid", "memory_bytes", "cpus", "backing"]);
    assert_eq!(vm.up["event"], "up");
    assert_eq!(vm.up["name"], "fields");
    assert_eq!(number(&vm.up, "pid"), u64::from(vm.process.pid()));
    assert_eq!((number(&vm.up, "memory_bytes"), number(&vm.up, "cpus")), (64 * MIB, 1));

    let status_fields = [
        "name",
        "pid",
        "version",
        "uptime_ms",
        "install_durations",
        "resize_durations",
        "state",
        "backing",
        "memory_bytes",
        "limit_bytes",
        "wanted_bytes",
        "resident_bytes",
        "huge_page_bytes",
        "held_bytes",
        "evicted_bytes",
        "installed_bytes",
        "guest_says",
        "guest_used_bytes",
        "guest_free_bytes",
        "reclaimable_now_bytes",
        "vmm_overhead_bytes",
        "cost_bytes",
        "page_table_bytes",
        "installs",
        "install_failures",
        "violations",
        "held_violations",
        "boot_touches",
        "needs",
        "released",
        "enforcement",
        "on_violation",
        "install_pool",
        "corrupt_entries",
        "bad_calls",
        "auto_reclaim",
        "vcpus",
        "elastic",
    ];
    let status = vm.status();
    has_fields(&status, &status_fields);
    assert_eq!(status["backing"], "anon");
    has_fields(
        &status["install_pool"],
        &["size_bytes", "goal_bytes", "resident_bytes", "hits", "misses", "given_back", "stale"],
    );
    let vcpus = status["vcpus"].as_array().expect("a list");
    assert_eq!(vcpus.len(), 1);
    has_fields(&vcpus[0], &["index", "exits", "calls", "state"]);
    has_fields(&vcpus[0]["exits"], &["mmio", "pio", "other"]);
    let sum = number(&status, "held_bytes") + number(&status, "evicted_bytes") + number(&status, "installed_bytes");
    assert_eq!(sum, 64 * MIB, "each frame is in one state: {status:#}");

    let resize_fields = [
        "target_bytes",
        "actual_bytes",
        "reclaimable_now_bytes",
        "complete",
        "shortfall",
        "pursued",
        "huge_frames",
        "freed_bytes",
        "duration_us",
        "waited_us",
    ];
    has_fields(&vm.json("shrink --to 48M"), &resize_fields);
    has_fields(&vm.json("grow --to 64M"), &resize_fields);
    has_fields(&vm.json("reclaim --by 2M"), &["huge_frames", "freed_bytes", "duration_us"]);
    for command in [
        "alloc 4M",
        "alloc 1M --order 0",
        "verify",
        "free 1M --random",
        "churn 50ms",
        "burst 8M",
        "stream 20ms --bytes 6M",
        "ftq 20ms",
        "idle",
        "stats",
        "free all",
    ] {
        let report = vm.json(&format!("guest {command}"));
        let measures = ["burst", "stream", "ftq"].iter().any(|verb| command.starts_with(verb));
        let mut fields = vec![
            "outcome",
            "bytes",
            "blocks",
            "held_bytes",
            "held_blocks",
            "mismatches",
            "first_bad",
            "allocs",
            "frees",
            "install_calls",
            "ahead_frames",
            "free_bytes",
            "free_huge_bytes",
            "duration_us",
        ];
        if measures {
            fields.push("samples");
            let samples = ["unit", "count", "mean", "min", "p1", "p50", "p99", "p999", "max", "beside_ns"];
            has_fields(&report["samples"], &samples);
        }
        has_fields(&report, &fields);
        assert_eq!(report["outcome"], "ok", "{command}");
    }

    let list = scratch.run(&["list", "--json"]).exits(0).json();
    let row = list.as_array().expect("a list").iter().find(|row| row["name"] == "fields").expect("it runs");
    has_fields(row, &["name", "socket", "status", "error"]);
    has_fields(&row["status"], &status_fields);
    let stop = vm.json("stop");
    has_fields(&stop, &["stopped"]);
    vm.ends(0);
}

#[test]
fn text_output_names_what_json_counts() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    for (command, words) in [
        ("status", &["limit", "64 MiB", "resident", "kernel's accounting", "violations", "vCPU"][..]),
        ("shrink --to 32M", &["complete", "target", "actual", "32 MiB", "reclaimable now", "us"]),
        ("grow --to 64M", &["complete", "actual", "64 MiB"]),
        ("reclaim", &["reclaim", "frames of 2 MiB"]),
        ("guest alloc 4M", &["ok", "4 MiB in 2 blocks"]),
        ("guest stats", &["since boot", "2 allocs"]),
    ] {
        let output = vm.ask(command).exits(0);
        words.iter().for_each(|word| assert!(output.stdout.contains(word), "{word}: {output:#?}"));
        assert_eq!(output.stderr, "", "{command}");
    }
    assert_eq!(vm.ask("stop").exits(0).stdout, "stopped\n");
    vm.ends(0);
}

#[test]
fn a_partial_shrink_says_why_and_exits_2() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 256M");
    vm.json("guest alloc 64M --order 0");
    vm.json("guest free 56M --random");
    let report = vm.ask("shrink --to 32M --json").exits(2).json();
    assert_eq!(report["complete"], false);
    assert_eq!(number(&report, "target_bytes"), 32 * MIB);
    let (actual, shortfall) = (number(&report, "actual_bytes"), &report["shortfall"]);
    assert!((32 * MIB + 1..256 * MIB).contains(&actual), "{report:#}");
    has_fields(shortfall, &["in_use_bytes", "fragmented_bytes", "wording"]);
    assert!(number(shortfall, "in_use_bytes") >= 8 * MIB, "{report:#}");
    assert!(number(shortfall, "fragmented_bytes") >= 16 * MIB, "{report:#}");
    let status = vm.status();
    assert_eq!(number(&status, "limit_bytes"), actual, "the limit is what was reached");
    assert_eq!(number(&status, "wanted_bytes"), actual - 32 * MIB);

    let text = vm.ask("shrink --to 32M").exits(2).stdout;
    assert!(text.contains("partial") && text.contains("why") && text.contains("free between used pages"), "{text}");
    vm.json("guest free all");
    assert_eq!(number(&vm.json("shrink --to 32M"), "actual_bytes"), 32 * MIB, "once it is free, it can be had");
    assert_eq!(number(&vm.status(), "wanted_bytes"), 0);
    vm.stop();
}

#[test]
fn limits_move_only_where_they_can() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 128M --cpus 1");
    assert_eq!(number(&vm.json("shrink --by 32M"), "actual_bytes"), 96 * MIB);
    assert_eq!(number(&vm.json("shrink --by 32M"), "actual_bytes"), 64 * MIB);
    assert_eq!(number(&vm.json("shrink --to 64M"), "huge_frames"), 0, "already there");
    assert_eq!(number(&vm.json("grow --to 64M"), "huge_frames"), 0, "already there");
    for (command, words) in [
        ("shrink --to 96M", &["shrink to 96 MiB", "64 MiB", "grow"][..]),
        ("shrink --to 256M", &["256 MiB", "128 MiB"]),
        ("shrink --by 128M", &["128 MiB", "64 MiB"]),
        ("shrink --by 64M", &["64 MiB", "the smallest limit is 2 MiB"]),
        ("grow --to 256M", &["256 MiB", "128 MiB"]),
        ("grow --to 32M", &["grow to 32 MiB", "64 MiB", "shrink"]),
    ] {
        let output = vm.ask(command).exits(1);
        let line = output.one_error_line();
        words.iter().for_each(|word| assert!(line.contains(word), "{word}: {line}"));
        assert_eq!(number(&vm.status(), "limit_bytes"), 64 * MIB, "{command}");
    }
    vm.is_fine();
    vm.stop();
}

#[test]
fn a_guest_frees_what_it_was_told_to_and_not_a_block_a_vcpu_more() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 3");
    vm.json("guest alloc 24M");
    for left in [22, 20, 14, 12, 2, 0] {
        let held = number(&vm.json("guest stats"), "held_bytes");
        let freed = vm.json(&format!("guest free {}M --random", held / MIB - left));
        assert_eq!(number(&freed, "held_bytes"), left * MIB, "{freed:#}");
    }
    vm.json("guest alloc 4M");
    let short = vm.ask("guest free 6M --json").exits(2).json();
    assert_eq!((short["outcome"].as_str(), number(&short, "bytes")), (Some("fell_short"), 4 * MIB));
    vm.stop();
}

#[test]
fn a_guests_report_says_what_is_free_afterwards() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 256M");
    for command in ["alloc 128M", "free 64M", "alloc 10M --order 0", "free all"] {
        let (after, stats) = (vm.json(&format!("guest {command}")), vm.json("guest stats"));
        for field in ["free_bytes", "free_huge_bytes", "held_bytes"] {
            assert_eq!(after[field], stats[field], "{command}: {field}");
        }
        assert_eq!(stats["free_bytes"], vm.status()["guest_free_bytes"], "{command}");
    }
    vm.stop();
}

#[test]
fn a_shrink_that_waits_makes_way_for_a_grow_and_both_tell_the_truth() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 128M");
    vm.json("guest alloc 96M");
    let shrink = vm.start("shrink --to 32M --wait 1h --json");
    wait_for("the shrink begins", || (number(&vm.status(), "wanted_bytes") > 0).then_some(()));
    let grow = vm.json("grow --to 128M");
    assert_eq!(number(&grow, "actual_bytes"), 128 * MIB);
    let report = shrink.wait().exits(2).json();
    assert_eq!(report["complete"], false);
    assert!(number(&report, "actual_bytes") > 32 * MIB, "{report:#}");
    let status = vm.status();
    assert_eq!((number(&status, "limit_bytes"), number(&status, "wanted_bytes")), (128 * MIB, 0));
    assert_eq!(number(&vm.json("guest verify"), "bytes"), 96 * MIB);
    vm.stop();
}

#[test]
fn a_waiting_shrink_gets_what_the_guest_frees_meanwhile() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 128M");
    vm.json("guest alloc 96M");
    let shrink = vm.start("shrink --to 32M --wait 1h --json");
    wait_for("the shrink begins", || (number(&vm.status(), "wanted_bytes") > 0).then_some(()));
    vm.json("guest free all");
    assert_eq!(number(&shrink.wait().exits(0).json(), "actual_bytes"), 32 * MIB);
    vm.stop();
}

#[test]
fn status_and_resizes_are_answered_while_the_guest_churns() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 128M");
    let mut churn = vm.start("guest churn 3s --json");
    wait_for("it churns", || {
        let status = vm.status();
        status["vcpus"].as_array().expect("a list").iter().any(|vcpu| vcpu["state"] == "running").then_some(())
    });
    let shrink = vm.ask("shrink --to 16M --wait 200ms --json");
    assert!([0, 2].contains(&shrink.code()), "{shrink:#?}");
    let report = shrink.json();
    assert_eq!(report["complete"], shrink.code() == 0, "{report:#}");
    assert_eq!(number(&vm.status(), "limit_bytes"), number(&report, "actual_bytes"), "what it said is so");
    assert_eq!(number(&vm.json("grow --to 128M"), "actual_bytes"), 128 * MIB);
    assert!(churn.is_running(), "all of this was answered meanwhile");
    assert_eq!(churn.wait().exits(0).json()["outcome"], "ok");
    assert_eq!(number(&vm.json("guest verify"), "mismatches"), 0);
    assert_eq!(number(&vm.status(), "violations"), 0);
    vm.stop();
}

#[test]
fn a_taken_name_or_socket_is_refused_and_its_vm_goes_on() {
    need_kvm!();
    let scratch = Scratch::new();
    let named = scratch.launch("--mem 64M --cpus 1 --name web");
    let again = scratch.run(&["--mem", "64M", "--name", "web"]).exits(1);
    let line = again.one_error_line();
    assert!(line.contains("web.sock") && line.contains(&format!("pid {}", named.process.pid())), "{line}");
    named.is_fine();

    let path = scratch.path().join("my.sock").display().to_string();
    let placed = scratch.launch(&format!("--mem 64M --cpus 1 --socket {path}"));
    assert_eq!(placed.up["name"], "my");
    let again = scratch.run(&["--mem", "64M", "--socket", &path]).exits(1);
    assert!(again.one_error_line().contains(&path), "{again:?}");
    placed.is_fine();
    assert_eq!(placed.json("stop")["stopped"], true);
    placed.process.wait().exits(0);
    assert!(!std::fs::exists(&path).expect("scratch") && !std::fs::exists(format!("{path}.lock")).expect("scratch"));
    named.stop();
}

#[test]
fn vms_that_start_at_once_get_names_of_their_own() {
    need_kvm!();
    let scratch = Scratch::new();
    let start = |_| Process::spawn(&mut scratch.command(&["--mem", "64M", "--cpus", "1", "--json"]));
    let vms: Vec<Process> = (0..6).map(start).collect();
    let mut names: Vec<String> = vms
        .iter()
        .map(|vm| wait_for("it is up", || vm.stdout().lines().next().map(str::to_owned)))
        .map(|line| serde_json::from_str::<serde_json::Value>(&line).expect("JSON")["name"].to_string())
        .collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 6, "{names:?}");
    vms.iter().for_each(|vm| vm.signal(rustix::process::Signal::TERM));
    vms.into_iter().for_each(|vm| _ = vm.wait().exits(0));
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
}

#[test]
fn what_a_killed_vm_left_is_taken_over() {
    need_kvm!();
    let scratch = Scratch::new();
    let first = scratch.launch("--mem 64M --cpus 1 --name web");
    first.process.signal(rustix::process::Signal::KILL);
    first.process.wait().exits(137);
    assert_eq!(scratch.leftovers().len(), 2, "socket and lock are left");
    let gone = scratch.run(&["status", "--name", "web"]).exits(1);
    assert!(gone.one_error_line().contains("no VM is called 'web'"), "{gone:?}");
    let gone = scratch.run(&["status", "--socket", &first.socket.display().to_string()]).exits(1);
    assert!(gone.one_error_line().contains("no VM listens on"), "{gone:?}");

    let second = scratch.launch("--mem 64M --cpus 1 --name web");
    second.is_fine();
    second.stop();
}

#[test]
fn a_workload_runs_at_boot_and_may_end_the_vm() {
    need_kvm!();
    let scratch = Scratch::new();
    let run = |workload: &str| scratch.run(&["--mem", "128M", "--json", "--workload", workload]);

    let output = run("alloc 64M, verify; free all, idle, stats, churn 50ms, stop").exits(0);
    let lines: Vec<serde_json::Value> =
        output.stdout.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
    assert_eq!(lines[0]["event"], "up");
    let verbs: Vec<&str> = lines[1..].iter().filter_map(|line| line["command"].as_str()).collect();
    assert_eq!(verbs, ["alloc", "verify", "free", "idle", "stats", "churn"]);
    for line in &lines[1..] {
        has_fields(line, &["event", "command", "report"]);
        assert_eq!((&line["event"], &line["report"]["outcome"]), (&"workload".into(), &"ok".into()));
    }
    assert_eq!(number(&lines[2]["report"], "bytes"), 64 * MIB);
    assert_eq!(output.stderr, "");

    let output = run("alloc 1G, verify, stop").exits(2);
    assert!(output.stdout.contains("out_of_memory") && output.stdout.contains("\"verify\""), "{output:#?}");
    run("stop").exits(0);
    assert_eq!(scratch.leftovers(), [] as [String; 0]);

    let text = scratch.run(&["--mem", "64M", "--workload", "alloc 4M, stop"]).exits(0).stdout;
    assert!(text.contains("is up: 64 MiB of memory") && text.contains("4 MiB in 2 blocks"), "{text}");
}

#[test]
fn a_vm_whose_workload_ended_goes_on_without_a_stop() {
    need_kvm!();
    let scratch = Scratch::new();
    let mut command = scratch.command(&["--mem", "64M", "--workload", "alloc 8M, verify"]);
    let vm = scratch.launch_command(&mut command);
    wait_for("the workload ends", || vm.process.stdout().contains("\"verify\"").then_some(()));
    assert_eq!(number(&vm.json("guest stats"), "held_bytes"), 8 * MIB);
    vm.stop();
}

#[test]
fn a_watched_status_ends_with_its_vm() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    let watch = vm.start("status --watch 20ms --json");
    wait_for("three looks", || (watch.stdout().lines().count() >= 3).then_some(()));
    vm.stop();
    let output = watch.wait().exits(0);
    for line in output.stdout.lines() {
        let status: serde_json::Value = serde_json::from_str(line).expect("a JSON line");
        assert_eq!(number(&status, "memory_bytes"), 64 * MIB);
    }
}

#[test]
fn resident_memory_falls_with_a_memfd_too() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 128M --cpus 1 --backing memfd");
    assert_eq!(vm.status()["backing"], "memfd");
    vm.json("guest alloc 16M");
    vm.json("guest alloc 64M");
    let status = vm.status();
    assert!(number(&status, "resident_bytes") >= 80 * MIB && vm.vm_rss() >= 80 * MIB, "{status:#}");
    vm.json("guest free 64M");
    assert_eq!(number(&vm.json("shrink --to 32M"), "actual_bytes"), 32 * MIB);
    let status = vm.status();
    assert!(number(&status, "resident_bytes") <= 32 * MIB && vm.vm_rss() <= 32 * MIB + SLACK, "{status:#}");
    assert_eq!(number(&vm.json("guest verify"), "bytes"), 16 * MIB);
    vm.json("grow --to 128M");
    vm.json("guest alloc 64M");
    assert_eq!(number(&vm.json("guest verify"), "mismatches"), 0);
    vm.stop();
}

#[test]
fn hugetlb_without_free_pages_fails_at_start() {
    need_kvm!();
    let pool = |file| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}");
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok())
    };
    let (Some(free), Some(0)) = (pool("free_hugepages"), pool("nr_overcommit_hugepages")) else {
        skipped("no pool of 2 MiB pages, or one that grows by itself");
        return;
    };
    let scratch = Scratch::new();
    let memory = format!("{}M", (free + 32) * 2);
    let output = scratch.run(&["--mem", &memory, "--backing", "hugetlb"]).exits(1);
    let line = output.one_error_line();
    assert!(line.contains("huge pages") && line.contains("nr_hugepages"), "{line}");
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
}

#[test]
fn a_launch_needs_nothing_of_the_runtime_directory_with_a_socket_of_its_own() {
    need_kvm!();
    let scratch = Scratch::new();
    let socket = scratch.path().join("x.sock");
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--workload", "stop", "--socket"]);
    Process::spawn(command.arg(&socket).env("XDG_RUNTIME_DIR", "/nonexistent")).wait().exits(0);
    assert!(!socket.exists());
}

#[test]
fn a_launch_waits_for_no_listener_whose_queue_is_full() {
    need_kvm!();
    let scratch = Scratch::new();
    let path = scratch.path().join("full.sock");
    // Somebody who listens and never accepts, and clients until there is no place for another one.
    let listener = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None);
    let listener = listener.expect("a socket");
    let address = rustix::net::SocketAddrUnix::new(&path).expect("short");
    rustix::net::bind(&listener, &address).expect("a scratch directory");
    rustix::net::listen(&listener, 0).expect("it is bound");
    let mut clients = Vec::new();
    loop {
        let flags = rustix::net::SocketFlags::NONBLOCK;
        let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
        let client = rustix::net::socket_with(family, kind, flags, None).expect("a socket");
        if rustix::net::connect(&client, &address).is_err() {
            break;
        }
        clients.push(client);
    }
    let socket = path.to_str().expect("plain");
    let output = scratch.run(&["--mem", "64M", "--cpus", "1", "--socket", socket]).exits(1);
    assert!(output.one_error_line().contains("already listens"), "{output:?}");
}

#[test]
fn a_launch_whose_loop_would_be_deaf_fails() {
    need_kvm!();
    let scratch = Scratch::new();
    let mut deaf = 0;
    loop {
        let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--workload", "stop"]);
        command.env("FAILPOINTS", format!("epoll-add={deaf}*off->1*return(12)->off"));
        let output = Process::spawn(&mut command).wait();
        if output.code() == 0 {
            break;
        }
        let output = output.exits(1);
        assert!(output.one_error_line().contains("could not watch a descriptor"), "{output:?}");
        assert_eq!(scratch.leftovers(), [] as [String; 0]);
        deaf += 1;
    }
    // Three signals, the guest's end, the workload's, and three of the control socket.
    assert!(deaf >= 7, "{deaf}");
}
