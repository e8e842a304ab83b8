//! Compiles the kernel's files and the model that they are tested in.

fn main() {
    let sources = ["../mm/llfree.c", "../mm/llfree_aside.c", "stub/buddy.c"];
    for source in sources.into_iter().chain(["../mm/llfree.h", "../mm/llfree_host.h", "stub/kernel.h"]) {
        println!("cargo::rerun-if-changed={source}");
    }
    let mut build = cc::Build::new();
    // As the kernel's own files are compiled.
    build.include("stub").include("../mm").files(sources).std("gnu11").opt_level(2).flag("-Wno-sign-compare");
    build.compile("llfree-kernel");
}
