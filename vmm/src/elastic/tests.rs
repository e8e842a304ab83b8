//! Kinds by name, which combinations are accepted, and a driver that stays idle.

use super::*;
use crate::boot::Platform;
use llfree_base::choices::Switch;
use llfree_base::units::Bytes;
use llfree_monitor::Monitor;
use llfree_monitor::memory::{AddressMap, Backing, GuestRam};
use std::sync::Arc;
use std::time::Duration;

use llfree_base::thread::Spawner;
use llfree_monitor::memory::{PoolConfig, Supply, UseUserfaultfd};
use llfree_monitor::{Direction, Region, TenantStart};
use shared_layout::TableLayout;
use std::sync::atomic::{AtomicU32, Ordering};
use virtio_bindings::virtio_mmio as reg;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A device over 64 MiB, the first half below the hole of a PC, and how often it interrupted.
fn device(text: &str) -> Result<(Arc<dyn Elasticity>, Arc<AtomicU32>), DeviceError> {
    let map = AddressMap::with_hole(64 * MIB, 32 * MIB);
    let ram = Arc::new(GuestRam::with_map(64 * MIB, Backing::Anon, map).expect("small"));
    let interrupts = Arc::new(AtomicU32::new(0));
    let count = interrupts.clone();
    let notice = Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let elastic: Elastic = text.parse().expect(text);
    elastic.way().check(&Shape { backing: Backing::Anon, map: &map, image: &(0..1) })?;
    let monitor = Arc::new(monitor(&ram));
    let words = Arc::new(Platform::above(map.end(), 64 * MIB, 1, 40).expect("small"));
    let (nudge, drain) = (Box::new(|| {}), Box::new(|| {}));
    let parts = Parts { ram: &ram, monitor: &monitor, notifier: notice, nudge, words, drain };
    Ok((elastic.way().build(parts)?, interrupts))
}

fn monitor(ram: &Arc<GuestRam>) -> Monitor {
    let off = UseUserfaultfd::Off;
    let supply = Supply::new(ram.clone(), PoolConfig::default(), off, &Spawner::default()).expect("nothing to fail");
    let layout = TableLayout::new(ram.huge_frames()).expect("small");
    let region = Arc::new(Region::anonymous(layout.total as usize).expect("room"));
    let table = llfree_monitor::Table::new(region, layout).expect("it fits");
    Monitor::untracked(ram.clone(), supply, table, TenantStart::default(), 0..0).expect("no image")
}

#[test]
fn a_region_with_the_hole_in_it_is_refused() {
    let Err(error) = device("virtio-mem,boot=16M") else { panic!("refused") };
    assert!(error.to_string().contains("boot part of 16 MiB"), "{error}");
    assert!(device("virtio-mem,boot=32M").is_ok() && device("virtio-mem,boot=48M").is_ok());
}

#[test]
fn a_driver_that_rests_is_told_again_while_somebody_waits() {
    let (device, interrupts) = device("virtio-mem,boot=32M").expect("it fits");
    let transport = device.transport().expect("a device");
    let write = |register: u32, value: u32| transport.write(register.into(), &value.to_le_bytes());
    [0, 1, 3].into_iter().for_each(|status| write(reg::VIRTIO_MMIO_STATUS, status));
    write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    [11, 15].into_iter().for_each(|status| write(reg::VIRTIO_MMIO_STATUS, status));
    assert!(transport.is_driven());
    // All is requested and nothing is plugged: it waits for the driver, which does nothing.
    let told = || interrupts.load(Ordering::Relaxed);
    device.resize(Direction::Shrink, 64 * MIB, &|_| told() < 2).expect("a target above the boot part");
    assert_eq!((told(), device.limit()), (2, 32 * MIB));
}

#[test]
fn kinds_and_options_are_read_as_people_write_them() {
    for kind in ["llfree", "balloon", "balloon-huge", "virtio-mem", "none"] {
        assert_eq!(kind.parse::<Elastic>().expect(kind).name(), kind);
    }
    let text = "balloon,reporting=on,deflate-on-oom=on,coalesce=off,stats=500ms";
    let Ok(Elastic::Balloon(config)) = text.parse() else { panic!("{text}") };
    assert!(config.reporting == Some(true) && config.deflate_on_oom && !config.coalesce && !config.huge);
    assert_eq!(config.stats, Some(Duration::from_millis(500)));
    let table = |grow_on_need, starts_installed| Ok(Elastic::Table(table::Table { grow_on_need, starts_installed }));
    assert_eq!("llfree,grow-on-need=on".parse(), table(true, false));
    assert_eq!("llfree,start=installed".parse(), table(false, true));
    assert_eq!("llfree,start=evicted,grow-on-need=on".parse(), table(true, false));
    assert_eq!("virtio-mem,boot=64M".parse(), Ok(Elastic::Mem(MemConfig { boot: Bytes(64 << 20) })));
}

#[test]
fn what_cannot_be_is_refused_with_what_can() {
    let text = |text: &str| text.parse::<Elastic>().expect_err(text).to_string();
    assert!(text("ballon").contains("use llfree, balloon"));
    assert!(text("llfree,boot=1G").contains("not an option of llfree, which has grow-on-need=on|off and start="));
    assert!(text("llfree,start=full").contains("'full' is neither evicted"), "{}", text("llfree,start=full"));
    assert!(text("balloon,start=installed").contains("not an option of balloon"));
    assert!(text("balloon,reporting=yes").contains("neither on nor off"));
    assert!(text("balloon,stats=1us").contains("10ms"), "{}", text("balloon,stats=1us"));
    assert!(text("virtio-mem,boot=3K").contains("boot"), "{}", text("virtio-mem,boot=3K"));
    assert!(text("").contains("unknown kind"));
}

fn elastic(text: &str) -> Elastic {
    text.parse().expect(text)
}

/// What a launch of Linux checks about a kind.
fn linux(elastic: Elastic, memory: Bytes) -> Result<(), DeviceError> {
    check_offers(elastic.way(), &crate::guest::LINUX.offers).and_then(|()| elastic.way().check_linux(memory))
}

fn on() -> Switch {
    "on".parse().expect("a switch")
}

#[test]
fn the_default_for_linux_is_what_people_would_write() {
    let Elastic::Either(ways) = Elastic::for_linux() else { panic!("both are offered") };
    assert_eq!(Elastic::Table(ways.table), elastic("llfree"));
    assert_eq!(Elastic::Balloon(ways.balloon), elastic("balloon,reporting=on,deflate-on-oom=on,stats=2s"));
    assert!(linux(Elastic::for_linux(), Bytes(GIB)).is_ok());
    assert_eq!(Elastic::for_linux().way().kernel_parameter(), None);
    assert_eq!(elastic("virtio-mem").way().kernel_parameter(), Some("memhp_default_state=online_movable"));
}

#[test]
fn what_linux_cannot_do_is_refused_with_what_it_can() {
    let refusal =
        |text: &str, bytes: u64| linux(elastic(text), Bytes(bytes)).map_err(|error| error.to_string()).expect_err(text);
    let text = refusal("balloon-huge", GIB);
    assert!(text.contains("Linux") && text.contains("llfree, balloon, virtio-mem or none"), "{text}");
    let text = refusal("virtio-mem,boot=4G", 8 * GIB);
    assert!(text.contains("4 GiB") && text.contains("at most 3 GiB"), "{text}");
    let text = refusal("virtio-mem,boot=64M", GIB);
    assert!(text.contains("64 MiB") && text.contains("boot=144M or more"), "{text}");
    let text = refusal("virtio-mem,boot=256M", 64 * GIB);
    assert!(text.contains("boot=1148M or more"), "{text}");
    let text = refusal("virtio-mem,boot=1G", GIB);
    assert!(text.contains("boot="), "{text}");
    let text = refusal("virtio-mem,boot=960M", GIB);
    assert!(text.contains("64 MiB") && text.contains("128 MiB"), "{text}");
    for (fine, bytes) in [("virtio-mem", GIB), ("virtio-mem,boot=3G", 8 * GIB), ("none", GIB), ("balloon", GIB)] {
        assert!(linux(elastic(fine), Bytes(bytes)).is_ok(), "{fine}");
    }
}

#[test]
fn what_is_no_whole_block_linux_cannot_use() {
    let mem = elastic("virtio-mem,boot=256M");
    assert_eq!(mem.way().unusable_by_linux(Bytes(GIB)), Bytes(0));
    assert_eq!(mem.way().unusable_by_linux(Bytes(GIB + 100 * MIB)), Bytes(100 * MIB));
    assert_eq!(elastic("balloon").way().unusable_by_linux(Bytes(GIB + 2 * MIB)), Bytes(0));
}

#[test]
fn automatic_reclaim_of_a_balloon_is_reporting() {
    assert_eq!(Elastic::LLFREE.with_auto_reclaim(on()), Ok((Elastic::LLFREE, on())));
    for text in ["balloon", "balloon,reporting=on", "balloon-huge,stats=1s"] {
        let (Elastic::Balloon(config), switch) = elastic(text).with_auto_reclaim(on()).expect(text) else {
            panic!("{text} stays what it is")
        };
        assert_eq!((config.reporting, switch), (Some(true), Switch(None)), "{text}");
    }
    // Off changes nothing, not even reporting that was asked for.
    for text in ["balloon", "balloon,reporting=on", "balloon,reporting=off", "virtio-mem", "none"] {
        assert_eq!(elastic(text).with_auto_reclaim(Switch(None)), Ok((elastic(text), Switch(None))));
    }
}

#[test]
fn automatic_reclaim_that_cannot_be_is_refused() {
    let refusal = |text: &str, switch: &str| {
        let switch = switch.parse().expect(switch);
        elastic(text).with_auto_reclaim(switch).map_err(|error| error.to_string()).expect_err(text)
    };
    // Nobody knows yet who is to heed the settings: the table does, and a balloon's guest reports in any case.
    let settings: Switch = "interval=1s".parse().expect("settings");
    assert_eq!(Elastic::for_linux().with_auto_reclaim(settings), Ok((Elastic::for_linux(), settings)));
    assert!(refusal("balloon,reporting=off", "on").contains("reporting=off"));
    assert!(refusal("balloon", "interval=1s").contains("has no settings"));
    for kind in ["virtio-mem", "none"] {
        assert!(refusal(kind, "on").contains(&format!("impossible with memory of kind {kind}")));
    }
}
