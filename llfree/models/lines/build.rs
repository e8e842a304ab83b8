//! Exchanges the atomics of the sources that this package tests.

fn main() {
    println!("cargo::rustc-cfg=lines");
    println!("cargo::rerun-if-changed=build.rs");
}
