//! The module's C transitions against those of `shared-layout`, over every value that an entry can have.

// The library has the C file.
use llfree_module_check as _;
use shared_layout::{FRAMES_PER_HUGE, HugeEntry};

#[link(name = "llfree-module-entry", kind = "static")]
unsafe extern "C" {
    safe fn module_hold(entry: u16) -> i32;
    safe fn module_release(entry: u16) -> i32;
    safe fn module_keep(entry: u16) -> i32;
    safe fn module_is_resident(entry: u16) -> bool;
}

fn of(next: Option<HugeEntry>) -> i32 {
    next.map_or(-1, |next| next.bits().into())
}

/// DKMS finds the source by its name and version, where the package has it.
#[test]
fn the_package_has_the_source_where_dkms_looks() {
    let (dkms, package) = (include_str!("../../dkms.conf"), include_str!("../../../cli/Cargo.toml"));
    let version = env!("CARGO_PKG_VERSION");
    assert!(dkms.contains(&format!("PACKAGE_NAME=\"vllfree\"\nPACKAGE_VERSION=\"{version}\"\n")));
    let there = format!("usr/src/vllfree-{version}/");
    let files = ["*.c", "*.h", "Kbuild", "Makefile", "dkms.conf", "LICENSE"];
    for file in files {
        assert!(package.contains(&format!("[\"../module/{file}\", \"{there}\", \"644\"]")), "{file}");
    }
    assert_eq!(package.matches("usr/src/vllfree-").count(), files.len());
}

/// A file that is added has to be named in each list without a pattern.
#[test]
fn each_file_of_the_module_is_built_and_packed() {
    let (kbuild, packed) = (include_str!("../../Kbuild"), include_str!("../../../ops/check-packages"));
    let names = |ending: &str| {
        let sources = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).expect("the module's directory");
        let names = sources.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter_map(|name| name.strip_suffix(ending).map(str::to_owned)).collect();
        names.retain(|name| !name.ends_with(".mod"));
        names.sort();
        names
    };
    let list = |ending: &str, between: &str| {
        let files = names(ending).into_iter().map(|name| name + ending);
        files.collect::<Vec<_>>().join(between)
    };
    let objects = list(".c", " ").replace(".c", ".o");
    assert!(kbuild.contains(&format!("vllfree-y := {objects}\n")), "{objects}");
    for packed_list in [format!("{{{}}} ", list(".c", ",")), format!("LICENSE,{}}} ", list(".h", ","))] {
        assert!(packed.contains(&packed_list), "{packed_list}");
    }
}

#[test]
fn every_transition_of_the_module_is_the_one_of_the_table() {
    for bits in 0..=u16::MAX {
        let entry = HugeEntry::from_bits(bits);
        let module = [module_hold(bits), module_release(bits), module_keep(bits)];
        assert_eq!(module, [entry.hold(), entry.release(), entry.keep()].map(of), "{entry:?}");
        assert_eq!(module_is_resident(bits), entry == HugeEntry::FREE_INSTALLED, "{entry:?}");
    }
}

/// Sizes and bits are the table's, and the patch of the kernel has the same bits, under the same names.
#[test]
fn both_of_our_kernel_headers_have_the_bits_of_the_table() {
    let bits = |header: &str| -> Vec<_> {
        let number = |line: &str| {
            let mut words = line.strip_prefix("#define ")?.split_whitespace();
            let (name, value) = (words.next()?, words.next()?.strip_prefix("0x")?);
            Some((name.to_owned(), u16::from_str_radix(value, 16).ok()?))
        };
        header.lines().filter_map(number).filter(|(name, _)| name.starts_with("LLFREE_")).collect()
    };
    let header = include_str!("../../llfree_entry.h");
    let of_module = bits(header);
    let [free, huge] = [HugeEntry::FREE_INSTALLED, HugeEntry::HUGE_INSTALLED].map(HugeEntry::bits);
    let evicted = HugeEntry::FREE_EVICTED.bits() ^ free;
    let held = HugeEntry::FREE_EVICTED.hold().map_or(0, HugeEntry::bits) ^ evicted;
    let of_table = [("LLFREE_FREE", free), ("LLFREE_HUGE", huge), ("LLFREE_EVICTED", evicted), ("LLFREE_HELD", held)];
    assert_eq!(of_module, of_table.map(|(name, bits)| (name.to_owned(), bits)));
    assert!(header.contains(&format!("#define LLFREE_ORDER\t\t{}\n", FRAMES_PER_HUGE.ilog2())));
    assert!(header.contains("typedef uint16_t u16;") && size_of::<HugeEntry>() == 2);
    assert_eq!(of_module, bits(include_str!("../../../images/linux/kernel/mm/llfree.h")));
}
