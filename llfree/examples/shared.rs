//! Two processes, one table: a tenant allocates in memory that its parent, the host, shares with it.
//! The host takes back what the tenant does not use, without asking it.
//!
//! `cargo run -p llfree --example shared`

use llfree::{Allocation, HUGE_SIZE, HugeRange, Initial, Order, Reclaim, Residency, Table, Tenant};
use std::sync::atomic::AtomicU8;

/// 64 MiB of memory to give out.
const HUGE: u32 = 32;

fn main() {
    let bytes = Table::bytes_for(HUGE).expect("in range");
    let base = map_shared(bytes);
    // SAFETY: the mapping is page aligned, so long and never unmapped, and nobody else has it yet.
    let table = unsafe { Table::from_raw(base, bytes, HUGE, Initial::Free) }.expect("the mapping is made for it");

    // SAFETY: no other thread runs yet, so the child may do what it likes.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        // The mapping is at the same place here. Elsewhere, a process maps the same file and makes its
        // table with `Initial::Joined`.
        tenant(table.tenant());
        return;
    }
    let mut status = 0;
    // SAFETY: `status` outlives the call, and the child is ours.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the tenant did its part");

    // The host keeps what it knows in memory of its own.
    let residency: Vec<_> = (0..HUGE).map(|_| AtomicU8::new(Residency::Installed as u8)).collect();
    let host = table.host(&residency).expect("one a huge frame");
    let before = host.census();
    let taken = HugeRange::up_to(HUGE)
        .iter()
        .filter_map(|huge| host.claim(huge)?.reclaim(Reclaim::Hard).ok())
        // Here a host would give the memory of these frames back to its kernel.
        .map(llfree::Reclaimed::done)
        .count();
    println!("the tenant uses {} KiB; the host took {} MiB", before.used_frames * 4, (taken as u64 * HUGE_SIZE) >> 20);
    assert_eq!(taken as u64, before.free_installed);
}

/// The other process: allocates a little, keeps it, and ends.
fn tenant(frames: Tenant<'_>) {
    let mut cpu = frames.cpu();
    for order in [0, 0, 3, 9] {
        let order = Order::new(order).expect("in range");
        let Ok(Allocation::Ready(block)) = cpu.alloc(order) else { panic!("all memory is free and installed") };
        println!("the tenant has frame {} of order {}", block.frame().0, block.order().get());
    }
    // Dropping the handle gives back what it cached.
}

fn map_shared(bytes: usize) -> *mut u8 {
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    base.cast()
}
