//! Headroom: what of an area's free memory stays under pressure, and that it goes before anybody is killed.

use crate::child::Other;
use crate::many;
use crate::memory::{expect, has_it, limited};
use crate::row::{Outcome, check};
use crate::system::{Group, areas, available_mib, hog, killed, start};

/// Of an area of [`AREA`], all of it free.
const HEADROOM: u64 = 48;
const AREA: u64 = 128;
/// An area of which all is free, and headroom.
const ALL: u64 = 96;
const SYSRQ: &str = "/proc/sysrq-trigger";
/// What others have of a group of 256 MiB beside the area, before they want more.
const BESIDE: u64 = 128;

pub(crate) fn checks(failures: &mut u32, disk: &str, all: bool) {
    check(failures, "headroom stays while there is something else to take", stays);
    check(failures, "it goes before anybody is killed: memory.max", || {
        has_it("kernel+192", 192, 160, Some(&limited()?))
    });
    check(failures, "it goes for what may not wait for a file system: memory.max", || for_notes_of_writes(disk));
    if std::path::Path::new(SYSRQ).exists() {
        check(failures, "it goes before the machine is out of memory", at_the_last_moment);
    }
    check(failures, "it stays while there is page cache, round after round", || beside_reads(disk));
    if all {
        let all = available_mib();
        check(failures, "it goes before anybody is killed: global pressure", || {
            let mib = all * 6 / 10 / 16 * 16;
            has_it(&format!("kernel+{mib}"), mib, all * 6 / 10, None)
        });
        check(failures, "it goes from 100 areas before anybody is killed", many::yield_in_need);
    }
}

/// An area of which all is free and some is headroom, as it says itself.
fn keeping(group: &Group) -> Result<Other, String> {
    let mut tenant = Other::start(AREA, "0", &format!("kernel+{HEADROOM}"), Some(group))?;
    let headroom = tenant.number("headroom")?;
    expect(headroom == HEADROOM / 2, || format!("{headroom} frames of headroom"))?;
    Ok(tenant)
}

/// Of what is left of an area, the headroom or more is free and resident, and nothing was taken of it.
fn is_whole(tenant: &mut Other) -> Outcome {
    let (evicted, yielded) = (tenant.number("evicted")?, tenant.number("yielded")?);
    let resident = tenant.number("resident")?;
    expect(evicted > 0, || "nothing was taken back".to_owned())?;
    expect(yielded == 0 && resident >= HEADROOM, || {
        format!("{resident} MiB left of {HEADROOM} of headroom, {yielded} frames yielded; {}", areas())
    })?;
    Ok(format!("{evicted} frames taken back, {resident} MiB left"))
}

/// Half of it goes, and of the rest half, or a batch: without headroom not as much would be left as this is. What others want
/// beyond that is had, too.
fn stays() -> Outcome {
    let group = limited()?;
    let mut tenant = keeping(&group)?;
    expect(hog(BESIDE + 70, Some(&group))?, || format!("killed; {}", areas()))?;
    let said = is_whole(&mut tenant)?;
    expect(hog(BESIDE + 110, Some(&group))?, || format!("killed for headroom; {}", areas()))?;
    let yielded = tenant.number("yielded")?;
    expect(yielded > 0, || format!("none yielded; {}", areas()))?;
    Ok(format!("{said}; then {yielded} frames of it went"))
}

/// What was read of a disk goes without harm. Once nothing but headroom is left of the area there is enough of that for all.
fn beside_reads(disk: &str) -> Outcome {
    let group = limited()?;
    let mut tenant = keeping(&group)?;
    expect(hog(BESIDE + 70, Some(&group))?, || format!("killed; {}", areas()))?;
    for round in 1..=3 {
        // Reads alone ask no shrinker that may wait: they are in the way of the file system.
        let reader = start(&["read", disk, "400"], Some(&group))?.wait_with_output();
        let read = reader.map_err(|error| error.to_string())?.status;
        expect(read.success(), || format!("the reads: {read}"))?;
        expect(hog(BESIDE + 42, Some(&group))?, || format!("killed in round {round}; {}", areas()))?;
    }
    is_whole(&mut tenant)
}

/// A cgroup has somebody killed also for want of what is allocated without `__GFP_FS`, as the kernel's notes of each page that a
/// process writes to a device. Nothing else is allocated at the limit.
fn for_notes_of_writes(disk: &str) -> Outcome {
    let group = Group::new("max", &[("memory.max", 512), ("memory.swap.max", 0)])?;
    let mut tenant = Other::start(ALL, "0", &format!("kernel+{ALL}"), Some(&group))?;
    let done = start(&["dirty", disk, "320", &group.path()], Some(&group))?.wait_with_output();
    let status = done.map_err(|error| error.to_string())?.status;
    expect(status.success(), || format!("who writes: {status}; {}", areas()))?;
    let yielded = tenant.number("yielded")?;
    expect(yielded > 0, || "nobody was short of memory".to_owned())?;
    Ok(format!("{yielded} frames of it went"))
}

/// The machine is out of memory, for a person says so, which has somebody killed whatever comes of it. From then on the first count
/// finds headroom: the kernel drops its caches by one, with the urgency of the last.
fn at_the_last_moment() -> Outcome {
    let drop_caches = || std::fs::write("/proc/sys/vm/drop_caches", "2").map_err(|error| error.to_string());
    // So that there is little to drop, for as long as there is a good deal it is asked for again and again.
    drop_caches()?;
    drop_caches()?;
    let mut tenant = Other::start(ALL, "0", &format!("kernel+{ALL}"), None)?;
    let mut other = Other::start(2, "all", "nobody", None)?;
    other.ask("grow 16")?;
    drop_caches()?;
    let yielded = tenant.number("yielded")?;
    expect(yielded == 0, || format!("{yielded} frames yielded before; {}", areas()))?;
    let before = killed();
    std::fs::write(SYSRQ, "f").map_err(|error| error.to_string())?;
    for _ in 0..1000 {
        if killed() > before {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    drop_caches()?;
    expect(killed() > before, || "nobody was killed".to_owned())?;
    tenant.ask("verify")?;
    let yielded = tenant.number("yielded")?;
    expect(yielded > 0, || format!("none yielded; {}", areas()))?;
    Ok(format!("{yielded} frames of it went"))
}
