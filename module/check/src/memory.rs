//! Pressure of each kind, with the module and without.

use crate::child::Other;
use crate::log::lockdep_is_on;
use crate::row::{Outcome, check};
use crate::system::{Group, SmallPages, area_number, areas, available_mib, hog, killed};

pub(crate) fn expect(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

/// Another process wants more than is left; most of what an area has is free.
fn pressure(by: &str, mib: u64, want: u64, group: Option<&Group>) -> Result<(Other, bool), String> {
    let mut tenant = Other::start(mib, "8", by, group)?;
    let had = hog(want, group)?;
    let alive = tenant.is_alive();
    Ok((tenant, had && alive))
}

pub(crate) fn has_it(by: &str, mib: u64, want: u64, group: Option<&Group>) -> Outcome {
    let (mut tenant, had) = pressure(by, mib, want, group)?;
    expect(had, || format!("{want} MiB were unavailable beside {mib}; {}", areas()))?;
    let (evicted, resident) = (tenant.number("evicted")?, tenant.number("resident")?);
    expect(evicted > 0, || "nothing was taken back".to_owned())?;
    tenant.ask(&format!("take {}", mib / 4))?;
    tenant.ask("verify")?;
    let busy = tenant.number("busy")?;
    Ok(format!(
        "{want} MiB beside an area of {mib}: {evicted} frames taken back, {resident} MiB left; {busy} times busy"
    ))
}

fn has_it_not(by: &str, mib: u64, want: u64, group: Option<&Group>) -> Outcome {
    let before = killed();
    let outcome = pressure(by, mib, want, group).map(|(_, had)| had);
    expect(killed() > before, || format!("nobody was killed; had: {outcome:?}"))?;
    Ok(String::new())
}

/// So much of the machine's memory is wanted as an area has, and both together are more than there is.
pub(crate) fn global() -> Outcome {
    let mib = available_mib() * 6 / 10;
    has_it("kernel", mib / 16 * 16, mib, None)
}

/// Kinds of pressure without swap; without the module as well, if `compared`.
pub(crate) fn without_swap(failures: &mut u32, compared: bool) {
    let all = available_mib();
    let (area, want) = (all * 6 / 10 / 16 * 16, all * 6 / 10);
    if compared {
        check(failures, "global pressure without the module: somebody is killed", || {
            has_it_not("nobody", area, want, None)
        });
    }
    check(failures, "global pressure with it: nobody is", global);
    check(failures, "memory.max without the module: somebody is killed", || {
        has_it_not("nobody", 192, 160, Some(&limited()?))
    });
    check(failures, "memory.max with it: nobody is", || has_it("kernel", 192, 160, Some(&limited()?)));
    if compared {
        check(failures, "memory.high without the module: it stays above that", || {
            let (_group, _tenant, left) = lowered("nobody")?;
            expect(left >= 192, || format!("{left} MiB"))?;
            Ok(format!("{left} MiB"))
        });
    }
    check(failures, "memory.high: the next allocations bring it below that", || {
        let (group, mut tenant, _) = lowered("kernel")?;
        expect(hog(16, Some(&group))?, || "killed".to_owned())?;
        tenant.ask("verify")?;
        let (left, high) = (group.mib("memory.current"), group.number("memory.events", "high"));
        expect(left <= 112, || format!("{left} MiB"))?;
        Ok(format!("192 MiB -> {left}, {high} times over the limit, {} frames", tenant.number("evicted")?))
    });
    check(failures, "another cgroup's pressure takes nothing from this one", || {
        let group = Group::new("other", &[("memory.max", 64), ("memory.swap.max", 0)])?;
        let mut tenant = Other::start(192, "8", "kernel", None)?;
        expect(!hog(160, Some(&group))?, || "64 MiB held 160".to_owned())?;
        let evicted = tenant.number("evicted")?;
        expect(evicted == 0, || format!("{evicted} frames"))?;
        Ok(String::new())
    });
    check(failures, "in another cgroup than its own an area looks after itself", moved_to_another_group);
    check(failures, "a tenant that frees nothing is never touched", || {
        let group = limited()?;
        let mut tenant = Other::start(192, "all", "kernel", Some(&group))?;
        expect(!hog(160, Some(&group))?, || "there was room".to_owned())?;
        tenant.ask("verify")?;
        let (evicted, resident) = (tenant.number("evicted")?, tenant.number("resident")?);
        expect(evicted == 0 && resident >= 192, || format!("{evicted} frames, {resident} MiB resident"))?;
        Ok(String::new())
    });
    check(failures, "what others free meanwhile is found: free under pressure", || {
        let group = limited()?;
        let mut tenant = Other::start(192, "all", "kernel", Some(&group))?;
        tenant.ask("free 8")?;
        expect(hog(160, Some(&group))?, || format!("killed; {}", areas()))?;
        tenant.ask("verify")?;
        Ok(format!("{} frames", tenant.number("evicted")?))
    });
    check(failures, "the same behind another area that is all in use", behind_another);
    check(failures, "two want at once what goes slowly: nobody is killed", slowly);
    check(failures, "the same while the process asks for it: nobody is killed", asked_slowly);
}

/// A cgroup whose `memory.high` is lowered to half of what an area has there, and what it has then.
fn lowered(by: &str) -> Result<(Group, Other, u64), String> {
    let group = Group::new("high", &[("memory.high", 1024), ("memory.swap.max", 0)])?;
    let tenant = Other::start(192, "8", by, Some(&group))?;
    group.write("memory.high", "100663296")?;
    let left = group.mib("memory.current");
    Ok((group, tenant, left))
}

/// So that a cgroup at its limit finds what one of two areas has freed a moment ago.
pub(crate) fn behind_another() -> Outcome {
    let group = limited()?;
    let mut full = Other::start(64, "all", "kernel", Some(&group))?;
    let mut tenant = Other::start(128, "all", "kernel", Some(&group))?;
    for round in 1..=3 {
        tenant.ask("free 8")?;
        expect(hog(140, Some(&group))?, || {
            let (file, slab) = (group.number("memory.stat", "shmem"), group.number("memory.stat", "slab"));
            format!("killed in round {round}; shmem {file}, slab {slab}; {}", areas())
        })?;
        tenant.ask("verify")?;
        tenant.ask("take 56")?;
    }
    full.ask("verify")?;
    let (of_full, evicted) = (full.number("evicted")?, tenant.number("evicted")?);
    expect(of_full == 0, || format!("{of_full} frames of the full one"))?;
    let busy = (full.number("busy")?, tenant.number("busy")?);
    Ok(format!("{evicted} frames; {} and {} times busy", busy.0, busy.1))
}

/// Memory in small pages that its process has mapped elsewhere as well goes slowly, and two want it at once: who waits for the
/// other is not killed.
pub(crate) fn slowly() -> Outcome {
    let group = limited()?;
    let mut tenant = goes_slowly(&group)?;
    let start = || Other::start(2, "all", "nobody", Some(&group));
    let (mut one, mut other) = (start()?, start()?);
    // Below the limit, with the page tables of all those mappings; both come to it next.
    one.ask("grow 30")?;
    other.ask("grow 30")?;
    let both = std::thread::scope(|scope| {
        let other = scope.spawn(|| other.ask("grow 65"));
        let one = one.ask("grow 65");
        Ok::<_, String>((one, other.join().map_err(|_| "panicked")?))
    })?;
    expect(both.0.is_ok() && both.1.is_ok(), || format!("had: {both:?}; {}", areas()))?;
    tenant.ask("verify")?;
    let (evicted, busy) = (tenant.number("evicted")?, tenant.number("busy")?);
    expect(evicted > 0, || "nothing was taken back".to_owned())?;
    Ok(format!("{evicted} frames; {busy} times busy"))
}

/// One wants it while the process itself has it taken: by the device, which is reclaim as any other.
pub(crate) fn asked_slowly() -> Outcome {
    let group = limited()?;
    let mut tenant = goes_slowly(&group)?;
    let mut other = Other::start(2, "all", "nobody", Some(&group))?;
    other.ask("grow 60")?;
    let pid = tenant.pid();
    let (taken, had) = std::thread::scope(|scope| {
        let asked = scope.spawn(|| tenant.number("reclaim 1024"));
        // In the middle of it: after the first batch there are others.
        while area_number(pid, "freed_pages") == 0 && !asked.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let had = other.ask("grow 130");
        Ok::<_, String>((asked.join().map_err(|_| "panicked")??, had))
    })?;
    expect(taken > 0, || "nothing was taken when asked".to_owned())?;
    expect(had.is_ok(), || format!("{had:?}; {taken} frames when asked; {}", areas()))?;
    tenant.ask("verify")?;
    let busy = tenant.number("busy")?;
    Ok(format!("{taken} frames when asked; {busy} times busy"))
}

/// An area in small pages, 7/8 of it free, of which each page is mapped at many places.
fn goes_slowly(group: &Group) -> Result<Other, String> {
    let small = SmallPages::new()?;
    let mut tenant = Other::start(128, "8", "kernel", Some(group))?;
    drop(small);
    tenant.ask(&format!("map {}", mappings()))?;
    Ok(tenant)
}

/// As many more mappings as have a kernel in an emulated machine unmap a batch for more than 0.1 s, and less than the second for
/// which a scan is waited for at all. One that checks itself needs none.
fn mappings() -> u32 {
    if lockdep_is_on().is_some() { 0 } else { 100 }
}

/// What is without swap.
pub(crate) fn limited() -> Result<Group, String> {
    Group::new("max", &[("memory.max", 256), ("memory.swap.max", 0)])
}

/// What the kernel takes by the charges of a cgroup is out of its reach once the process is in another one.
fn moved_to_another_group() -> Outcome {
    let (first, second) = (Group::new("first", &[])?, Group::new("second", &[])?);
    let mut tenant = Other::start(128, "8", "kernel", Some(&first))?;
    let wait = || std::thread::sleep(std::time::Duration::from_secs(6));
    wait();
    let before = tenant.number("evicted")?;
    second.write("cgroup.procs", &tenant.pid().to_string())?;
    let mut after = before;
    for _ in 0..5 {
        wait();
        after = tenant.number("evicted")?;
        if after == 56 {
            break;
        }
    }
    tenant.ask("verify")?;
    expect(before == 0 && after == 56, || format!("{before} frames, then {after} of 56"))?;
    Ok(String::new())
}

/// With swap there is something else to take: what is free goes, and what is in use comes back whole.
pub(crate) fn with_swap(failures: &mut u32) {
    check(failures, "swap on: what is in use is whole, less of it is swapped", || {
        let run = |by: &str| {
            let group = Group::new("swap", &[("memory.max", 256)])?;
            let mut tenant = Other::start(192, "2", by, Some(&group))?;
            expect(hog(180, Some(&group))?, || format!("{by}: killed"))?;
            let out = group.number("memory.stat", "pswpout").max(group.mib("memory.swap.peak"));
            let swap = group.mib("memory.swap.current");
            tenant.ask("verify")?;
            Ok::<_, String>((swap, out, tenant.number("evicted")?))
        };
        let (without, with) = (run("nobody")?, run("kernel")?);
        expect(with.2 > 0, || "nothing was taken back".to_owned())?;
        expect(with.0 <= without.0, || format!("{} MiB in swap, without {}", with.0, without.0))?;
        Ok(format!("in swap: {} MiB with, {} without; {} frames taken back", with.0, without.0, with.2))
    });
    check(failures, "swap of frames that are free is let go", || {
        let group = Group::new("swapped", &[("memory.max", 512)])?;
        let mut tenant = Other::start(128, "all", "kernel", Some(&group))?;
        // All of it is in use, and goes to swap.
        drop(group.write("memory.reclaim", "120M"));
        let before = group.mib("memory.swap.current");
        expect(before > 8, || format!("only {before} MiB in swap"))?;
        tenant.ask("free 8")?;
        for _ in 0..10 {
            tenant.ask("reclaim 1024")?;
            std::thread::sleep(std::time::Duration::from_millis(1200));
        }
        let (after, swapped) = (group.mib("memory.swap.current"), tenant.number("swapped")?);
        tenant.ask("verify")?;
        expect(after < before && swapped > 0, || format!("{before} -> {after} MiB in swap, {swapped} frames"))?;
        Ok(format!("{before} -> {after} MiB in swap, {swapped} frames"))
    });
}

/// Node 0 has the area, node 1 the pressure, and the other way round. `numactl`'s calls, by hand.
pub(crate) fn numa(failures: &mut u32) {
    let policy = |mode: i32, mask: u64| {
        // SAFETY: a mask of 64 bits, which the kernel copies.
        let done = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &raw const mask, 64) };
        expect(done == 0, || std::io::Error::last_os_error().to_string())
    };
    let bind = |node: u64| policy(libc::MPOL_BIND, 1 << node);
    let free = |node: u64| {
        let text = std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/meminfo"));
        let text = text.unwrap_or_default();
        let line = text.lines().find(|line| line.contains("MemFree:")).unwrap_or_default().to_owned();
        line.split_whitespace().nth(3).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024
    };
    let case = |of_area: u64, of_hog: u64| {
        bind(of_area)?;
        let mib = free(of_area) * 6 / 10 / 16 * 16;
        let mut tenant = Other::start(mib, "8", "kernel", None)?;
        bind(of_hog)?;
        let want = if of_area == of_hog { free(of_hog) + mib / 2 } else { free(of_hog) * 8 / 10 };
        let had = hog(want, None)?;
        tenant.ask("verify")?;
        Ok::<_, String>((had, tenant.number("evicted")?, mib, want))
    };
    check(failures, "two nodes: pressure on the area's own is served", || {
        let (had, evicted, mib, want) = case(0, 0)?;
        expect(had && evicted > 0, || format!("had: {had}, {evicted} frames of {mib} MiB, {want} MiB wanted"))?;
        Ok(format!("{evicted} of {} frames", mib / 2))
    });
    check(failures, "two nodes: pressure on the other one takes nothing", || {
        let (had, evicted, mib, want) = case(0, 1)?;
        expect(had && evicted == 0, || format!("had: {had}, {evicted} frames of {mib} MiB, {want} MiB wanted"))?;
        Ok(String::new())
    });
    check(failures, "two nodes: an area on the second one is served there", || {
        let (had, evicted, mib, want) = case(1, 1)?;
        expect(had && evicted > 0, || format!("had: {had}, {evicted} frames of {mib} MiB, {want} MiB wanted"))?;
        Ok(format!("{evicted} of {} frames", mib / 2))
    });
    check(failures, "two nodes: an area on both in turns is served on each", || {
        policy(libc::MPOL_INTERLEAVE, 3)?;
        let mib = free(0).min(free(1)) / 16 * 16;
        let mut tenant = Other::start(mib, "8", "kernel", None)?;
        let mut taken = 0;
        for node in 0..2 {
            bind(node)?;
            // Each frame that is free yet has 1 MiB there: a part of that, for how many go at once is up to the kernel.
            let left = (mib / 2 * 7 / 8).saturating_sub(taken);
            expect(left >= 8, || format!("node {node}: only {left} frames are left"))?;
            let want = free(node) + left / 4;
            let had = hog(want, None)?;
            tenant.ask("verify")?;
            let evicted = tenant.number("evicted")?;
            expect(had && evicted > taken, || {
                format!("node {node}: had {want}: {had}, {taken} -> {evicted} frames of {mib} MiB; {}", areas())
            })?;
            taken = evicted;
        }
        Ok(format!("{taken} of {} frames", mib / 2))
    });
}
