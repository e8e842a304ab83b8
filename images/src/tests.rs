//! Promises of the embedded guest that its loader and the machines it runs on rely on.

use super::SHIM_ELF;
use guest_abi::header::{ABI_VERSION, NOTE_NAME, NOTE_TYPE};
use object::elf::{self, FileHeader64, ProgramHeader64};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol};
use shared_layout::{FRAME_SIZE, HUGE_SIZE};

fn header() -> &'static FileHeader64<LittleEndian> {
    FileHeader64::parse(SHIM_ELF).expect("an ELF of 64 bits")
}

fn segments() -> &'static [ProgramHeader64<LittleEndian>] {
    header().program_headers(LittleEndian, SHIM_ELF).expect("program headers")
}

fn loads() -> impl Iterator<Item = &'static ProgramHeader64<LittleEndian>> {
    segments().iter().filter(|segment| segment.p_type(LittleEndian) == elf::PT_LOAD)
}

fn file() -> ElfFile64<'static> {
    ElfFile64::parse(SHIM_ELF).expect("an ELF file")
}

#[test]
fn the_guest_is_a_static_executable_for_x86_64() {
    assert_eq!(header().e_type(LittleEndian), elf::ET_EXEC);
    assert_eq!(header().e_machine(LittleEndian), elf::EM_X86_64);
    for kind in [elf::PT_INTERP, elf::PT_DYNAMIC, elf::PT_TLS] {
        assert!(segments().iter().all(|s| s.p_type(LittleEndian) != kind), "segment of type {kind}");
    }
}

#[test]
fn the_note_states_the_abi() {
    let notes: Vec<_> = segments().iter().filter(|s| s.p_type(LittleEndian) == elf::PT_NOTE).collect();
    assert_eq!(notes.len(), 1);
    let mut notes = notes[0].notes(LittleEndian, SHIM_ELF).expect("readable").expect("a note segment");
    let note = notes.next().expect("readable").expect("one note");
    assert_eq!(note.name(), NOTE_NAME.as_bytes());
    assert_eq!(note.n_type(LittleEndian).0, NOTE_TYPE);
    assert_eq!(note.desc(), ABI_VERSION.to_le_bytes());
    assert!(notes.next().expect("readable").is_none());
}

#[test]
fn no_line_tables_are_embedded_only_symbols() {
    // Each VM's process has the whole file in its memory.
    let debug: Vec<_> = file().sections().filter_map(|s| s.name().ok().filter(|n| n.starts_with(".debug"))).collect();
    assert!(debug.is_empty(), "{debug:?}");
    assert!(file().symbols().count() > 10);
}

#[test]
fn segments_are_few_small_page_aligned_and_above_the_null_guard() {
    let mut end = HUGE_SIZE;
    for segment in loads() {
        let (start, size) = (segment.p_vaddr(LittleEndian), segment.p_memsz(LittleEndian));
        assert_eq!(segment.p_paddr(LittleEndian), start, "identity mapped");
        assert_eq!(start % FRAME_SIZE, 0);
        assert!(start >= end, "segments in order, without overlap, from 2 MiB up");
        assert!(segment.p_filesz(LittleEndian) > 0, "loaders skip a segment without bytes in the file");
        let flags = segment.p_flags(LittleEndian);
        let (write, execute) = (flags.0 & elf::PF_W.0 != 0, flags.0 & elf::PF_X.0 != 0);
        assert!(flags.0 & elf::PF_R.0 != 0 && !(write && execute));
        end = start + size;
    }
    assert!((3..=4).contains(&loads().count()));
    assert!(end - HUGE_SIZE < 256 << 10, "{} bytes loaded", end - HUGE_SIZE);
}

#[test]
fn the_entry_is_executable_and_has_a_name() {
    let entry = header().e_entry(LittleEndian);
    let home = loads().find(|s| (0..s.p_memsz(LittleEndian)).contains(&entry.wrapping_sub(s.p_vaddr(LittleEndian))));
    assert!(home.expect("in a segment").p_flags(LittleEndian).0 & elf::PF_X.0 != 0);
    assert!(file().symbols().any(|symbol| symbol.address() == entry && symbol.name() == Ok("_start")));
}

#[test]
fn crash_reports_find_functions_and_the_bounds_of_the_image() {
    let (start, end) = (symbol("__image_start"), symbol("__image_end"));
    assert_eq!(start, HUGE_SIZE);
    let last = loads().last().expect("a segment");
    assert_eq!(end, last.p_vaddr(LittleEndian) + last.p_memsz(LittleEndian));
    let functions = file().symbols().filter(|s| s.kind() == object::SymbolKind::Text && s.size() > 0).count();
    assert!(functions > 20, "{functions} functions have symbols");
}

fn symbol(name: &str) -> u64 {
    file().symbol_by_name(name).unwrap_or_else(|| panic!("no symbol {name}")).address()
}

#[test]
fn nothing_is_left_to_link() {
    let undefined: Vec<_> = file().symbols().filter(|s| s.is_undefined()).filter_map(|s| s.name().ok()).collect();
    assert!(undefined.iter().all(|name| name.is_empty()), "{undefined:?}");
}

/// What PVM, an old CPU or ring 3 would not execute. (int3 is the padding between functions.)
#[test]
fn the_guest_needs_no_special_instruction() {
    let path = std::env::temp_dir().join(format!("guest-shim-{}.elf", std::process::id()));
    std::fs::write(&path, SHIM_ELF).expect("a writable temporary directory");
    let objdump = std::process::Command::new("objdump")
        .args(["--disassemble", "--no-show-raw-insn", "--no-addresses"])
        .arg(&path)
        .output();
    std::fs::remove_file(&path).expect("just written");
    let output = match objdump {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        other => {
            // Past the harness, which shows nobody what a passing test prints.
            let _ = std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("SKIPPED: objdump is needed to look at instructions: {other:?}\n"),
            );
            return;
        }
    };
    let mut instructions = 0;
    for line in output.lines().filter(|line| line.starts_with('\t')) {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or_default();
        instructions += 1;
        let special = name.starts_with('v')
            || ["cpuid", "syscall", "sysenter", "hlt", "cli", "sti", "int", "rdtscp"].contains(&name)
            || ["in", "out", "ins", "outs", "rdmsr", "wrmsr"]
                .iter()
                .any(|n| name.strip_prefix(n).is_some_and(|suffix| ["", "b", "l", "w"].contains(&suffix)))
            || line.contains("%ymm")
            || line.contains("%zmm");
        assert!(!special, "{line}");
    }
    assert!(instructions > 1000, "{instructions} instructions seen");
}

#[test]
fn scripts_that_take_minutes_say_so_before_they_begin() {
    for (script, arguments, minutes) in [
        ("linux/build", &[][..], 1),
        ("linux/testbed", &["console"][..], 4),
        ("linux/testbed", &["console", "ends", "memfd"][..], 6),
    ] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
        // Without room for its files it ends where it would begin.
        let output = std::process::Command::new(path).args(arguments).env("TMPDIR", "/nonexistent").output();
        let output = output.expect("bash is there");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        assert!(stderr.contains(&format!(": takes about {minutes} min on two cores")), "{script}: {stderr}");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("takes"), "{script}: {output:?}");
    }
}
