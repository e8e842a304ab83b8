//! Compiles the kernel's file and the model that it is tested in.

fn main() {
    let sources = ["../mm/llfree.c", "stub/buddy.c"];
    for source in sources.into_iter().chain(["../mm/llfree.h", "stub/kernel.h"]) {
        println!("cargo::rerun-if-changed={source}");
    }
    cc::Build::new().include("stub").include("../mm").files(sources).std("gnu11").opt_level(2).compile("llfree-kernel");
}
