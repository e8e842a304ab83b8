//! [`llfree`] for programs in C: the functions of `include/llfree.h`, which is their documentation.
//!
//! A thin skin: pointers and numbers are checked, values of ours live in memory that the caller
//! provides, and errors become numbers. Nothing here allocates or calls the system; `std` is linked
//! for its panic handler only. A kernel builds the library without it and says itself what a panic is:
//!
//! ```text
//! RUSTFLAGS="--cfg llfree_freestanding" cargo build -p llfree-c --release --target x86_64-unknown-none
//! void llfree_panic(void) __attribute__((noreturn));
//! ```
#![cfg_attr(llfree_freestanding, no_std)]

mod biased;
mod cpu;
mod host;
mod slot;
mod status;
mod table;

use core::ffi::c_char;

pub use biased::*;
pub use cpu::*;
pub use host::*;
pub use slot::{Kind, Slot};
pub use status::Status;
pub use table::*;

/// The meaning of a status; never null.
#[unsafe(no_mangle)]
pub extern "C" fn llfree_strerror(status: i32) -> *const c_char {
    let known = Status::ALL.into_iter().find(|(known, ..)| *known as i32 == status);
    known.map_or(c"no status of llfree", |(.., text)| text).as_ptr()
}

#[cfg(llfree_freestanding)]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn llfree_panic() -> !;
    }
    // SAFETY: the program's own, which does not return.
    unsafe { llfree_panic() }
}
