//! Builds the bare-metal guest with a Cargo of its own and leaves its ELF where `lib.rs` embeds it.
//!
//! The guest is compiled for this same target but needs other compiler flags than the rest of the
//! workspace, and must not see the caller's: coverage, sanitizers or `target-cpu=native` would
//! break its link or put instructions into it that a guest may not have. So the nested Cargo gets
//! a target directory, flags and an environment of its own; only what says where crates come from
//! is passed on.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Explicit, as then the flags below do not apply to procedural macros and build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Linked at a fixed address; no red zone, so that the same code could run in ring 0, where an
/// exception pushes onto the stack in use; no unwind tables, as nothing unwinds; no CPU feature
/// beyond the base.
const RUSTFLAGS: [&str; 4] =
    ["-Crelocation-model=static", "-Cno-redzone=yes", "-Cforce-unwind-tables=no", "-Ctarget-cpu=x86-64"];
/// The packages that the guest is made of.
const PACKAGES: [&str; 6] = ["shared-layout", "guest-abi", "agent-abi", "agent-core", "llfree", "guest-shim"];
/// What is read of each, as far as it is there.
const PARTS: [&str; 4] = ["Cargo.toml", "build.rs", "guest.ld", "src"];

fn main() {
    let here = variable("CARGO_MANIFEST_DIR");
    let out = variable("OUT_DIR");
    println!("cargo:rerun-if-changed={}", here.join("build.rs").display());
    // Cargo leaves it in what it packs, and nowhere else.
    let is_packed = here.join("Cargo.toml.orig").exists();
    let root = if is_packed {
        let root = out.join("sources");
        println!("cargo:rerun-if-changed={}", here.join("guest").display());
        unpack(&here.join("guest"), &root).unwrap_or_else(|error| panic!("unpacking the guest's sources: {error}"));
        root
    } else {
        let root = here.join("..");
        let parts = PACKAGES.iter().flat_map(|package| PARTS.iter().map(move |part| format!("{package}/{part}")));
        for source in parts.chain(["Cargo.toml", "Cargo.lock"].map(str::to_owned)) {
            let source = root.join(source);
            if source.exists() {
                println!("cargo:rerun-if-changed={}", source.display());
            }
        }
        root
    };
    let elf = build(&root, &out.join("guest"), is_packed);
    let embedded = out.join("guest-shim.elf");
    if let Err(error) = std::fs::copy(&elf, &embedded) {
        panic!("copying {} to {}: {error}", elf.display(), embedded.display());
    }
}

/// Makes a workspace of what this package brings of the guest: a package cannot have packages in it, so their manifests
/// have another name there.
fn unpack(packed: &Path, root: &Path) -> io::Result<()> {
    if root.exists() {
        std::fs::remove_dir_all(root)?;
    }
    for package in PACKAGES {
        let (from, to) = (packed.join(package), root.join(package));
        copy(&from, &to)?;
        std::fs::remove_file(to.join("manifest.toml"))?;
        let manifest = std::fs::read_to_string(from.join("manifest.toml"))?;
        std::fs::write(to.join("Cargo.toml"), without_tests(&manifest))?;
    }
    let workspace = std::fs::read_to_string(packed.join("workspace.toml"))?;
    std::fs::write(root.join("Cargo.toml"), with_members(&workspace))?;
    // It has more crates than are needed; the nested Cargo takes those out.
    std::fs::copy(packed.join("workspace.lock"), root.join("Cargo.lock")).map(drop)
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() { copy(&from, &to)? } else { std::fs::copy(&from, &to).map(drop)? }
    }
    Ok(())
}

/// The manifest without what only tests need: the package has neither them nor what they link.
fn without_tests(manifest: &str) -> String {
    let mut kept = true;
    let lines = manifest.lines().filter(|line| {
        if line.starts_with('[') {
            kept = !(line.ends_with("dev-dependencies]") || *line == "[[test]]");
        }
        kept
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// The workspace's manifest with the guest's packages for members.
fn with_members(manifest: &str) -> String {
    let mut in_list = false;
    let lines = manifest.lines().filter(|line| {
        in_list |= line.starts_with("members = [") || line.starts_with("exclude = [");
        let kept = !in_list;
        in_list &= !line.ends_with(']');
        kept
    });
    let lines: String = lines.map(|line| format!("{line}\n")).collect();
    lines.replacen("[workspace]\n", &format!("[workspace]\nmembers = {PACKAGES:?}\n"), 1)
}

/// Runs the nested build and returns where the ELF is.
fn build(root: &Path, target_dir: &Path, is_packed: bool) -> PathBuf {
    let mut cargo = Command::new(variable("CARGO"));
    cargo.current_dir(root);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_foreign) {
            cargo.env_remove(name);
        }
    }
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        // Symbols stay for crash reports; line tables would be bulk, in the binary and in the memory of each VM. Cargo
        // heeds this only for a package that has no profile of its own in the manifest; so the units stand here.
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .args(["build", "--release", "--package", "guest-shim", "--bin", "guest-shim"])
        .args(["--features", "bare-metal", "--target", TARGET, "--target-dir"])
        .arg(target_dir);
    if !is_packed {
        // The lock file is the caller's, who brought it up to date a moment ago.
        cargo.arg("--locked");
    }
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
