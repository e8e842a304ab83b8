//! Named files where their file system has less than most, or lies over another one.

use super::{MIB, builder, directories, fault};
use crate::common::{dirty, fork, is_dirty};
use llfree_area::{Area, FileFault};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use test_support::{deny, in_own_process, refuse, skipped};

/// `O_TMPFILE` without the `O_DIRECTORY` in it.
const TMPFILE: u32 = (libc::O_TMPFILE & !libc::O_DIRECTORY) as u32;

/// The calls that open a file, and which argument has the flags.
const OPENS: &[(libc::c_long, u32)] = &[
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, 1),
    (libc::SYS_openat, 2),
];

/// Makes an area there, and opens it again with what it held.
fn is_kept_at(path: &Path) -> bool {
    let Ok(area) = builder().create_at(path) else { return false };
    let mut handle = area.handle();
    let (Ok(block), Ok(other)) = (handle.alloc_run(2), handle.alloc_run(3)) else { return false };
    dirty(&block, 5);
    dirty(&other, 6);
    let offset = area.offset_of(block.as_ptr());
    let gone = handle.free(other).is_ok() && area.reclaim(u64::MAX).is_ok_and(|pass| pass.discarded == 3);
    drop(handle);
    let opened = area.close().and_then(|()| builder().open_at(path)).and_then(|opened| opened.area());
    gone && opened.is_ok_and(|area| holds(&area, offset, 5))
}

/// Whether the block of [`is_kept_at`] is there, and nothing else.
fn holds(area: &Area, offset: Option<u64>, number: u64) -> bool {
    // SAFETY: it was allocated there, and we are its owner.
    let block = offset.and_then(|offset| unsafe { area.block_at(offset, 4 * MIB) });
    block.is_some_and(|block| is_dirty(&block, number))
        && area.status().is_ok_and(|status| status.resident_bytes == 4 * MIB && status.used_bytes == 4 * MIB)
        && area.validate().is_ok_and(|validation| validation.findings.is_empty())
}

#[test]
fn where_no_file_can_be_without_a_name_it_has_one_and_loses_it_if_it_is_not_finished() {
    in_own_process(|| {
        for directory in directories() {
            let path = directory.path().join("area");
            for error in [libc::EOPNOTSUPP, libc::EISDIR] {
                let child = || {
                    // Where filters are unavailable nothing is denied.
                    let refuse_open = |(call, argument): &(_, _)| refuse(*call, Some((*argument, TMPFILE)), error);
                    if OPENS.iter().try_for_each(refuse_open).is_err() {
                        return true;
                    }
                    let kept = is_kept_at(&path) && matches!(fault(builder().create_at(&path)), FileFault::Exists);
                    let absent = path.with_extension("absent");
                    deny(libc::SYS_fallocate, libc::EOPNOTSUPP).is_ok()
                        && kept
                        && matches!(fault(builder().create_at(&absent)), FileFault::CannotPunch(_))
                        && !absent.exists()
                };
                assert!(fork(child), "{error}");
                fs::remove_file(&path).expect("it was kept");
            }
            let others = fs::read_dir(directory.path()).expect("ours").count();
            assert_eq!(others, 0, "nothing else is left");
        }
    });
}

fn text(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no zeroes")
}

/// Lays `top` over `below`, for this process alone.
fn overlay(below: &Path, top: &Path) -> io::Result<()> {
    let [changes, work, merged] = ["changes", "work", "merged"].map(|name| top.join(name));
    for directory in [&changes, &work, &merged] {
        fs::create_dir(directory)?;
    }
    // SAFETY: numbers only.
    let (user, group) = unsafe { (libc::getuid(), libc::getgid()) };
    let own_users = if user == 0 { 0 } else { libc::CLONE_NEWUSER };
    // SAFETY: a child of one thread, which ends after this.
    if unsafe { libc::unshare(libc::CLONE_NEWNS | own_users) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if own_users != 0 {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", below.display(), changes.display(), work.display());
    let (kind, options, merged) = (c"overlay", CString::new(options)?, text(&merged));
    // SAFETY: strings that outlive the calls.
    let failed = unsafe {
        libc::mount(kind.as_ptr(), c"/".as_ptr(), std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE, std::ptr::null())
            != 0
            || libc::mount(kind.as_ptr(), merged.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) != 0
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[test]
fn an_area_can_lie_in_an_overlay_also_when_its_file_comes_from_below() {
    in_own_process(|| {
        let (below, top) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        let path = below.path().join("below");
        let area = builder().create_at(&path).expect("a new file");
        let block = area.handle().alloc_run(2).expect("room");
        dirty(&block, 7);
        let offset = area.offset_of(block.as_ptr());
        area.close().expect("nobody else has it");
        let before = fs::read(&path).expect("ours");
        let child = || {
            if let Err(error) = overlay(below.path(), top.path()) {
                skipped(format_args!("no overlay can be mounted: {error}"));
                return true;
            }
            let merged = top.path().join("merged");
            let opened = builder().open_at(&merged.join("below")).and_then(|opened| opened.area());
            let is_there = opened.is_ok_and(|area| {
                let is_there = holds(&area, offset, 7);
                // SAFETY: as above.
                let block = offset.and_then(|offset| unsafe { area.block_at(offset, 4 * MIB) });
                is_there && block.is_some_and(|block| area.free(block).is_ok()) && area.close().is_ok()
            });
            is_there && is_kept_at(&merged.join("above"))
        };
        assert!(fork(child));
        assert!(before == fs::read(&path).expect("ours"), "what lies below was changed");
    });
}
