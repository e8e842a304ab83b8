//! Builds the bare-metal guest with a Cargo of its own and leaves its ELF where `lib.rs` embeds it.
//!
//! The guest is compiled for this same target but needs other compiler flags than the rest of the
//! workspace, and must not see the caller's: coverage, sanitizers or `target-cpu=native` would
//! break its link or put instructions into it that a guest may not have. So the nested Cargo gets
//! a target directory, flags and an environment of its own; only what says where crates come from
//! is passed on.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Explicit, as then the flags below do not apply to procedural macros and build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Linked at a fixed address; no red zone, so that the same code could run in ring 0, where an
/// exception pushes onto the stack in use; no unwind tables, as nothing unwinds; no CPU feature
/// beyond the base.
const RUSTFLAGS: [&str; 4] =
    ["-Crelocation-model=static", "-Cno-redzone=yes", "-Cforce-unwind-tables=no", "-Ctarget-cpu=x86-64"];
/// Sources of the guest, from the workspace's root.
const SOURCES: [&str; 13] = [
    "Cargo.toml",
    "Cargo.lock",
    "agent-core/Cargo.toml",
    "agent-core/src",
    "guest-shim/Cargo.toml",
    "guest-shim/build.rs",
    "guest-shim/guest.ld",
    "guest-shim/src",
    "llfree/Cargo.toml",
    "llfree/src",
    "shared-layout/Cargo.toml",
    "shared-layout/src",
    "images/build.rs",
];

fn main() {
    let root = variable("CARGO_MANIFEST_DIR").join("..");
    for source in SOURCES {
        println!("cargo:rerun-if-changed={}", root.join(source).display());
    }
    let out = variable("OUT_DIR");
    let elf = build(&root, &out.join("guest"));
    let embedded = out.join("guest-shim.elf");
    if let Err(error) = std::fs::copy(&elf, &embedded) {
        panic!("copying {} to {}: {error}", elf.display(), embedded.display());
    }
}

/// Runs the nested build and returns where the ELF is.
fn build(root: &Path, target_dir: &Path) -> PathBuf {
    let mut cargo = Command::new(variable("CARGO"));
    cargo.current_dir(root);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_foreign) {
            cargo.env_remove(name);
        }
    }
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        // Symbols stay for crash reports; line tables of the core library would only be bulk.
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        // The lock file is the caller's, who brought it up to date a moment ago.
        .args(["build", "--release", "--locked", "--package", "guest-shim", "--bin", "guest-shim"])
        .args(["--features", "bare-metal", "--target", TARGET, "--target-dir"])
        .arg(target_dir);
    match cargo.status() {
        Ok(status) if status.success() => target_dir.join(TARGET).join("release/guest-shim"),
        Ok(status) => panic!("the build of the bare-metal guest failed ({status}); its messages are above"),
        Err(error) => panic!("running {cargo:?}: {error}"),
    }
}

/// Whether the nested build must not see this variable: what the caller's Cargo says about the
/// caller's build, and every way to change flags, profiles, wrappers or directories.
fn is_foreign(name: &str) -> bool {
    const CRATE_SOURCES: [&str; 6] =
        ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_MAKEFLAGS"];
    const BUILD: [&str; 9] =
        ["RUSTFLAGS", "RUSTDOCFLAGS", "RUSTC_", "TARGET", "HOST", "PROFILE", "OPT_LEVEL", "DEBUG", "LLVM_PROFILE_FILE"];
    if CRATE_SOURCES.iter().any(|prefix| name.starts_with(prefix)) {
        return false;
    }
    name.starts_with("CARGO")
        || name.starts_with("__CARGO")
        || BUILD.iter().any(|other| name == *other || (other.ends_with('_') && name.starts_with(other)))
}

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).map(PathBuf::from).unwrap_or_else(|| panic!("cargo sets {name} for every build script"))
}
