//! What a keeper has to bear that is no registration at all: files that block, passes that take long, no descriptors.

mod fuse;

use crate::common::{LONG, MIB, Place, Player, area, eventually, part};
use crate::offer;
use fuse::Silent;
use llfree_area::RegisterError;
use llfree_area::wire::Registration;
use llfree_base::faults::Scenario;
use llfree_control::client::Client;
use llfree_control::protocol::{Reply, Request};
use llfree_keeper::{Keeper, Options, Quota};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use test_support::skipped;

/// Neither a question about such a file nor its end may hold up more than the place of who sent it.
#[test]
fn a_file_whose_file_system_is_silent_holds_up_nobody() {
    let place = Place::new();
    let quota = Quota { areas: 3, ..Quota::default() };
    let keeper = Keeper::start(Options { quota, ..place.options() }).expect("a free place");
    let _culprit;
    let Some(silent) = Silent::start(place.path()) else {
        return skipped("no file system can be mounted here");
    };
    _culprit = Player::start("hostile::fuse::plays_a_culprit", place.path(), "sends-it");
    eventually("it has sent it twice", || place.path().join("sent").exists());
    let honest = area(4);
    let registered = honest.register(&place.socket(), "honest").expect("nobody is held up");
    let Err(RegisterError::Refused(text)) = area(4).register(&place.socket(), "more") else {
        panic!("who blocks keeps his place")
    };
    assert!(text.contains("3 areas"), "{text}");
    let begin = Instant::now();
    drop(keeper);
    assert!(begin.elapsed() < LONG / 2, "it ends all the same");
    assert!(!place.socket().exists());
    eventually("the area is its process's", || honest.reclaim(0).is_ok());
    drop((registered, silent));
}

/// A keeper that is killed while one of its threads hangs in the kernel is gone for all but who had that thread hang.
fn a_kill_is_seen_by_all_but(culprits: &str, hangs: impl Fn(&Player) -> bool) {
    let place = Place::new();
    let mut keeper = Player::start("plays_a_keeper", place.path(), "keeper");
    // Neither of the two ends before the file system does.
    let _culprit;
    let Some(silent) = Silent::start(place.path()) else {
        return skipped("no file system can be mounted here");
    };
    eventually("it listens", || place.listens());
    let areas = [area(4), area(4)];
    let before = areas[0].register(&place.socket(), "before").expect("a keeper");
    _culprit = Player::start("hostile::fuse::plays_a_culprit", place.path(), culprits);
    eventually("it hangs", || hangs(&keeper));
    let after = areas[1].register(&place.socket(), "after").expect("a keeper");
    keeper.0.kill().expect("ours");
    eventually("they see it", || !before.is_connected() && !after.is_connected());
    let next = place.start();
    eventually("there is another keeper", || before.is_connected() && after.is_connected());
    assert!(!has_ended(&mut keeper.0), "nothing hung, and this shows nothing");
    drop((before, after, next, silent));
}

#[test]
fn a_keeper_that_is_killed_while_it_closes_a_silent_file_is_gone() {
    let number = format!("{} ", libc::SYS_close);
    a_kill_is_seen_by_all_but("sends-it", |keeper| {
        shows(keeper, "area-loop", "syscall", |text| text.starts_with(&number))
    });
}

/// The lock of a memory file's inode is with whoever writes to it, also while the kernel waits for what is to be written.
#[test]
fn a_keeper_that_is_killed_while_it_waits_for_a_memory_file_is_gone() {
    a_kill_is_seen_by_all_but("writes-from-it", |keeper| {
        shows(keeper, "area-work", "stat", |text| text.contains(") D "))
    });
}

/// Whether the kernel's file about a thread of this name says so.
fn shows(player: &Player, thread: &str, file: &str, is_so: impl Fn(&str) -> bool) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{}/task", player.0.id())).expect("it lives");
    threads.flatten().any(|entry| {
        let read = |file| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        read("comm").trim() == thread && is_so(&read(file))
    })
}

/// A pass of half a minute ends when its process leaves, and nothing waits for it that does not have to.
#[test]
fn a_long_pass_keeps_nobody_from_leaving() {
    let place = Place::new();
    let _keeper = Player::start_with(
        "hostile::plays_a_slow_keeper",
        place.path(),
        "keeper",
        &[("FAILPOINTS", "discard=sleep(300)")],
    );
    eventually("it listens", || place.listens());
    let area = area(8192);
    let registered = area.register(&place.socket(), "slow").expect("a keeper");
    let mut handle = area.handle();
    let block = handle.alloc_run(4000).expect("room");
    handle.free(block).expect("ours");
    let path = place.path().join("slow.sock");
    std::thread::scope(|scope| {
        scope.spawn(|| Client::connect(&path).expect("it is registered").call(&Request::Reclaim { bytes: None }));
        eventually("it is at work", || {
            place.call("slow", &Request::Ping) != Reply::Pong { name: String::new(), pid: 0 }
        });
        std::thread::sleep(Duration::from_millis(400));
        let begin = Instant::now();
        assert!(matches!(place.call("slow", &Request::Ping), Reply::Pong { .. }));
        drop(registered);
        assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
        area.reclaim(0).expect("it is ours again");
    });
    assert!(area.status().expect("known").reclaimable_bytes > 4000 * MIB, "most of it was still to come");
}

#[test]
fn plays_a_slow_keeper() {
    let Some((dir, _)) = part() else { return };
    let _faults = Scenario::start();
    let _keeper = Keeper::start(Place::at(&dir)).expect("a free place");
    loop {
        std::thread::sleep(LONG);
    }
}

/// A process of a namespace above the keeper's has no number there.
#[test]
fn a_process_without_a_number_is_registered() {
    let place = Place::new();
    let program = std::env::current_exe().expect("this test");
    let user = if rustix::process::geteuid().is_root() { "--kill-child" } else { "-Ur" };
    let keeper = Command::new("unshare")
        .args(["-p", "-f", "--kill-child", user])
        .arg(program)
        .args(["--exact", "plays_a_keeper", "--nocapture", "--test-threads=1"])
        .env("KEEPER_DIR", place.path())
        .env("KEEPER_NAME", "keeper")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(keeper) = keeper else { return skipped("there is no unshare") };
    let mut keeper = Player(keeper);
    let deadline = Instant::now() + LONG;
    while !place.listens() {
        if has_ended(&mut keeper.0) {
            return skipped("no namespace can be made here");
        }
        assert!(Instant::now() < deadline, "it never listens");
        std::thread::sleep(Duration::from_millis(5));
    }
    let area = area(4);
    let _registered = area.register(&place.socket(), "above").expect("a keeper");
    assert_eq!(place.status("above").pid, 0);
}

fn has_ended(child: &mut Child) -> bool {
    child.try_wait().expect("ours").is_some()
}

/// Calls `work` as another user; `None` where only root could. Of a thread that ends with it, and those that it starts.
fn as_user<T: Send>(user: u32, work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: numbers only; of this thread alone.
            (unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) } == 0).then(work)
        });
        thread.join().expect("no panic")
    })
}

#[test]
fn a_process_of_another_user_is_refused() {
    let place = Place::new();
    std::fs::set_permissions(place.path(), Permissions::from_mode(0o777)).expect("ours");
    let Some(keeper) = as_user(65534, || place.start()) else {
        return skipped("only root can be another user");
    };
    let honest = area(4);
    // SAFETY: nobody has references to its memory.
    let shared = unsafe { honest.shared() }.expect("a memory file");
    let words = Registration { huge_frames: 2, name: "x".into() }.to_bytes().expect("a name");
    let attempt = || offer(&place.socket(), &words, &[shared.memory, shared.table]);
    let registered = as_user(1234, || honest.register(&place.socket(), "x").map(drop)).expect("as before");
    assert!(matches!(registered, Err(RegisterError::Unreachable { .. })), "the socket's mode: {registered:?}");
    // And where somebody opened that.
    std::fs::set_permissions(place.socket(), Permissions::from_mode(0o666)).expect("ours");
    let answer = as_user(1234, attempt).expect("as before");
    let Some(Err(text)) = answer else { panic!("{answer:?}") };
    assert!(text.contains("own user"), "{text}");
    drop(keeper);
}

/// Without descriptors it cannot even wait: it goes on, slowly, and ends when it is told to.
#[test]
fn a_keeper_that_cannot_wait_ends() {
    let place = Place::new();
    let mut keeper = Player::start("hostile::plays_a_keeper_without_descriptors", place.path(), "keeper");
    eventually("it has none", || place.path().join("ready").exists());
    // Wakes it up, so that it has to wait anew.
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket");
    connect(&socket, &SocketAddrUnix::new(place.socket()).expect("short")).expect("it listens");
    std::thread::sleep(Duration::from_millis(100));
    std::fs::write(place.path().join("end"), "").expect("a file");
    let deadline = Instant::now() + LONG;
    while !has_ended(&mut keeper.0) {
        assert!(Instant::now() < deadline, "it is deaf");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn plays_a_keeper_without_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let Some((dir, _)) = part() else { return };
    let keeper = Keeper::start(Place::at(&dir)).expect("a free place");
    std::fs::write(dir.join("ready"), "").expect("a file");
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, rustix::process::Rlimit { current: Some(1), ..limit }).expect("less is allowed");
    while !dir.join("end").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(keeper);
    std::process::exit(0);
}
