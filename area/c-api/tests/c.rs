//! A program in C against the static library, and the header against the library's own numbers.

use llfree_area_c::{CStats, FLAGS, STATUS};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use test_support::skipped;

const HEADER: &str = include_str!("../include/llfree_area.h");
const SOURCES: [&str; 2] = [include_str!("../src/lib.rs"), include_str!("../src/file.rs")];

fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn here(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn succeeds(mut command: Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}: {text}", output.status);
    output
}

/// The library that was built with this test, beside its own binary: the newest, for its name has a number of Cargo's.
fn static_library() -> PathBuf {
    let own = std::env::current_exe().expect("this test");
    let files = std::fs::read_dir(own.parent().expect("a directory")).expect("it is there");
    let is_library = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with("libllfree_area_c") && name.ends_with(".a")
    };
    let built = |path: &PathBuf| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let libraries = files.filter_map(|entry| Some(entry.ok()?.path())).filter(is_library);
    libraries.max_by_key(built).expect("it was built with this test")
}

/// Compiles a program, links it with the library and runs it.
fn run(source: &Path, name: &str) -> Option<Output> {
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    if !Command::new(&cc).arg("--version").output().is_ok_and(|output| output.status.success()) {
        skipped(format_args!("there is no C compiler `{cc}` here"));
        return None;
    }
    let program = scratch().join(format!("{name}-{}", std::process::id()));
    let mut compile = Command::new(cc);
    compile.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-D_POSIX_C_SOURCE=200809L", "-I"]);
    compile.arg(here("include")).arg(source).arg(static_library());
    compile.args(["-lpthread", "-ldl", "-lm", "-o"]).arg(&program);
    succeeds(compile);
    let mut command = Command::new(&program);
    // For its files.
    command.arg(scratch());
    let output = succeeds(command);
    std::fs::remove_file(&program).expect("ours");
    Some(output)
}

/// One test, for each program links all of the library.
#[test]
fn every_function_does_from_c_what_the_header_says() {
    // The layout, as assertions that the C compiler checks, before the program that uses it.
    let mut program = "#include <llfree_area.h>\n".to_owned();
    let mut assert = |what: &str, number: i64| {
        writeln!(program, "_Static_assert({what} == {number}, \"{what}\");").expect("memory");
    };
    for (status, name, _) in STATUS {
        assert(name, status as i64);
    }
    for (flag, name) in FLAGS {
        assert(name, flag.into());
    }
    assert("sizeof(llfree_area_stats)", size_of::<CStats>() as i64);
    assert("offsetof(llfree_area_stats, reclaimable)", std::mem::offset_of!(CStats, reclaimable) as i64);
    program.push_str(&std::fs::read_to_string(here("tests/c/checks.c")).expect("it is there"));
    let source = scratch().join(format!("area-checks-{}.c", std::process::id()));
    std::fs::write(&source, program).expect("a scratch directory");
    let output = run(&source, "area-checks");
    std::fs::remove_file(&source).expect("ours");
    let Some(output) = output else { return };
    assert_eq!(String::from_utf8_lossy(&output.stdout), "well\n");
}

#[test]
fn the_header_declares_each_function_and_no_other() {
    let names = |text: &'static str, mark: &'static str| text.split(mark).skip(1);
    let mut exported: Vec<&str> = SOURCES
        .into_iter()
        .flat_map(|source| names(source, "pub unsafe extern \"C\" fn ").chain(names(source, "pub extern \"C\" fn ")))
        .filter_map(|rest| rest.split_once('('))
        .map(|split| split.0)
        .collect();
    let mut declared: Vec<&str> = HEADER
        .lines()
        .filter(|line| line.contains('(') && !line.starts_with(['#', ' ', '/', '\t']) && !line.starts_with("typedef"))
        .filter_map(|line| line.split_once('(')?.0.rsplit([' ', '*']).next())
        .collect();
    exported.sort_unstable();
    declared.sort_unstable();
    assert!(exported.len() > 15);
    assert_eq!(exported, declared);
}
