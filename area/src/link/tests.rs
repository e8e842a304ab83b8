//! Registration with keepers that a test plays: silent ones, strangers, none.

use super::*;
use crate::space::MemoryKind;
use crate::wire::{REGISTRATION, answer};
use llfree_base::faults::{self, Scenario};
use rustix::net::{accept_with, bind, listen};
use test_support::skipped;

const QUICK: Times =
    Times { patience: Duration::from_millis(200), retry: Duration::from_millis(100), tick: Duration::from_millis(10) };

/// One who listens and does what a test wants of a keeper.
struct Fake {
    dir: tempfile::TempDir,
    listener: OwnedFd,
}

impl Fake {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("fake").tempdir_in("/tmp").expect("a scratch directory");
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket");
        bind(&listener, &SocketAddrUnix::new(dir.path().join("areas")).expect("short")).expect("a free place");
        Self { dir, listener }
    }

    fn listening() -> Self {
        let fake = Self::new();
        listen(&fake.listener, 4).expect("it is bound");
        fake
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("areas")
    }

    /// Hears a registration out, and says what it is told to.
    fn hear(&self, says: Option<&[u8]>) -> OwnedFd {
        let connection = accept_with(&self.listener, SocketFlags::CLOEXEC).expect("somebody comes");
        let mut words = [0; REGISTRATION];
        let (bytes, _) = recv(&connection, &mut words, RecvFlags::empty()).expect("it speaks");
        assert_eq!(bytes, REGISTRATION);
        if let Some(words) = says {
            rustix::net::send(&connection, words, SendFlags::NOSIGNAL).expect("it listens");
        }
        connection
    }
}

fn area() -> Area {
    Area::builder().size(8 << 20).memory(MemoryKind::MemoryFile).build().expect("a memory file")
}

#[track_caller]
fn eventually(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "never");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn an_area_that_a_keeper_is_silent_about_comes_back_when_that_lets_go() {
    let _alone = Scenario::start();
    let (fake, area) = (Fake::listening(), area());
    std::thread::scope(|scope| {
        let silent = scope.spawn(|| fake.hear(None));
        let error = area.register_within(&fake.path(), "a", QUICK).expect_err("it says nothing");
        assert!(matches!(error, RegisterError::Undecided { .. }), "{error}");
        let connection = silent.join().expect("no panic");
        assert!(matches!(area.reclaim(1), Err(AreaError::Registered)), "it may be at work");
        let again = area.register_within(&fake.path(), "a", QUICK).expect_err("the same");
        assert!(matches!(again, RegisterError::Area(AreaError::Registered)), "{again}");
        std::thread::sleep(QUICK.patience * 3);
        assert!(matches!(area.reclaim(1), Err(AreaError::Registered)), "it still may be");
        drop(connection);
        eventually(|| area.reclaim(1).is_ok());
    });
    // The same of one that had it and does not let go.
    let fake = Fake::listening();
    std::thread::scope(|scope| {
        let hangs = scope.spawn(|| fake.hear(Some(&answer(Ok(())))));
        let registered = area.register_within(&fake.path(), "a", QUICK).expect("it has it");
        let connection = hangs.join().expect("no panic");
        drop(registered);
        assert!(matches!(area.reclaim(1), Err(AreaError::Registered)), "it may be at work");
        drop(connection);
        eventually(|| area.reclaim(1).is_ok());
    });
}

#[test]
fn an_area_stays_out_of_reach_while_a_later_keeper_is_silent_about_it() {
    let _alone = Scenario::start();
    let (fake, area) = (Fake::listening(), area());
    std::thread::scope(|scope| {
        let first = scope.spawn(|| fake.hear(Some(&answer(Ok(())))));
        let registered = area.register_within(&fake.path(), "a", QUICK).expect("it has it");
        drop(first.join().expect("no panic"));
        // Its next life hears of the area, says nothing, and may adopt it at any time.
        let silent = fake.hear(None);
        std::thread::sleep(QUICK.patience * 4);
        let refused = area.reclaim(1);
        assert!(matches!(refused, Err(AreaError::Registered)), "{refused:?}");
        assert!(!registered.is_connected());
        drop(silent);
        // The one after that has it.
        let third = fake.hear(Some(&answer(Ok(()))));
        eventually(|| registered.is_connected());
        drop((third, registered));
        eventually(|| area.reclaim(1).is_ok());
    });
}

#[test]
fn an_area_is_taken_back_though_the_first_try_fails() {
    let scenario = Scenario::start();
    let (fake, area) = (Fake::listening(), area());
    std::thread::scope(|scope| {
        let hears = scope.spawn(|| fake.hear(Some(&answer(Ok(())))));
        let registered = area.register_within(&fake.path(), "a", QUICK).expect("it has it");
        let connection = hears.join().expect("no panic");
        // Nobody listens any more, and there is no thread to reclaim with.
        std::fs::remove_file(fake.path()).expect("it was there");
        scenario.set(faults::THREAD_START, "return").expect("actions");
        drop(connection);
        eventually(|| !registered.is_connected());
        let error = area.reclaim(1).expect_err("there is no thread");
        assert!(matches!(error, AreaError::Switch(_)), "{error}");
        scenario.set(faults::THREAD_START, "off").expect("actions");
        // Nobody asks for it: the thread tries again.
        eventually(|| area.status().expect("known").auto_reclaim.scans > 0);
        drop(registered);
    });
    // And without that thread, the caller does.
    let fake = Fake::listening();
    std::thread::scope(|scope| {
        let hears = scope.spawn(|| fake.hear(Some(&answer(Ok(())))));
        let registered = area.register_within(&fake.path(), "a", QUICK).expect("it has it");
        scenario.set(faults::THREAD_START, "return").expect("actions");
        drop(hears.join().expect("no panic"));
        drop(registered);
        scenario.set(faults::THREAD_START, "off").expect("actions");
        area.reclaim(1).expect("tried again");
    });
}

#[test]
fn an_area_is_not_lent_where_nobody_listens() {
    let _alone = Scenario::start();
    let (fake, area) = (Fake::new(), area());
    let scans = || area.status().expect("known").auto_reclaim.scans;
    eventually(|| scans() > 0);
    let error = area.register_within(&fake.path(), "a", QUICK).expect_err("nobody listens");
    assert!(matches!(error, RegisterError::Unreachable { .. }), "{error}");
    assert!(scans() > 0, "who takes its memory back went on, with all that it knew");
}

#[test]
fn an_area_is_not_given_to_another_user() {
    let _alone = Scenario::start();
    let (fake, area) = (Fake::new(), area());
    let changed = std::thread::scope(|scope| {
        let listens = scope.spawn(|| {
            // SAFETY: numbers only; of this thread alone, which ends with it.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) } == 0;
            listen(&fake.listener, 4).expect("it is bound");
            changed
        });
        listens.join().expect("no panic")
    });
    if !changed {
        return skipped("only root can be another user");
    }
    let error = area.register_within(&fake.path(), "a", QUICK).expect_err("a stranger");
    assert!(matches!(error, RegisterError::Stranger { uid: 65534, .. }), "{error}");
    area.reclaim(1).expect("it is ours");
}

/// Calls `work` on a thread that is interrupted all the time, and without end if that is what the work waits for.
fn interrupted<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a handler that does nothing, for a signal that nobody else here sends; calls are not restarted.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut());
    }
    std::thread::scope(|scope| {
        let (told, thread) = std::sync::mpsc::channel();
        let worker = scope.spawn(move || {
            // SAFETY: the calling thread's own number.
            told.send(unsafe { libc::pthread_self() }).expect("it is heard");
            work()
        });
        let thread = thread.recv().expect("it began");
        for signals in 0.. {
            if worker.is_finished() {
                break;
            }
            assert!(signals < 3000, "each signal began the wait anew");
            // SAFETY: not joined yet, so that the number is its own.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR2) };
            std::thread::sleep(Duration::from_millis(10));
        }
        worker.join().expect("no panic")
    })
}

#[test]
fn signals_do_not_renew_a_wait_for_a_keeper_nor_end_it() {
    let _alone = Scenario::start();
    let (fake, area) = (Fake::new(), area());
    listen(&fake.listener, 0).expect("it is bound");
    // It does not accept: what it is sent stays where it is, and no answer comes.
    let error = interrupted(|| area.register_within(&fake.path(), "a", QUICK)).expect_err("it says nothing");
    assert!(matches!(error, RegisterError::Undecided { .. }), "{error}");
    let error = interrupted(|| dial(&fake.path(), QUICK.patience)).expect_err("its queue is full");
    let RegisterError::Unreachable { source, .. } = error else { panic!("{error}") };
    assert!(matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{source}");
}

#[test]
fn signals_do_not_end_a_wait_for_room_to_speak() {
    let _alone = Scenario::start();
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a pair");
    while rustix::net::send(&ours, &[0; 1000], SendFlags::DONTWAIT).is_ok() {}
    let area = area();
    let shared = area.space.shared().expect("a memory file");
    let patient = Duration::from_secs(30);
    let sent = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(QUICK.patience);
            while recv(&theirs, &mut [0; 1000], RecvFlags::DONTWAIT).is_ok() {}
        });
        interrupted(|| send(&ours, b"words", shared, patient))
    });
    sent.expect("there was room in the end");
}

#[test]
fn a_child_does_not_wait_for_a_thread_of_its_parent() {
    let _alone = Scenario::start();
    let (fake, area) = (Fake::listening(), area());
    let registered = std::thread::scope(|scope| {
        scope.spawn(|| drop(fake.hear(Some(&answer(Ok(()))))));
        area.register_within(&fake.path(), "a", QUICK).expect("it has it")
    });
    let held = lock(&registered.shared.state);
    assert!(crate::fork::tests::holds_in_a_child(|| !registered.is_connected()));
    drop(held);
}
