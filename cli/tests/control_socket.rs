//! Names and sockets: which VM may listen where, and how one takes over what a dead VM left behind.

use cli::advice;
use cli::client_commands::CommandError;
use llfree_control::socket::{Claim, MAX_SOCKET_PATH, SocketError, live_in};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Duration;

fn dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("vm").tempdir_in("/tmp").expect("a scratch directory")
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("readable")
        .map(|entry| entry.expect("readable").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

/// A socket that nobody listens at.
fn dead_socket(path: &Path) {
    drop(UnixListener::bind(path).expect("bind"));
    // A child of another test has it, too, until its exec.
    while UnixStream::connect(path).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_clean_stop_leaves_nothing_behind() {
    let dir = dir();
    let claim = Claim::by_name(dir.path(), "vm0").expect("free");
    assert_eq!(entries(dir.path()), ["vm0.lock", "vm0.sock"]);
    assert_eq!(claim.path().metadata().expect("there").mode() & 0o777, 0o600, "for its user alone");
    UnixStream::connect(claim.path()).expect("it listens");
    assert_eq!(live_in(dir.path()).expect("readable").len(), 1);
    drop(claim);
    assert_eq!(entries(dir.path()), [""; 0]);
}

#[test]
fn a_live_vms_name_is_refused_with_its_pid() {
    let dir = dir();
    let _claim = Claim::by_name(dir.path(), "web").expect("free");
    let error = Claim::by_name(dir.path(), "web").expect_err("taken");
    let path = dir.path().join("web.sock");
    let expected = format!(
        "a VM already listens on {} (pid {}); choose another --name or stop that one",
        path.display(),
        std::process::id()
    );
    assert_eq!(advice::line(&CommandError::Socket(error)), expected);
    UnixStream::connect(path).expect("the refused one has not disturbed it");
}

#[test]
fn what_a_dead_vm_left_is_taken_over() {
    let dir = dir();
    // What kill -9 leaves behind: a socket file without a listener, a lock file without a lock.
    dead_socket(&dir.path().join("vm0.sock"));
    std::fs::write(dir.path().join("vm0.lock"), "4294967\n").expect("write");
    assert_eq!(live_in(dir.path()).expect("readable"), []);
    let claim = Claim::by_name(dir.path(), "vm0").expect("its VM is dead");
    UnixStream::connect(claim.path()).expect("it listens");
    let pid = std::fs::read_to_string(dir.path().join("vm0.lock")).expect("there");
    assert_eq!(pid.trim(), std::process::id().to_string());
}

#[test]
fn the_end_of_a_vm_takes_only_its_own_files() {
    let dir = dir();
    let old = Claim::by_name(dir.path(), "vm0").expect("free");
    // Somebody cleaned up too much, and a newer VM has the name.
    for file in entries(dir.path()) {
        std::fs::remove_file(dir.path().join(file)).expect("ours");
    }
    let new = Claim::by_name(dir.path(), "vm0").expect("free");
    drop(old);
    assert_eq!(entries(dir.path()), ["vm0.lock", "vm0.sock"]);
    UnixStream::connect(new.path()).expect("it listens");
    Claim::by_name(dir.path(), "vm0").expect_err("taken");
    drop(new);
    assert_eq!(entries(dir.path()), [""; 0]);
}

#[test]
fn what_killed_vms_left_goes_with_the_next_start_and_nothing_else_does() {
    let dir = dir();
    let path = |name: &str| dir.path().join(name);
    let _live = Claim::by_name(dir.path(), "live").expect("free");
    for dead in ["a", "b"] {
        dead_socket(&path(&format!("{dead}.sock")));
        std::fs::write(path(&format!("{dead}.lock")), "4294967\n").expect("write");
    }
    std::fs::write(path("c.lock"), "4294967\n").expect("write");
    dead_socket(&path("d.sock"));
    let _unlocked = UnixListener::bind(path("listens.sock")).expect("bind");
    for foreign in ["empty.lock", "notes.txt"] {
        std::fs::write(path(foreign), "").expect("write");
    }
    let _new = Claim::by_name(dir.path(), "new").expect("free");
    let left = ["empty.lock", "listens.sock", "live.lock", "live.sock", "new.lock", "new.sock", "notes.txt"];
    assert_eq!(entries(dir.path()), left);
}

#[test]
fn names_count_up_from_vm0() {
    let dir = dir();
    let first = Claim::first_free(dir.path()).expect("free");
    let second = Claim::first_free(dir.path()).expect("free");
    assert_eq!((first.name(), second.name()), ("vm0", "vm1"));
    drop(first);
    assert_eq!(Claim::first_free(dir.path()).expect("free").name(), "vm0");
}

#[test]
fn of_many_starters_one_gets_the_name_and_each_gets_some_name() {
    for round in 0..20 {
        let dir = Arc::new(dir());
        dead_socket(&dir.path().join("vm0.sock"));
        let barrier = Arc::new(Barrier::new(8));
        let threads: Vec<_> = (0..8)
            .map(|at| {
                let (dir, barrier) = (Arc::clone(&dir), Arc::clone(&barrier));
                std::thread::spawn(move || {
                    barrier.wait();
                    if at % 2 == 0 { Claim::by_name(dir.path(), "vm0") } else { Claim::first_free(dir.path()) }
                })
            })
            .collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        let mut names = Vec::new();
        for result in &results {
            match result {
                Ok(claim) => {
                    UnixStream::connect(claim.path()).expect("its own socket listens");
                    names.push(claim.name().to_owned());
                }
                Err(error) => assert!(matches!(error, SocketError::InUse { .. }), "round {round}: {error}"),
            }
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count, "round {round}: two owners of one name");
        assert!(names.contains(&"vm0".to_owned()), "round {round}");
        assert!(count >= 4, "round {round}: each VM that takes any name gets one");
    }
}

#[test]
fn starters_and_stoppers_never_share_a_name() {
    let dir = Arc::new(dir());
    let owners = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let (dir, owners) = (Arc::clone(&dir), Arc::clone(&owners));
            std::thread::spawn(move || {
                use std::sync::atomic::Ordering::SeqCst;
                for _ in 0..1500 {
                    match Claim::by_name(dir.path(), "x") {
                        Ok(claim) => {
                            assert_eq!(owners.fetch_add(1, SeqCst), 0, "two owners");
                            UnixStream::connect(claim.path()).expect("nobody removed it");
                            assert_eq!(owners.fetch_sub(1, SeqCst), 1);
                        }
                        Err(error) => assert!(matches!(error, SocketError::InUse { .. }), "{error}"),
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert_eq!(entries(dir.path()), [""; 0]);
}

#[test]
fn a_path_of_ones_own_must_be_free_or_a_dead_socket() {
    let dir = dir();
    let file = dir.path().join("notes.txt");
    std::fs::write(&file, "keep me").expect("write");
    let error = Claim::at_path(&file).expect_err("a file");
    assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read_to_string(&file).expect("still there"), "keep me");

    let cargo = dir.path().join("Cargo");
    std::fs::write(dir.path().join("Cargo.lock"), "version = 4").expect("write");
    let error = Claim::at_path(&cargo).expect_err("a lock file of another kind");
    assert!(matches!(error, SocketError::NotALock(_)), "{error}");
    assert_eq!(std::fs::read_to_string(dir.path().join("Cargo.lock")).expect("still there"), "version = 4");

    let empty = dir.path().join("empty.lock");
    std::fs::write(&empty, "").expect("write");
    let error = Claim::at_path(&dir.path().join("empty")).expect_err("not made by a VM");
    assert!(matches!(error, SocketError::NotALock(_)), "{error}");
    assert!(empty.exists(), "nor is it removed");

    let link = dir.path().join("link.lock");
    symlink(&file, &link).expect("symlink");
    Claim::at_path(&dir.path().join("link")).expect_err("a lock file that is a link");
    assert_eq!(std::fs::read_to_string(&file).expect("still there"), "keep me");

    let foreign = dir.path().join("foreign.sock");
    let _listener = UnixListener::bind(&foreign).expect("bind");
    let error = Claim::at_path(&foreign).expect_err("another program listens");
    assert!(matches!(error, SocketError::InUse { pid: None, .. }), "{error}");
    UnixStream::connect(&foreign).expect("undisturbed");

    let own = Claim::at_path(&dir.path().join("own.sock")).expect("free");
    assert_eq!(own.name(), "own");
    drop(own);
    let left: Vec<String> = entries(dir.path()).into_iter().filter(|name| name.starts_with("own")).collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn a_path_too_long_is_refused_with_both_numbers() {
    let dir = dir();
    let long = dir.path().join("x".repeat(200));
    let len = long.as_os_str().len();
    let message = Claim::at_path(&long).expect_err("too long").to_string();
    assert!(message.contains(&format!("{len} bytes")) && message.contains("107"), "{message}");
    assert_eq!(entries(dir.path()), [""; 0]);

    let fits = dir.path().join("x".repeat(MAX_SOCKET_PATH - dir.path().as_os_str().len() - 1));
    assert_eq!(fits.as_os_str().len(), MAX_SOCKET_PATH);
    drop(Claim::at_path(&fits).expect("just fits"));
}

#[test]
fn a_directory_that_others_can_enter_gets_no_socket_and_hides_no_vm() {
    // The environment of a test is shared by its threads, so this asks a process of its own.
    let home = dir();
    let run = |mode: u32, args: &[&str]| {
        let place = home.path().join("llfree-vmm");
        let _ = std::fs::create_dir(&place);
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(mode)).expect("ours");
        std::process::Command::new(env!("CARGO_BIN_EXE_llfree-vmm"))
            .args(args)
            .env("XDG_RUNTIME_DIR", home.path())
            .env_remove("RUST_LOG")
            .output()
            .expect("it runs")
    };
    for (args, code) in [(&["--mem", "64M"][..], 1), (&["list"], 0)] {
        let open = run(0o755, args);
        let text = String::from_utf8_lossy(&open.stderr).into_owned();
        assert_eq!(open.status.code(), Some(code), "{text}");
        assert!(text.contains("mode 0700, but its mode is 0755"), "{text}");
        assert_eq!(text.matches('\n').count(), 1, "{text}");
    }
    let closed = run(0o700, &["list"]);
    assert_eq!(closed.status.code(), Some(0), "{}", String::from_utf8_lossy(&closed.stderr));
}
