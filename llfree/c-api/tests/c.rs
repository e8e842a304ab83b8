//! Programs in C against the static library, and the header against the library's own numbers.

use llfree_c::{BiasedSlot, CStats, CpuSlot, HostSlot, INITIAL, Kind, Status, TableSlot};
use std::fmt::Write as _;
use std::io::Write as _;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const HEADER: &str = include_str!("../include/llfree.h");
const SOURCES: [&str; 5] = [
    include_str!("../src/lib.rs"),
    include_str!("../src/table.rs"),
    include_str!("../src/cpu.rs"),
    include_str!("../src/biased.rs"),
    include_str!("../src/host.rs"),
];

/// `None`, and the test skipped, without a C compiler.
fn compiler() -> Option<String> {
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    if Command::new(&cc).arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Some(cc);
    }
    // Past the test harness, which shows nobody what a passing test prints.
    let _ = std::io::stderr().write_all(format!("\nSKIPPED: there is no C compiler `{cc}` here\n").as_bytes());
    None
}

/// The library as a program in C gets it: not the one of this test, whose panics unwind.
fn static_library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let target = scratch().parent().expect("the scratch directory lies in the target directory").to_owned();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--locked", "--package", "llfree-c", "--lib", "--target-dir"]).arg(&target);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        if profile == "release" {
            cargo.arg("--release");
        }
        succeeds(cargo);
        target.join(profile).join("libllfree_c.a")
    })
}

fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn succeeds(mut command: Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}: {text}", output.status);
    output
}

/// Compiles a program, links it with the library and runs it.
fn run(cc: &str, source: &Path, name: &str) -> Output {
    let program = scratch().join(format!("{name}-{}", std::process::id()));
    let mut compile = Command::new(cc);
    compile.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-D_POSIX_C_SOURCE=200809L", "-I"]);
    compile.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include")).arg(source).arg(static_library());
    compile.args(["-lpthread", "-ldl", "-lm", "-o"]).arg(&program);
    succeeds(compile);
    let output = succeeds(Command::new(&program));
    std::fs::remove_file(&program).expect("ours");
    output
}

fn here(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

#[test]
fn every_function_does_from_c_what_the_header_says() {
    let Some(cc) = compiler() else { return };
    run(&cc, &here("tests/c/checks.c"), "checks");
}

#[test]
fn handles_of_sleeping_threads_are_drained_from_c() {
    let Some(cc) = compiler() else { return };
    let output = run(&cc, &here("tests/c/biased.c"), "biased");
    if String::from_utf8_lossy(&output.stdout).contains("no membarrier") {
        let _ = std::io::stderr().write_all(b"\nSKIPPED: the part with membarrier(2), which there is none of here\n");
    }
}

#[test]
fn the_example_runs() {
    let Some(cc) = compiler() else { return };
    let output = run(&cc, &here("examples/kernel.c"), "kernel");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("64236 of 65536 frames free"), "{text}");
}

/// The names and numbers that the header must have, according to the library.
fn numbers() -> Vec<(String, i64)> {
    let mut numbers: Vec<_> =
        Status::ALL.iter().map(|(status, name, _)| ((*name).to_owned(), *status as i64)).collect();
    for (number, initial) in INITIAL.iter().enumerate() {
        numbers.push((format!("LLFREE_INIT_{}", format!("{initial:?}").to_uppercase()), number as i64));
    }
    let mut add = |name: &str, number: u64| numbers.push((format!("LLFREE_{name}"), number as i64));
    add("FRAME_SIZE", llfree::FRAME_SIZE);
    add("HUGE_SIZE", llfree::HUGE_SIZE);
    add("FRAMES_PER_HUGE", llfree::FRAMES_PER_HUGE);
    add("HUGE_ORDER", llfree::Order::HUGE.get().into());
    add("MAX_ORDER", llfree::Order::MAX.get().into());
    add("MAX_HUGE_FRAMES", llfree::MAX_HUGE_FRAMES.into());
    add("REGION_ALIGN", llfree::Table::ALIGN as u64);
    add("HANDLE_FRAMES", llfree::HANDLE_FRAMES);
    add("BIASED_TOGETHER", llfree::biased::TOGETHER as u64);
    add("CLASS_IMMOVABLE", llfree::Class::IMMOVABLE.get().into());
    add("CLASS_MOVABLE", llfree::Class::MOVABLE.get().into());
    add("CLASS_HUGE", llfree::Class::HUGE.get().into());
    add("CLASSES", llfree::class::CLASSES as u64);
    add("TABLE_WORDS", words::<TableSlot>());
    add("CPU_WORDS", words::<CpuSlot>());
    add("BIASED_WORDS", words::<BiasedSlot>());
    add("HOST_WORDS", words::<HostSlot>());
    numbers
}

/// The space that a slot's value takes.
fn words<S: Words>() -> u64 {
    S::WORDS
}

trait Words {
    const WORDS: u64;
}

impl<T: Kind> Words for llfree_c::Slot<T> {
    const WORDS: u64 = T::WORDS as u64;
}

#[test]
fn the_header_defines_the_numbers_of_the_library() {
    let defined: Vec<(&str, i64)> = HEADER
        .lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split_once(' '))
        .map(|(name, value)| (name, value.trim_matches(['(', ')']).parse().expect("a number")))
        .collect();
    let numbers = numbers();
    for (name, number) in &numbers {
        assert!(defined.contains(&(name, *number)), "{name} is {number}, the header has another or none");
    }
    for (name, _) in defined {
        assert!(numbers.iter().any(|(known, _)| known == name), "{name} is the header's only");
    }
}

#[test]
fn the_header_declares_each_function_and_no_other() {
    let exported: Vec<&str> = SOURCES
        .iter()
        .flat_map(|source| source.split("extern \"C\" fn ").skip(1))
        .filter_map(|rest| rest.split_once('(').map(|(name, _)| name))
        .collect();
    let declared: Vec<&str> = HEADER
        .lines()
        .filter(|line| line.starts_with(|first: char| first.is_ascii_lowercase()))
        .filter(|line| !line.starts_with("typedef"))
        .filter_map(|line| line.split_once('(').map(|(front, _)| front))
        .filter_map(|front| front.rsplit([' ', '*']).next())
        .collect();
    assert!(exported.len() > 15, "{exported:?}");
    for name in &exported {
        assert!(declared.contains(name), "the header has no {name}");
    }
    for name in declared {
        assert!(exported.contains(&name), "{name} is the header's only");
    }
}

#[test]
fn types_have_the_layout_that_c_sees() {
    let Some(cc) = compiler() else { return };
    let sizes = [
        ("sizeof(llfree_table)", words::<TableSlot>() as usize * 8),
        ("sizeof(llfree_cpu)", words::<CpuSlot>() as usize * 8),
        ("sizeof(llfree_biased)", words::<BiasedSlot>() as usize * 8),
        ("sizeof(llfree_host)", words::<HostSlot>() as usize * 8),
        ("sizeof(llfree_status)", size_of::<Status>()),
        ("sizeof(llfree_memory_fn)", size_of::<llfree_c::MemoryFn>()),
        ("sizeof(llfree_fence_fn)", size_of::<llfree_c::FenceFn>()),
        ("sizeof(llfree_stats_t)", size_of::<CStats>()),
        ("offsetof(llfree_stats_t, frames)", offset_of!(CStats, frames)),
        ("offsetof(llfree_stats_t, free_frames)", offset_of!(CStats, free_frames)),
        ("offsetof(llfree_stats_t, free_huge)", offset_of!(CStats, free_huge)),
        ("offsetof(llfree_stats_t, free_evicted_huge)", offset_of!(CStats, free_evicted_huge)),
        ("offsetof(llfree_stats_t, allocated_huge)", offset_of!(CStats, allocated_huge)),
        ("offsetof(llfree_stats_t, partial_huge)", offset_of!(CStats, partial_huge)),
        ("offsetof(llfree_stats_t, evicted_huge)", offset_of!(CStats, evicted_huge)),
        ("offsetof(llfree_stats_t, held_huge)", offset_of!(CStats, held_huge)),
        ("_Alignof(llfree_table)", align_of::<TableSlot>()),
        ("_Alignof(llfree_cpu)", align_of::<CpuSlot>()),
        ("_Alignof(llfree_host)", align_of::<HostSlot>()),
    ];
    // Each as an assertion that the C compiler checks.
    let mut program = "#include <llfree.h>\n".to_owned();
    for (what, size) in sizes {
        writeln!(program, "_Static_assert({what} == {size}, \"{what}\");").expect("memory");
    }
    for (name, number) in numbers() {
        writeln!(program, "_Static_assert({name} == {number}, \"{name}\");").expect("memory");
    }
    program.push_str("int main(void) { return 0; }\n");
    let source = scratch().join(format!("layout-{}.c", std::process::id()));
    std::fs::write(&source, program).expect("a scratch directory");
    run(&cc, &source, "layout");
    std::fs::remove_file(&source).expect("ours");
}

#[test]
fn every_status_says_something_else() {
    let text = |status: i32| {
        // SAFETY: never null, and static.
        unsafe { std::ffi::CStr::from_ptr(llfree_c::llfree_strerror(status)) }.to_str().expect("ASCII")
    };
    for (i, (status, name, _)) in Status::ALL.into_iter().enumerate() {
        assert!(!text(status as i32).is_empty());
        for (other, other_name, _) in &Status::ALL[..i] {
            assert_ne!(text(status as i32), text(*other as i32), "{name} and {other_name}");
        }
    }
}
