//! The demo, on a guest small enough for any machine: every number it promises, and its verdict.

use crate::common::{MIB, Process, Scratch, has_fields, need_kvm, number, wait_for};
use rustix::process::Signal;

#[test]
fn the_demo_proves_its_story_in_numbers() {
    need_kvm!();
    let scratch = Scratch::new();
    let output = scratch.run(&["demo", "--mem", "512M", "--touch", "256M", "--json"]).exits(0);
    let report = output.json();
    has_fields(
        &report,
        &[
            "memory_bytes",
            "touch_bytes",
            "kept_bytes",
            "shrink_target_bytes",
            "boot_ms",
            "boot_resident_bytes",
            "boot_cost_bytes",
            "touched_resident_bytes",
            "touched_cost_bytes",
            "shrunk_resident_bytes",
            "shrunk_cost_bytes",
            "vmm_overhead_bytes",
            "shrink_ms",
            "shrink_us_per_frame",
            "grow_ms",
            "grow_us_per_frame",
            "verified",
            "violations",
            "passed",
            "failures",
        ],
    );
    assert_eq!((number(&report, "memory_bytes"), number(&report, "touch_bytes")), (512 * MIB, 256 * MIB));
    assert!(number(&report, "boot_cost_bytes") <= 64 * MIB, "{report:#}");
    assert!(number(&report, "boot_resident_bytes") <= 8 * MIB, "resident is the guest's alone: {report:#}");
    assert!(number(&report, "touched_resident_bytes") >= 256 * MIB, "{report:#}");
    let target = number(&report, "shrink_target_bytes");
    assert!(number(&report, "shrunk_resident_bytes") <= target, "{report:#}");
    assert!(number(&report, "shrunk_cost_bytes") <= target + 64 * MIB, "{report:#}");
    assert!(number(&report, "kept_bytes") > 0 && number(&report, "kept_bytes") < target, "{report:#}");
    assert!(number(&report, "vmm_overhead_bytes") <= 24 * MIB, "{report:#}");
    for time in ["boot_ms", "shrink_ms", "shrink_us_per_frame", "grow_ms", "grow_us_per_frame"] {
        assert!(report[time].as_f64().expect("a number") > 0.0, "{time}: {report:#}");
    }
    assert_eq!((&report["verified"], &report["passed"]), (&true.into(), &true.into()));
    assert_eq!(number(&report, "violations"), 0);
    assert_eq!(report["failures"], serde_json::json!([]));
    assert_eq!(output.stderr, "");
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
}

#[test]
fn the_demo_draws_its_story_for_people() {
    need_kvm!();
    let scratch = Scratch::new();
    let text = scratch.run(&["demo", "--mem", "256M"]).exits(0).stdout;
    for word in ["boot ", "touch ", "free ", "shrink ", "grow ", "again ", "resident", "limit", "MiB\n", "PASSED: "] {
        assert!(text.contains(word), "{word:?} is missing:\n{text}");
    }
    assert!(!text.contains('\x1b'), "no terminal, no escape sequences:\n{text}");
}

#[test]
fn the_smallest_demo_and_other_shapes_pass_too() {
    need_kvm!();
    let scratch = Scratch::new();
    for args in [
        &["--mem", "128M"][..],
        &["--mem", "128M", "--touch", "4M"],
        &["--mem", "128M", "--touch", "112M"],
        &["--mem", "256M", "--touch", "226M", "--cpus", "1"],
        &["--mem", "130M", "--touch", "50M", "--cpus", "3"],
        &["--mem", "128M", "--backing", "memfd"],
    ] {
        let output = scratch.run(&[&["demo", "--json"], args].concat());
        assert_eq!(output.code(), 0, "{args:?}: {output:#?}");
        assert_eq!(output.json()["passed"], true);
    }
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    need_kvm!();
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let scratch = Scratch::new();
        let demo = Process::spawn(&mut scratch.command(&["demo", "--mem", "1G", "--touch", "1000M"]));
        wait_for("it boots", || demo.stdout().contains("boot ").then_some(()));
        demo.signal(signal);
        let output = demo.wait();
        // On a machine faster than this test it was over already.
        assert!([0, code].contains(&output.code()), "{output:#?}");
        assert_eq!(std::fs::read_dir(scratch.path()).expect("scratch").count(), 0);
    }
}
