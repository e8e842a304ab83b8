//! The template of a guest of one's own (`images/guest-template`): built as its page says, booted, and at its end.

use crate::common::{Scratch, need_kvm};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the template as a newcomer would, but for a directory for what comes out.
fn build() -> PathBuf {
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/guest-template");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-template");
    let mut cargo = Command::new(env!("CARGO"));
    // What a test inherits of its own build is not in a newcomer's shell.
    for (name, _) in std::env::vars_os() {
        let foreign = ["CARGO_ENCODED", "CARGO_BUILD", "CARGO_TARGET", "CARGO_MANIFEST", "RUSTFLAGS", "RUSTC_"];
        if name.to_str().is_some_and(|name| foreign.iter().any(|foreign| name.starts_with(foreign))) {
            cargo.env_remove(name);
        }
    }
    let output = cargo
        .current_dir(template)
        .args(["build", "--release", "--locked", "--target-dir"])
        .arg(&target)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target.join("x86_64-unknown-linux-gnu/release/guest-template")
}

#[test]
fn a_guest_of_ones_own_boots_allocates_and_ends() {
    need_kvm!();
    let image = build();
    let image = image.to_str().expect("text");
    for (memory, cpus) in [("64M", "1"), ("256M", "2")] {
        let scratch = Scratch::new();
        let output = scratch.run(&["--mem", memory, "--cpus", cpus, "-v", "--kernel", image]).exits(0);
        let lines: Vec<&str> = output.stderr.lines().filter(|line| line.contains("guest vCPU 0:")).collect();
        assert!(lines[0].ends_with("hello from a guest of my own"), "{output:?}");
        assert!(lines[1].ends_with("all memory is mine, and goes back"), "{output:?}");
        assert_eq!(lines.len(), 2, "{output:?}");
        assert_eq!(scratch.leftovers(), [] as [String; 0]);
    }
}
