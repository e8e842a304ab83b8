//! A keeper, the processes that register with it, and those that only pretend to.

mod common;
mod hostile;

use common::{LONG, MIB, Over, Place, Player, area, churn, dirty, eventually, is_dirty, part};
use llfree_area::wire::{Registration, read_answer};
use llfree_area::{Area, AreaError, MemoryKind, Order, RegisterError, Switch};
use llfree_base::choices;
use llfree_control::protocol::{Reply, Request, ResizeGoal, ShrinkGoal};
use llfree_keeper::{Keeper, KeeperError, Options, Quota};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recv, sendmsg, socket_with, sockopt,
};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use test_support::skipped;

#[test]
fn a_registered_area_answers_as_a_vm_does() {
    let place = Place::new();
    let _keeper = place.start();
    let area = area(64);
    let registered = area.register(&place.socket(), "web").expect("a keeper");
    assert!(registered.is_connected());
    assert_eq!(place.files(), ["areas", "web.lock", "web.sock"]);
    assert_eq!(place.call("web", &Request::Ping), Reply::Pong { name: "web".into(), pid: std::process::id() });
    assert!(matches!(area.reclaim(1), Err(AreaError::Registered)), "somebody else does that");
    place.call("web", &Request::AutoReclaim { settings: Switch(None) });

    let mut handle = area.handle();
    let (keep, free) = (handle.alloc_run(3).expect("room"), handle.alloc_run(8).expect("room"));
    dirty(&keep, 1);
    dirty(&free, 2);
    handle.free(free).expect("ours");
    let status = place.status("web");
    assert_eq!((status.memory_bytes, status.limit_bytes, status.resident_bytes), (64 * MIB, 64 * MIB, 22 * MIB));
    assert_eq!((status.guest_used_bytes, status.reclaimable_now_bytes), (Some(6 * MIB), Some(16 * MIB)));
    assert_eq!(status.backing.known(), Some(choices::Backing::Memfd));

    let Reply::Reclaim(report) = place.call("web", &Request::Reclaim { bytes: Some(4 * MIB) }) else {
        panic!("refused")
    };
    assert_eq!(report.huge_frames, 2);
    let goal = ShrinkGoal::ToBytes(16 * MIB);
    let Reply::Resize(report) = place.call("web", &Request::Shrink { goal, wait_ms: 0 }) else { panic!("refused") };
    assert!(report.complete && report.actual_bytes == 16 * MIB, "{report:?}");
    assert_eq!(place.status("web").resident_bytes, 6 * MIB);
    let rest: Vec<_> = (0..5).map(|_| handle.alloc(Order::HUGE).expect("just as much")).collect();
    handle.alloc(Order::HUGE).expect_err("the limit");
    let Reply::Resize(report) = place.call("web", &Request::Shrink { goal: ShrinkGoal::ToBytes(2 * MIB), wait_ms: 0 })
    else {
        panic!("refused")
    };
    assert!(!report.complete && report.shortfall.is_some());
    let Reply::Resize(report) = place.call("web", &Request::Grow { to_bytes: 64 * MIB }) else { panic!("refused") };
    assert!(report.complete);
    let more = handle.alloc(Order::HUGE).expect("it is lifted");
    handle.free(more).expect("ours");
    let Reply::Validate(report) = place.call("web", &Request::Validate) else { panic!("refused") };
    assert!(report.clean, "{report:?}");
    assert!(is_dirty(&keep, 1));
    rest.into_iter().for_each(|block| handle.free(block).expect("ours"));

    for request in [Request::Stop, Request::Pause, Request::Console] {
        place.client("web").call(&request).expect_err("it is no VM");
    }
    for goal in [ResizeGoal::ToBytes(MIB), ResizeGoal::ToBytes(66 * MIB), ResizeGoal::DownByBytes(65 * MIB)] {
        let request = Request::Resize { goal, wait_ms: 0, once: false };
        place.client("web").call(&request).expect_err("no such limit");
    }
    drop(registered);
    assert_eq!(place.files(), ["areas"]);
    area.reclaim(u64::MAX).expect("it is ours again");
    assert!(area.validate().expect("known").findings.is_empty() && is_dirty(&keep, 1));
}

/// What a process held before it registered, and the keeper gave back, may be in use when the process is alone again.
#[test]
fn what_a_keeper_gave_back_is_not_taken_when_it_leaves() {
    let place = Place::new();
    let _keeper = place.start();
    let area = area(64);
    area.shrink_to(16 * MIB).expect("nothing is used");
    let registered = area.register(&place.socket(), "web").expect("a keeper");
    let Reply::Resize(report) = place.call("web", &Request::Grow { to_bytes: 64 * MIB }) else { panic!("refused") };
    assert!(report.complete, "{report:?}");
    let mut handle = area.handle();
    let block = handle.alloc_run(30).expect("the limit is lifted");
    dirty(&block, 1);
    drop(registered);
    assert!(is_dirty(&block, 1), "it was in use");
    assert!(area.validate().expect("known").findings.is_empty());
}

#[test]
fn free_memory_of_a_process_goes_back_without_it() {
    let place = Place::new();
    let _keeper = place.start();
    let area = area(128);
    let _registered = area.register(&place.socket(), "idle").expect("a keeper");
    let mut handle = area.handle();
    let block = handle.alloc_run(60).expect("room");
    dirty(&block, 1);
    handle.free(block).expect("ours");
    assert!(place.status("idle").resident_bytes >= 120 * MIB);
    eventually("all but what stays", || place.status("idle").resident_bytes <= 32 * MIB);
}

#[test]
fn only_memory_files_and_decent_names_are_registered_and_only_once() {
    let place = Place::new();
    let socket = place.socket();
    let first = area(4);
    assert!(matches!(first.register(&socket, "a"), Err(RegisterError::Unreachable { .. })), "nobody is there");
    first.reclaim(1).expect("it is still ours");
    let _keeper = place.start();
    let private = Area::builder().size(4 * MIB).memory(MemoryKind::Private).build().expect("memory");
    assert!(matches!(private.register(&socket, "a"), Err(RegisterError::NotShared)));
    assert!(matches!(first.register(&socket, "../a"), Err(RegisterError::Name(_))));
    let registered = first.register(&socket, "a").expect("a keeper");
    assert!(matches!(first.register(&socket, "b"), Err(RegisterError::Area(AreaError::Registered))));
    let second = area(4);
    let Err(RegisterError::Refused(text)) = second.register(&socket, "a") else { panic!("two of one name") };
    assert!(text.contains("name"), "{text}");
    second.reclaim(1).expect("it is still ours");
    drop(registered);
    drop(second.register(&socket, "a").expect("the name is free"));
    let Err(KeeperError::InUse(_)) = Keeper::start(place.options()) else { panic!("two keepers") };
    std::fs::write(place.path().join("file"), "x").expect("a file");
    let other = Options { socket: place.path().join("file"), ..place.options() };
    assert!(matches!(Keeper::start(other), Err(KeeperError::NotASocket(_))));
}

#[test]
fn quotas_hold() {
    let place = Place::new();
    let quota = Quota { areas: 2, areas_a_process: 8, bytes: 64 * MIB };
    let _keeper = Keeper::start(Options { quota, ..place.options() }).expect("a free place");
    let areas = [area(48), area(32), area(16), area(2)];
    let _first = areas[0].register(&place.socket(), "a").expect("room");
    let Err(RegisterError::Refused(text)) = areas[1].register(&place.socket(), "b") else { panic!("too much") };
    assert!(text.contains("67108864 bytes"), "{text}");
    let second = areas[2].register(&place.socket(), "b").expect("just as much");
    let Err(RegisterError::Refused(text)) = areas[3].register(&place.socket(), "c") else { panic!("too many") };
    assert!(text.contains("2 areas"), "{text}");
    drop(second);
    eventually("a place comes free", || areas[3].register(&place.socket(), "c").is_ok());
}

/// 2 MiB in huge pages, none of them there; `None` where the kernel has no such files.
fn huge_file(seals: SealFlags) -> Option<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = rustix::fs::memfd_create("huge", flags).ok()?;
    rustix::fs::ftruncate(&file, 2 << 20).ok()?;
    rustix::fs::fcntl_add_seals(&file, seals).expect("it can be sealed");
    Some(file)
}

/// Sends bytes and descriptors, and hangs up or waits for the answer.
pub(crate) fn offer(socket: &Path, bytes: &[u8], files: &[BorrowedFd<'_>]) -> Option<Result<(), String>> {
    let connection =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket");
    sockopt::set_socket_timeout(&connection, sockopt::Timeout::Recv, Some(LONG)).expect("a socket");
    connect(&connection, &SocketAddrUnix::new(socket).expect("short")).expect("a keeper");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(files)));
    }
    // One that is refused before it was heard finds that out here, and is told below.
    let _ = sendmsg(&connection, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    let mut answer = [0; 300];
    let mut hear = || recv(&connection, &mut answer, RecvFlags::empty());
    let (received, _) = hear().or_else(|_| hear()).ok()?;
    read_answer(&answer[..received])
}

fn file(bytes: u64, seals: SealFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a file");
    rustix::fs::ftruncate(&file, bytes).expect("room");
    rustix::fs::fcntl_add_seals(&file, seals).expect("it is ours");
    file
}

#[test]
fn lies_and_rubbish_are_refused_in_words_and_leave_nothing_behind() {
    let place = Place::new();
    let _keeper = place.start();
    let honest = area(64);
    // SAFETY: nobody has references to its memory.
    let shared = unsafe { honest.shared() }.expect("a memory file");
    let words = |huge_frames, name: &str| Registration { huge_frames, name: name.into() }.to_bytes().expect("a name");
    let good = words(32, "liar");
    let both = SealFlags::SHRINK | SealFlags::GROW;
    let table_bytes = rustix::fs::fstat(shared.table).expect("open").st_size as u64;
    let (loose, small, sealed) =
        (file(table_bytes, SealFlags::SHRINK), file(8192, both), file(table_bytes, both | SealFlags::WRITE));
    // Sealed as a table is to be, and of huge pages, of which there may be none when it is touched.
    let huge = huge_file(both);
    let (pipe, _other_end) = std::io::pipe().expect("a pipe");
    let null = std::fs::File::open("/dev/null").expect("it is everywhere");
    let descriptors_before = std::fs::read_dir("/proc/self/fd").expect("/proc").count();
    let (memory, table) = (shared.memory, shared.table);
    let attempts: &[(&[u8], &[BorrowedFd<'_>], &str)] = &[
        (&good, &[], "two descriptors"),
        (&good, &[memory], "two descriptors"),
        (&good, &[memory, table, memory], "two descriptors"),
        (&good, &[memory, table, memory, table, memory, table], "two descriptors"),
        (&good[..40], &[memory, table], "no registration"),
        (b"x", &[memory, table], "no registration"),
        (&[0xff; 80], &[memory, table], "no registration"),
        (&[0; 500], &[memory, table], "no registration"),
        (&good, &[table, memory], "table's file"),
        (&good, &[pipe.as_fd(), table], "memory file"),
        (&good, &[memory, pipe.as_fd()], "no memory file"),
        (&good, &[null.as_fd(), null.as_fd()], "no memory file"),
        (&good, &[memory, loose.as_fd()], "not sealed"),
        (&good, &[memory, small.as_fd()], "size"),
        (&good, &[memory, sealed.as_fd()], "table's file"),
        (&good, &[small.as_fd(), table], "memory file"),
        (&words(0, "liar"), &[memory, table], "0 huge frames"),
        (&words(31, "liar"), &[memory, table], "memory file"),
        (&words(33, "liar"), &[memory, table], "memory file"),
        (&words(3200, "liar"), &[memory, table], "size"),
        (&words(u32::MAX, "liar"), &[memory, table], ""),
    ];
    let of_huge_pages = huge.as_ref().map(|huge| [memory, huge.as_fd()]);
    let of_huge_pages = of_huge_pages.iter().map(|files| (&good[..], &files[..], "does not lie in tmpfs"));
    if huge.is_none() {
        skipped("there are no files of huge pages");
    }
    for (bytes, files, why) in attempts.iter().copied().chain(of_huge_pages) {
        let answer = offer(&place.socket(), bytes, files);
        let Some(Err(text)) = answer else { panic!("{why}: {answer:?}") };
        assert!(text.contains(why), "{text}, not {why}");
    }
    // One that connects and says nothing, and one that hangs up.
    let silent = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket");
    connect(&silent, &SocketAddrUnix::new(place.socket()).expect("short")).expect("a keeper");
    let registered = honest.register(&place.socket(), "honest").expect("nobody is held up");
    assert!(matches!(place.call("honest", &Request::Ping), Reply::Pong { .. }));
    // The same area once more, while it is registered.
    let Some(Err(text)) = offer(&place.socket(), &words(32, "twin"), &[memory, table]) else { panic!("two keepers") };
    assert!(text.contains("registered already"), "{text}");
    drop((registered, silent));
    assert_eq!(place.files(), ["areas"]);
    eventually("all descriptors are closed", || {
        std::fs::read_dir("/proc/self/fd").expect("/proc").count() <= descriptors_before + 1
    });
}

#[test]
fn a_tenant_that_scribbles_harms_nobody_but_itself() {
    let place = Place::new();
    let _keeper = place.start();
    let (hostile, honest) = (area(64), area(64));
    let _hostile = hostile.register(&place.socket(), "hostile").expect("a keeper");
    let _honest = honest.register(&place.socket(), "honest").expect("a keeper");
    let over = AtomicBool::new(false);
    let seconds = std::env::var("LLFREE_SCRIBBLE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    std::thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| {
            // A table of its own to write to, as a process has it.
            // SAFETY: nobody has references to its memory.
            let shared = unsafe { hostile.shared() }.expect("a memory file");
            let bytes = rustix::fs::fstat(shared.table).expect("open").st_size as usize;
            let mut random = fastrand::Rng::with_seed(4);
            while !over.load(Ordering::Relaxed) {
                let mut junk = vec![0; random.usize(1..64)];
                random.fill(&mut junk);
                let at = random.usize(..bytes - junk.len());
                rustix::io::pwrite(shared.table, &junk, at as u64).expect("writable");
                let at = random.u64(..64 * MIB - 8);
                rustix::io::pwrite(shared.memory, &junk[..1], at).expect("writable");
            }
        });
        scope.spawn(|| churn(&mut honest.handle(), 5, || !over.load(Ordering::Relaxed)));
        let requests = [
            Request::Status,
            Request::Validate,
            Request::Reclaim { bytes: None },
            Request::Shrink { goal: ShrinkGoal::ToBytes(8 * MIB), wait_ms: 0 },
            Request::Grow { to_bytes: 64 * MIB },
            Request::AutoReclaim { settings: "interval=100ms,min-age=1,keep=0".parse().expect("settings") },
        ];
        let begin = std::time::Instant::now();
        let mut answers = 0;
        while begin.elapsed() < Duration::from_secs(seconds) {
            for request in &requests {
                // A refusal is an answer as well: the kernel may have been asked for what cannot be.
                let _ = place.client("hostile").call(request);
                let calm = matches!(request, Request::Shrink { .. });
                if !calm {
                    place.call("honest", request);
                }
                answers += 1;
            }
        }
        assert!(answers > 10);
    });
    let Reply::Validate(report) = place.call("honest", &Request::Validate) else { panic!("refused") };
    assert!(report.clean, "{report:?}");
}

#[test]
fn processes_that_are_killed_leave_nothing_behind_and_others_go_on() {
    let place = Place::new();
    let _keeper = place.start();
    let bystander = area(64);
    let _registered = bystander.register(&place.socket(), "bystander").expect("a keeper");
    let over = AtomicBool::new(false);
    let kills: u64 = std::env::var("LLFREE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    std::thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| churn(&mut bystander.handle(), 6, || !over.load(Ordering::Relaxed)));
        let mut random = fastrand::Rng::with_seed(7);
        for kill in 0..kills {
            let name = format!("p{kill}");
            let mut player = Player::start("plays_a_tenant", place.path(), &name);
            let socket = place.path().join(format!("{name}.sock"));
            if random.u8(..4) > 0 {
                eventually("it registers", || socket.exists());
                std::thread::sleep(Duration::from_micros(random.u64(..40_000)));
            } else {
                std::thread::sleep(Duration::from_micros(random.u64(..30_000)));
            }
            player.kill();
            eventually("its name is free", || !socket.exists());
        }
    });
    eventually("no file is left", || place.files() == ["areas", "bystander.lock", "bystander.sock"]);
    let Reply::Validate(report) = place.call("bystander", &Request::Validate) else { panic!("refused") };
    assert!(report.clean, "{report:?}");
}

#[test]
fn plays_a_tenant() {
    let Some((dir, name)) = part() else { return };
    let area = area(64);
    let _registered = area.register(&dir.join("areas"), &name).expect("a keeper");
    churn(&mut area.handle(), 8, || true);
}

#[test]
fn a_keeper_that_is_killed_leaves_processes_running_and_the_next_one_adopts_them() {
    let place = Place::new();
    let area = area(64);
    let kills: u64 = std::env::var("LLFREE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    let mut player = Player::start("plays_a_keeper", place.path(), "keeper");
    eventually("it listens", || place.listens());
    let _registered = area.register(&place.socket(), "survivor").expect("a keeper");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| churn(&mut area.handle(), 9, || !over.load(Ordering::Relaxed)));
        let mut random = fastrand::Rng::with_seed(10);
        for _ in 0..kills {
            // What the dead one had told may still stand.
            eventually("it answers", || place.status_or_none("survivor").is_some());
            let mut client = place.client("survivor");
            let until = std::time::Instant::now() + Duration::from_micros(random.u64(..60_000));
            while std::time::Instant::now() < until {
                client.call(&Request::Reclaim { bytes: None }).expect("it lives");
            }
            player.kill();
            player = Player::start("plays_a_keeper", place.path(), "keeper");
        }
        eventually("it is registered once more", || place.status_or_none("survivor").is_some());
    });
    eventually("it answers", || place.status_or_none("survivor").is_some());
    let Reply::Validate(report) = place.call("survivor", &Request::Validate) else { panic!("refused") };
    assert!(report.clean, "{report:?}");
    assert_eq!(place.status("survivor").limit_bytes, 64 * MIB, "what was in hand was returned");
    player.kill();
    eventually("the area is ours", || area.reclaim(u64::MAX).is_ok());
    assert_eq!(area.status().expect("known").used_bytes, 0);
    assert!(area.validate().expect("known").findings.is_empty());
    assert_eq!(area.handle().alloc_run(32).map(|block| block.bytes() as u64), Ok(64 * MIB), "no frame is lost");
}

#[test]
fn plays_a_keeper() {
    let Some((dir, _)) = part() else { return };
    let _keeper = Keeper::start(Place::at(&dir)).expect("a free place");
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}
