//! `--cgroup` on the kernel's own cgroup file system, where it is version 2 with a memory controller
//! and this user may write it.
//!
//! Elsewhere, the emulated machine has one. With TEST for the test's binary, which
//! `cargo test -p llfree-vmm --test tests --no-run` builds and names:
//! `images/testbed -- sh -c 'mount -t cgroup2 none /sys/fs/cgroup; TEST cgroup:: --test-threads 1'`.

use crate::common::{MIB, Scratch, need_kvm, number};
use rustix::process::Signal;
use std::path::PathBuf;
use test_support::skipped;

/// What the VMM may use on top of the limit: for itself, and for the install pool of such a small guest.
fn allowance(memory: u64) -> u64 {
    64 * MIB + memory / 128 + memory / 8
}

/// Why no cgroup can be created here, in the VMM's own words: one line, and nothing left behind.
fn no_cgroup(scratch: &Scratch) -> Option<String> {
    let output = scratch.run(&["--mem", "64M", "--cpus", "1", "--workload", "stop", "--cgroup"]);
    if output.code() == 0 {
        return None;
    }
    let output = output.exits(1);
    let line = output.one_error_line().to_owned();
    let expected = ["needs cgroup v2", "has no memory controller", "as this user --cgroup needs"];
    assert!(expected.iter().any(|reason| line.contains(reason)), "{line}");
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
    Some(line)
}

#[test]
fn the_maximum_follows_the_limit_and_the_cgroup_goes_with_the_vm() {
    need_kvm!();
    let scratch = Scratch::new();
    if let Some(reason) = no_cgroup(&scratch) {
        return skipped(reason);
    }
    let vm = scratch.launch("--mem 256M --cpus 2 --cgroup");
    let cgroup = |status: &serde_json::Value| {
        let cgroup = &status["cgroup"];
        let path = PathBuf::from(cgroup["path"].as_str().expect("a path"));
        let max = std::fs::read_to_string(path.join("memory.max")).expect("it is there");
        assert_eq!(max.trim().parse(), Ok(number(cgroup, "memory_max_bytes")));
        (path, number(cgroup, "memory_max_bytes"), number(cgroup, "memory_current_bytes"))
    };
    let (path, max, _) = cgroup(&vm.status());
    assert_eq!(max, 256 * MIB + allowance(256 * MIB));
    let procs = std::fs::read_to_string(path.join("cgroup.procs")).expect("it is there");
    // Older kernels put a thread of KVM's own beside it.
    assert!(procs.lines().any(|pid| pid == vm.process.pid().to_string()), "{procs}");
    vm.json("guest alloc 200M");
    assert!(cgroup(&vm.status()).2 >= 200 * MIB, "its memory is charged to it");
    vm.json("guest free 180M");
    assert_eq!(number(&vm.json("shrink --to 64M --wait 10s"), "actual_bytes"), 64 * MIB);
    let (_, max, current) = cgroup(&vm.status());
    assert_eq!(max, 64 * MIB + allowance(256 * MIB));
    assert!(current <= max, "{current}");
    vm.json("grow --to 256M");
    assert_eq!(cgroup(&vm.status()).1, 256 * MIB + allowance(256 * MIB));
    vm.json("guest alloc 200M");
    assert_eq!(number(&vm.json("guest verify"), "mismatches"), 0);
    let output = vm.stop();
    assert!(!path.exists(), "the cgroup is left: {output:?}");
}

#[test]
fn what_a_killed_vm_left_goes_with_the_next_launch() {
    need_kvm!();
    let scratch = Scratch::new();
    if let Some(reason) = no_cgroup(&scratch) {
        return skipped(reason);
    }
    let vm = scratch.launch("--mem 64M --cpus 1 --name k --cgroup");
    let path = PathBuf::from(vm.status()["cgroup"]["path"].as_str().expect("a path"));
    vm.process.signal(Signal::KILL);
    vm.process.wait();
    let next = scratch.launch("--mem 64M --cpus 1 --name k --cgroup");
    assert!(!path.exists(), "the killed VM's cgroup is still there");
    next.is_fine();
    next.stop();
}

#[test]
fn a_place_that_is_no_cgroup_is_one_line() {
    need_kvm!();
    let scratch = Scratch::new();
    for place in ["/nonexistent", "/tmp", "relative"] {
        let argument = format!("--cgroup={place}");
        let output = scratch.run(&["--mem", "64M", argument.as_str()]).exits(1);
        let line = output.one_error_line();
        assert!(line.contains("cgroup"), "{line}");
        assert_eq!(scratch.leftovers(), [] as [String; 0]);
    }
}

/// Memory of a file comes in small pages, each with an entry in this process's tables and in the hypervisor's. Both stay
/// when the memory goes back, and cost the host.
#[test]
fn page_tables_that_a_guest_had_the_host_build_are_counted_without_a_cgroup_too() {
    need_kvm!();
    let shmem = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    if !shmem.contains("[never]") && !shmem.contains("[advise]") {
        return skipped("shared memory comes in huge pages here");
    }
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 256M --cpus 1 --backing memfd");
    let page_tables = |status: &serde_json::Value| number(status, "page_table_bytes");
    let before = page_tables(&vm.status());
    vm.json("guest alloc 128M");
    let full = vm.status();
    // 8 bytes for each 4 KiB, twice.
    let both = 2 * 128 * MIB / 512;
    assert!(page_tables(&full) >= before + both && page_tables(&full) < before + 2 * both, "{before}: {full:#}");
    assert!(number(&full, "cost_bytes") >= number(&full, "resident_bytes") + both, "{full:#}");
    vm.json("guest free all");
    vm.json("shrink --to 64M --wait 10s");
    assert!(page_tables(&vm.status()) >= both / 2, "this process's tables stay");
    vm.stop();
}
