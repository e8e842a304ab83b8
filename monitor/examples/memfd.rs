//! A monitor with no virtual machine: 64 MiB in a memory file, a tenant in this very process that
//! allocates from the table, and a host that takes free memory back.
//!
//! `cargo run -p llfree-monitor --example memfd`

use llfree::{Allocation, Tenant};
use llfree_base::thread::Spawner;
use llfree_monitor::memory::{Backing, GuestRam, PoolConfig, Supply, UseUserfaultfd};
use llfree_monitor::{Direction, Monitor, Region, Table, TenantStart};
use shared_layout::{HUGE_SIZE, HugeRange, Order, TableLayout};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

fn main() -> Result<(), Box<dyn Error>> {
    let ram = Arc::new(GuestRam::new(32 * HUGE_SIZE, Backing::Memfd)?);
    let layout = TableLayout::new(ram.huge_frames()).ok_or("32 huge frames are a table")?;
    let region = Arc::new(Region::anonymous(layout.total as usize)?);
    let table = Table::new(region.clone(), layout)?;
    table.clear();
    let supply = Supply::new(ram.clone(), PoolConfig::default(), UseUserfaultfd::Auto, &Spawner::default())?;
    let monitor = Monitor::new(ram.clone(), supply, table, TenantStart::default())?;
    // SAFETY: the region is as long as the layout says, outlives the tenant, and is reached through atomics only.
    let tenant = unsafe { Tenant::from_raw(region.host_address() as *mut u8, &layout) };
    tenant.recount();

    let mut held = Vec::new();
    for _ in 0..16 {
        // A frame has no memory before the monitor installed it.
        let Allocation::Evicted(block) = tenant.alloc(Order::HUGE)? else { return Err("all of it was evicted".into()) };
        monitor.install(HugeRange::saturating(block.first_huge(), block.huge_frames()))?;
        let block = block.confirm(&tenant).map_err(|_| "it was installed")?;
        ram.guest_memory().write_slice(&[0xa5; HUGE_SIZE as usize], GuestAddress(block.frame().0 * 4096))?;
        held.push(block);
    }
    println!("in use: {} MiB resident", ram.residency()?.resident_bytes >> 20);
    for block in held.drain(4..) {
        tenant.free(block.frame(), block.order())?;
    }
    println!("12 of 16 frames freed: {} MiB resident", ram.residency()?.resident_bytes >> 20);
    let shrink = monitor.resize(Direction::Shrink, 8, || (), |_: Duration| false)?;
    println!("limit of 16 MiB reached: {}", shrink.actual == shrink.target);
    println!("shrunk: {} MiB resident", ram.residency()?.resident_bytes >> 20);
    Ok(())
}
