//! Compiles the module's headers that need no kernel.

fn main() {
    for source in ["entry.c", "patience.c", "../llfree_entry.h", "../patience.h"] {
        println!("cargo::rerun-if-changed={source}");
    }
    // As the kernel's own files are compiled.
    cc::Build::new()
        .include("..")
        .files(["entry.c", "patience.c"])
        .std("gnu11")
        .opt_level(2)
        .compile("llfree-module-entry");
}
