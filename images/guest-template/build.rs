//! Links the guest by guest.ld, without a C library.

fn main() {
    println!("cargo:rerun-if-changed=guest.ld");
    let dir = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for every build script");
    for arg in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        &format!("-Wl,-T{dir}/guest.ld"),
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=0x1000",
        "-Wl,-z,noexecstack",
        "-Wl,--gc-sections",
    ] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
}
