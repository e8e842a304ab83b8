//! No test and no example of the documentation that nobody runs: a target may say `test = false` or `doctest = false`,
//! which spares a build and a start, only while it has none.

use crate::workspace::{packages, top};
use cargo_metadata::{Package, Target, TargetKind};
use std::path::{Path, PathBuf};

/// The Rust files of a target: of a library all beside and below its first, of a program beside a library that alone.
fn sources(package: &Package, target: &Target) -> Vec<PathBuf> {
    let file = target.src_path.as_std_path();
    let below = file.parent().expect("a file lies in a directory");
    let library = package.targets.iter().find(|other| is_library(other));
    if library.is_some_and(|library| library.src_path != target.src_path && library.src_path.starts_with(below)) {
        return vec![file.to_owned()];
    }
    crate::workspace::files(".rs").into_iter().filter(|path| path.starts_with(below)).collect()
}

fn is_library(target: &Target) -> bool {
    [TargetKind::Lib, TargetKind::RLib].iter().any(|kind| target.is_kind(kind.clone()))
}

/// The first line that opens an example which `cargo test` would build.
fn example(text: &str) -> Option<usize> {
    let mut inside = false;
    text.lines().position(|line| {
        let line = line.trim_start();
        let Some(doc) = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) else { return false };
        let Some(words) = doc.trim_start().strip_prefix("```") else { return false };
        inside = !inside;
        inside && !["text", "ignore", "sh", "toml", "json", "c"].contains(&words.trim())
    })
}

/// The first line that makes a function a test.
fn test(text: &str) -> Option<usize> {
    text.lines().position(|line| line.trim() == "#[test]")
}

fn unrun(package: &Package, target: &Target, find: impl Fn(&str) -> Option<usize>) -> Option<String> {
    sources(package, target).iter().find_map(|path| {
        let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let at = find(&text)?;
        let path = path.strip_prefix(top()).unwrap_or(path);
        Some(format!("{}:{}", Path::display(path), at + 1))
    })
}

#[test]
fn what_is_written_to_be_run_is_run() {
    for package in packages() {
        for target in &package.targets {
            let name = format!("{}, {}", package.name, target.name);
            if is_library(target) && !target.doctest {
                let found = unrun(package, target, example);
                assert_eq!(found, None, "{name}: an example of the documentation, and `doctest = false` in Cargo.toml");
            }
            if (is_library(target) || target.is_kind(TargetKind::Bin)) && !target.test {
                let found = unrun(package, target, test);
                assert_eq!(found, None, "{name}: a test, and `test = false` in Cargo.toml");
            }
        }
    }
}

#[test]
fn examples_and_tests_are_seen() {
    assert_eq!(example("//! ```text\n//! a\n//! ```\nfn f() {}\n/// ```\n/// f();\n/// ```\n"), Some(4));
    assert_eq!(example("//! ```text\n//! a\n//! ```\n"), None);
    assert_eq!(test("mod tests {\n    #[test]\n"), Some(1));
    assert_eq!(test("// #[test]\n"), None);
}
