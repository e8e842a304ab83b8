//! Compiles the header of the module's transitions.

fn main() {
    for source in ["entry.c", "../llfree_entry.h"] {
        println!("cargo::rerun-if-changed={source}");
    }
    // As the kernel's own files are compiled.
    cc::Build::new().include("..").file("entry.c").std("gnu11").opt_level(2).compile("llfree-module-entry");
}
