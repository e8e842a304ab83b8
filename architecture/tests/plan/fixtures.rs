//! Small crates written for a test, and the search for cycles tried on them.

use crate::cycles::cycles;
use crate::source::Crate;

/// Reads a crate of these files, the root first.
pub(crate) fn read(files: &[(&str, &str)]) -> Crate {
    let scratch = tempfile::tempdir().expect("there is room for a few small files");
    for (name, text) in files {
        let path = scratch.path().join(name);
        let directory = path.parent().expect("a file lies in a directory");
        std::fs::create_dir_all(directory).expect("the scratch directory takes directories");
        std::fs::write(path, text).expect("the scratch directory takes files");
    }
    Crate::read(&scratch.path().join(files[0].0), scratch.path())
}

/// The cycles of such a crate, without the uses behind them.
fn found(files: &[(&str, &str)]) -> Vec<String> {
    let cycles = cycles(&read(files));
    cycles.iter().filter_map(|cycle| Some(cycle.lines().next()?.to_owned())).collect()
}

/// The cycles of a crate with this text in module `a`, and a module `b` that uses `a`.
fn beside_a_user(a: &str) -> Vec<String> {
    let root = "mod a; mod b;";
    let b = "use crate::a::A; pub struct B; pub fn f() {} pub trait T {}";
    found(&[("lib.rs", root), ("a.rs", &format!("pub struct A;\n{a}")), ("b.rs", b)])
}

const NONE: [&str; 0] = [];
const CYCLE: [&str; 1] = ["a -> b -> a"];

#[test]
fn a_cycle_is_reported_with_its_files_lines_and_imports() {
    let root = "mod a;\nmod b;\nmod c;\n";
    let a = "//! A.\n\nuse crate::b::{\n    B,\n    f,\n};\npub struct A;\n";
    let b = "use crate::c::C;\npub struct B;\npub fn f() {}\n";
    let c = "pub struct C;\nfn g() {\n    let _ = super::a::A;\n}\n";
    let cycles = cycles(&read(&[("lib.rs", root), ("a.rs", a), ("b.rs", b), ("c.rs", c)]));
    let expected = "\
a -> b -> c -> a
  a -> b: 2
    a.rs:4: `crate::b::B` is in b.rs
    a.rs:5: `crate::b::f` is in b.rs
  b -> c: 1  <- fewest: look here first
    b.rs:1: `crate::c::C` is in c.rs
  c -> a: 1
    c.rs:3: `super::a::A` is in a.rs
";
    assert_eq!(cycles, [expected]);
}

#[test]
fn a_crate_whose_arrows_point_down_has_none() {
    let files = [
        ("main.rs", "mod a; mod b; mod c; fn main() { a::run(); }"),
        ("a.rs", "use crate::{b, c::C}; pub fn run() { b::f(); }"),
        ("b.rs", "use crate::c::C; pub fn f() {}"),
        ("c.rs", "use std::fmt; use other::a::A; pub struct C;"),
    ];
    assert_eq!(found(&files), NONE);
}

#[test]
fn every_cycle_is_reported_until_none_is_left() {
    let root = "mod a; mod b; mod c;";
    let a = "use crate::b::B; use crate::c::C; pub struct A;";
    let b = "use crate::a::A; pub struct B;";
    let c = "use crate::a::A; pub struct C;";
    let all = found(&[("lib.rs", root), ("a.rs", a), ("b.rs", b), ("c.rs", c)]);
    assert_eq!(all, ["a -> b -> a", "a -> c -> a"]);
}

#[test]
fn every_way_to_name_a_thing_is_an_arrow() {
    for way in [
        "use crate::b::B;",
        "use super::b::{self, f as g};",
        "use super::b as other; fn g() { other::f(); }",
        "use crate::b; fn g() -> b::B { b::B }",
        "use crate::b::*;",
        "fn g() { crate::b::f(); }",
        "fn g() { use crate::b::f; f(); }",
        "fn g(b: &dyn self::super::b::T) {}",
        "mod inner { use super::super::b::B; }",
        "mod inner { use crate::b::B; } use inner::*;",
        "impl crate::b::T for A {}",
        "struct Held(Vec<Option<crate::b::B>>);",
        "use crate::b::T as _;",
        "#[cfg(not(test))] use crate::b::B;",
        "#[cfg(any(test, loom))] use crate::b::B;",
    ] {
        assert_eq!(beside_a_user(way), CYCLE, "{way}");
    }
}

#[test]
fn what_only_looks_like_the_module_is_no_arrow() {
    for way in [
        "use b::B;",
        "use ::b::B;",
        "fn g() { ::b::f(); }",
        "/// As [`crate::b::f`] does.\npub(in crate) fn g() {}",
        "fn g(b: A) { let f = b; }",
        "fn g() { println!(\"crate::b::f()\"); }",
        "fn g() { println!(\"{}\", ::b::f()); }",
        "mod inner { pub(in crate::a) use std::fmt; }",
    ] {
        assert_eq!(beside_a_user(way), NONE, "{way}");
    }
}

#[test]
fn what_only_tests_contain_is_no_arrow() {
    for way in [
        "#[cfg(test)] use crate::b::B;",
        "#[cfg(all(test, unix))] mod tests { use crate::b::B; }",
        "#[cfg(test)] mod nowhere;",
        "impl A { #[cfg(test)] fn g() { crate::b::f(); } }",
        "fn g() { #[cfg(test)] use crate::b::f; }",
    ] {
        assert_eq!(beside_a_user(way), NONE, "{way}");
    }
    let kept_for_tests = "#![cfg(test)] use crate::b::B;";
    let files = [("lib.rs", "mod a; mod b;"), ("a.rs", kept_for_tests), ("b.rs", "use crate::a::A; pub struct B;")];
    assert_eq!(found(&files), NONE);
}

#[test]
fn paths_among_the_arguments_of_macros_and_attributes_are_arrows() {
    for way in [
        "fn g() { println!(\"{}\", crate::b::f()); }",
        "fn g() { assert!(matches!(x, [super::b::B, ..])); }",
        "use crate::b; fn g() { vec![b::f()]; }",
        "fn g() { crate::b::a_macro!(); }",
        "macro_rules! m { () => { $crate::b::f() } }",
        "#[error(\"{}\", crate::b::f())] struct Failed;",
    ] {
        assert_eq!(beside_a_user(way), CYCLE, "{way}");
    }
}

/// A macro is plain text to this search: its body counts where it is defined, not where it is used.
#[test]
fn what_a_macro_expands_to_is_not_seen() {
    let files = [
        ("lib.rs", "#[macro_use] mod m; mod a; mod b;"),
        ("m.rs", "macro_rules! call { () => { $crate::b::f() } }"),
        ("a.rs", "pub struct A; fn g() { call!(); }"),
        ("b.rs", "use crate::a::A; pub fn f() {}"),
    ];
    assert_eq!(found(&files), NONE);
}

#[test]
fn a_facade_is_no_arrow_and_hides_none() {
    let root = "mod a; mod b; pub use a::A; pub use b::*; pub fn of_the_root() {}";
    let b = "use crate::A; use crate::of_the_root; pub struct B;";
    assert_eq!(found(&[("lib.rs", root), ("a.rs", "pub struct A;"), ("b.rs", b)]), NONE);
    let a = "use crate::B; pub struct A;";
    assert_eq!(found(&[("lib.rs", root), ("a.rs", a), ("b.rs", b)]), CYCLE);
}

#[test]
fn a_re_export_of_something_beside_is_an_arrow() {
    assert_eq!(beside_a_user("pub use crate::b::B;"), CYCLE);
}

#[test]
fn a_parent_either_uses_its_child_or_is_used_by_it() {
    let with = |parent: &str, child: &str| found(&[("lib.rs", "mod p;"), ("p.rs", parent), ("p/child.rs", child)]);
    let used = "use super::Parent; pub struct Child; pub fn f() {}";
    let plain = "pub struct Child; pub fn f() {}";
    let shows = "mod child; pub use child::Child; pub struct Parent;";
    assert_eq!(with(shows, used), NONE);
    for uses in [
        "mod child; use child::Child; pub struct Parent;",
        "mod child; pub use child::Child; pub struct Parent(Child);",
        "mod child; pub struct Parent; fn g() { child::f(); }",
    ] {
        assert_eq!(with(uses, plain), NONE, "{uses}");
        let cycles = with(uses, used);
        assert_eq!(cycles.len(), 1, "{uses}: {cycles:?}");
        assert!(cycles[0].contains("crate::p") && cycles[0].contains("p::child"), "{uses}: {cycles:?}");
    }
}

#[test]
fn modules_are_one_with_all_that_is_below_them() {
    let files = [
        ("lib.rs", "mod a; mod b;"),
        ("a/mod.rs", "mod one; mod two;"),
        ("a/one.rs", "use crate::b::one::One; pub struct Of;"),
        ("a/two.rs", "pub struct Two;"),
        ("b.rs", "pub mod one; mod two;"),
        ("b/one.rs", "pub struct One;"),
        ("b/two.rs", "use crate::a::two::Two;"),
    ];
    assert_eq!(found(&files), CYCLE);
}

#[test]
fn siblings_below_are_held_to_the_same_rule() {
    let files = [
        ("lib.rs", "mod p;"),
        ("p/mod.rs", "mod a; mod b;"),
        ("p/a.rs", "use super::b::B; pub struct A;"),
        ("p/b.rs", "use crate::p::a::A; pub struct B;"),
    ];
    assert_eq!(found(&files), ["p::a -> p::b -> p::a"]);
}

#[test]
fn files_are_found_where_the_compiler_finds_them() {
    let files = [
        ("src/lib.rs", "#[path = \"../elsewhere/odd.rs\"] mod a; mod b; mod inline { pub mod deep; } mod r#type;"),
        ("elsewhere/odd.rs", "mod next; pub struct A;"),
        ("elsewhere/next.rs", "use crate::b::B;"),
        ("src/b.rs", "use crate::{a::A, inline::deep::Deep, r#type::Kind}; pub struct B; mod below;"),
        ("src/b/below.rs", "#[path = \"beside.rs\"] mod odd;"),
        ("src/b/beside.rs", "pub struct Beside;"),
        ("src/inline/deep.rs", "use crate::b::B; pub struct Deep;"),
        ("src/type.rs", "use crate::b::B; pub struct Kind;"),
    ];
    assert_eq!(found(&files), ["a -> b -> a", "b -> inline::deep -> b", "b -> type -> b"]);
}

#[test]
fn imports_that_lead_back_to_themselves_lead_nowhere() {
    let a = "pub use crate::b::Lost; use fmt::fmt; pub use super::b::*;";
    let b = "pub use crate::a::Lost; pub use crate::a::*;";
    assert_eq!(found(&[("lib.rs", "mod a; mod b; use a::Lost;"), ("a.rs", a), ("b.rs", b)]), CYCLE);
}
