//! Areas in named files: what they keep, what is refused, and what a kill leaves.
//!
//! Each test has a process of its own: a child that another one forks meanwhile would hold the lock of its file, too.

mod kill;
mod systems;

use crate::common::{dirty, fork, is_dirty};
use llfree_area::file::{MAGIC, VERSION};
use llfree_area::{Area, AreaError, Builder, FileError, FileFault, Order, Switch};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use test_support::{deny, in_own_process};

const MIB: u64 = 1 << 20;

fn builder() -> Builder {
    Area::builder().size(32 * MIB).auto_reclaim(Switch(None))
}

/// A directory on a disk, as a rule, and one in memory where there is such.
pub(crate) fn directories() -> Vec<TempDir> {
    let in_memory = tempfile::tempdir_in("/dev/shm").ok();
    std::iter::once(tempfile::tempdir().expect("a directory")).chain(in_memory).collect()
}

fn fault(result: Result<impl Sized, FileError>) -> FileFault {
    result.err().expect("it is refused").fault
}

/// Makes a file with one block of 4 MiB, whose offset is its root.
fn made(directory: &TempDir) -> PathBuf {
    let path = directory.path().join("area");
    let area = builder().create_at(&path).expect("a new file");
    let block = area.handle().alloc_run(2).expect("room");
    dirty(&block, 5);
    let offset = area.offset_of(block.as_ptr()).expect("of the area");
    area.file().expect("it has one").set_root(offset + 1);
    path
}

#[test]
fn what_was_allocated_is_there_again_and_what_was_free_is_free() {
    in_own_process(|| {
        for directory in directories() {
            let path = made(&directory);
            assert_eq!(fs::metadata(&path).expect("made").permissions().mode() & 0o777, 0o600);
            for generation in 2..5 {
                let opened = builder().size(1).open_at(&path).expect("it was closed");
                assert_eq!((opened.file().generation(), opened.file().recovery()), (generation, None));
                let area = opened.area().expect("address space");
                let offset = area.file().expect("it has one").root() - 1;
                let status = area.status().expect("known");
                assert_eq!((status.bytes, status.used_bytes, status.resident_bytes), (32 * MIB, 4 * MIB, 4 * MIB));
                // SAFETY: it was allocated there, and we are its owner.
                let block = unsafe { area.block_at(offset, 4 * MIB) }.expect("it is allocated");
                assert!(is_dirty(&block, 5));
                let mut handle = area.handle();
                // All others are free, and hold nothing.
                let others = handle.alloc_run(14).expect("all that is left");
                assert!(others.is_zeroed() && handle.alloc(Order::HUGE).is_err());
                dirty(&others, 6);
                handle.free(others).expect("ours");
                assert_eq!(area.reclaim(u64::MAX).expect("it makes holes").discarded, 14);
                assert_eq!(area.status().expect("known").resident_bytes, 4 * MIB);
                assert!(area.validate().expect("known").findings.is_empty());
            }
            assert!(fs::metadata(&path).expect("still there").blocks() * 512 < 5 * MIB, "what is free takes no room");
        }
    });
}

#[test]
fn a_limit_is_kept_and_memory_that_has_gone_comes_as_zeroes() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = made(directory);
        let area = builder().open_at(&path).and_then(|opened| opened.area()).expect("it was closed");
        assert_eq!(area.shrink_to(8 * MIB).expect("it makes holes").actual, 8 * MIB);
        area.close().expect("nobody else has it");
        let area = builder().open_at(&path).and_then(|opened| opened.area()).expect("it was closed");
        assert_eq!(area.status().expect("known").limit_bytes, 8 * MIB);
        let mut handle = area.handle();
        assert!(handle.alloc_run(3).is_err() && area.grow_to(32 * MIB).is_ok());
        assert!(handle.alloc_run(14).expect("as much as there was").is_zeroed());
        assert!(area.validate().expect("known").findings.is_empty());
    });
}

#[test]
fn blocks_of_an_earlier_life_are_only_those_that_are_allocated() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = made(directory);
        let area = builder().open_at(&path).and_then(|opened| opened.area()).expect("it was closed");
        let mut handle = area.handle();
        let small = handle.alloc(Order::new(3).expect("an order")).expect("room");
        let offset = area.offset_of(small.as_ptr()).expect("of the area");
        // SAFETY: only one of them is a block of anybody's, and of that nobody has another.
        let at = |offset, bytes| unsafe { area.block_at(offset, bytes) };
        for (offset, bytes) in [
            (offset, 0),
            (offset, 4095),
            (offset, 5 << 12),
            (offset + 1, 32 << 10),
            (offset + 4096, 32 << 10),
            (offset, 2 * MIB),
            (0, 64 << 10),
            (0, 6 * MIB),
            (0, 32 * MIB),
            (30 * MIB, 2 * MIB),
            (32 * MIB, 4096),
            (30 * MIB, 4 * MIB),
            (u64::MAX, 4096),
            (0, u64::MAX << 21),
        ] {
            assert_eq!(at(offset, bytes), None, "{offset} {bytes}");
        }
        assert_eq!((area.at(32 * MIB), area.offset_of(std::ptr::NonNull::dangling())), (None, None));
        area.free(at(offset, 32 << 10).expect("it is allocated")).expect("its owner");
        // The other one of the same block: the table knows that it is gone.
        area.free(small).expect_err("freed twice");
        area.free(at(0, 4 * MIB).expect("it is allocated")).expect("its owner");
        drop(handle);
        assert_eq!(area.status().expect("known").used_bytes, 0);
    });
}

#[test]
fn what_nobody_owns_is_freed_before_anybody_allocates() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = made(directory);
        let mut opened = builder().open_at(&path).expect("it was closed");
        let leaks = opened.free_unowned(|offset, bytes| {
            assert_eq!(bytes, 2 * MIB);
            offset == 0
        });
        assert_eq!((leaks.huge, leaks.frames), (1, 0));
        assert_eq!(opened.area().expect("address space").status().expect("known").used_bytes, 2 * MIB);
    });
}

#[test]
fn one_has_it_open_at_a_time() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = made(directory);
        let opened = builder().open_at(&path).expect("it was closed");
        assert!(matches!(fault(builder().open_at(&path)), FileFault::InUse));
        let area = opened.area().expect("address space");
        let error = builder().open_at(&path).expect_err("still");
        assert!(matches!(error.fault, FileFault::InUse) && error.to_string().contains("area"), "{error}");
        let handle = area.handle();
        let clone = area.clone();
        assert!(matches!(fault(clone.close()), FileFault::StillUsed));
        assert!(fork(|| area.file().is_none() && area.at(0).is_none()), "a child does not have it");
        assert!(fork(|| matches!(fault(builder().open_at(&path)), FileFault::InUse)), "nor can it open it");
        drop((handle, area));
        builder().open_at(&path).expect("nobody has it any more");
    });
}

#[test]
fn only_a_synced_file_is_opened_on_another_boot() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = made(directory);
        let other_boot = || {
            let file = OpenOptions::new().write(true).open(&path).expect("ours");
            file.write_all_at(&[0x55; 16], 9 * 8).expect("room");
        };
        builder().open_at(&path).and_then(|opened| opened.area()).and_then(Area::close).expect("nobody else has it");
        other_boot();
        drop(builder().open_at(&path).expect("it was synced and closed"));
        builder().open_at(&path).expect("the machine is still up");
        other_boot();
        let before = fs::read(&path).expect("ours");
        assert!(matches!(fault(builder().open_at(&path)), FileFault::Torn));
        assert!(before == fs::read(&path).expect("ours"), "it was changed");
    });
}

#[test]
fn what_is_no_area_is_refused_and_left_as_it_is() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = directory.path().join("area");
        drop(builder().size(4 * MIB).create_at(&path).expect("a new file"));
        let whole = fs::read(&path).expect("ours");
        let refused = |change: &dyn Fn(&File), expected: &dyn Fn(&FileFault) -> bool| {
            fs::write(&path, &whole).expect("room");
            change(&OpenOptions::new().write(true).open(&path).expect("ours"));
            let before = fs::read(&path).expect("ours");
            let error = builder().open_at(&path).expect_err("it is refused");
            assert!(expected(&error.fault), "{error:?}");
            assert!(fs::read(&path).expect("ours") == before, "{error:?}: it was changed");
        };
        let word = |index: u64, value: u64| {
            move |file: &File| file.write_all_at(&value.to_le_bytes(), index * 8).expect("room")
        };
        refused(&word(0, 0), &|fault| matches!(fault, FileFault::Magic { found: 0 }));
        refused(&word(0, MAGIC + 1), &|fault| matches!(fault, FileFault::Magic { .. }));
        let newer = VERSION + 1;
        refused(
            &word(1, 4096 << 32 | u64::from(newer)),
            &|f| matches!(f, FileFault::Version { found, .. } if *found == newer),
        );
        refused(&word(1, 4097 << 32 | u64::from(VERSION)), &|f| matches!(f, FileFault::Header { offset: 8, .. }));
        for huge_frames in [0, 1 << 26, u64::MAX] {
            refused(&word(2, huge_frames), &|f| matches!(f, FileFault::Area(AreaError::Size { .. })));
        }
        refused(&word(2, 17), &|fault| matches!(fault, FileFault::Header { .. }));
        for index in 3..7 {
            refused(&word(index, 77), &|fault| matches!(fault, FileFault::Header { found: 77, .. }));
        }
        for index in [7, 12, 511] {
            refused(&word(index, 1), &|fault| matches!(fault, FileFault::Header { expected: 0, .. }));
        }
        // Its region's magic, version and state.
        refused(&word(512, 1), &|fault| matches!(fault, FileFault::Table(llfree::OpenError::Magic { found: 1 })));
        refused(&word(513, 2), &|fault| {
            matches!(fault, FileFault::Table(llfree::OpenError::OlderVersion { found: 2 }))
        });
        refused(&word(520, 7), &|fault| matches!(fault, FileFault::Table(llfree::OpenError::State { found: 7 })));
        let bytes = whole.len() as u64;
        for len in [0, 1, 4095, 4096, bytes - 1, bytes + 1] {
            refused(
                &move |file| file.set_len(len).expect("room"),
                &|f| matches!(f, FileFault::Length { bytes, .. } if *bytes == len),
            );
        }
        fs::write(&path, &whole).expect("room");
        builder().open_at(&path).expect("as it was");
    });
}

#[test]
fn a_table_that_somebody_overwrote_is_recovered_and_nothing_is_given_out_twice() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = made(directory);
        let file = OpenOptions::new().read(true).write(true).open(&path).expect("ours");
        // Entries that no transition leads to, all over a table that says it was closed.
        file.write_all_at(&[0xff; 32], 4096 + 192).expect("room");
        let opened = builder().open_at(&path).expect("its header is fine");
        assert!(opened.file().recovery().is_some_and(|recovery| recovery.entries > 0));
        let area = opened.area().expect("address space");
        let mut handle = area.handle();
        while let Ok(block) = handle.alloc(Order::BASE) {
            dirty(&block, 1);
        }
        drop(handle);
        assert!(area.validate().is_ok());
    });
}

#[test]
fn places_where_no_area_can_be() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = made(directory);
        assert!(matches!(fault(builder().create_at(&path)), FileFault::Exists));
        assert!(matches!(fault(builder().create_at(directory.path())), FileFault::Exists));
        let dangling = directory.path().join("dangling");
        std::os::unix::fs::symlink("nowhere", &dangling).expect("room");
        assert!(matches!(fault(builder().create_at(&dangling)), FileFault::Exists));
        assert!(matches!(fault(builder().open_at(directory.path())), FileFault::NotAFile));
        assert!(matches!(fault(builder().open_at(Path::new("/dev/null"))), FileFault::NotAFile));
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("room");
        assert!(matches!(fault(builder().open_at(&pipe)), FileFault::NotAFile), "and nobody waits for its other end");
        let absent = directory.path().join("absent/area");
        for result in [builder().create_at(&absent).err(), builder().open_at(&absent).err()] {
            assert!(matches!(result.expect("no such directory").fault, FileFault::Io(..)));
        }
        assert!(matches!(fault(builder().size(0).create_at(&absent)), FileFault::Area(AreaError::Size { bytes: 0 })));
        let read_only = File::open(&path).expect("ours");
        let as_root = fs::metadata(format!("/proc/self/fd/{}", read_only.as_raw_fd())).expect("ours").uid() == 0;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("ours");
        assert!(as_root || matches!(fault(builder().open_at(&path)), FileFault::Io(..)));
    });
}

#[test]
fn a_file_system_without_holes_is_refused_and_no_file_stays() {
    in_own_process(|| {
        let directory = &directories()[0];
        let path = made(directory);
        let absent = directory.path().join("absent");
        let child = fork(|| {
            // As one that has none says.
            if deny(libc::SYS_fallocate, libc::EOPNOTSUPP).is_err() {
                return true;
            }
            matches!(fault(builder().open_at(&path)), FileFault::CannotPunch(_))
                && matches!(fault(builder().create_at(&absent)), FileFault::CannotPunch(_))
                && !absent.exists()
        });
        assert!(child);
        builder().open_at(&path).expect("as it was");
    });
}

#[test]
fn an_area_in_a_named_file_stays_with_its_process() {
    in_own_process(|| {
        let directory = &directories()[0];
        let area = builder().create_at(&directory.path().join("area")).expect("a new file");
        let registered = area.register(Path::new("/nowhere"), "named");
        assert!(matches!(registered, Err(llfree_area::RegisterError::NotShared)), "{registered:?}");
        let objects = llfree_area::objects::Objects::new(area.clone(), 0);
        let layout = std::alloc::Layout::from_size_align(3 << 20, 64).expect("a layout");
        let object = objects.allocate_layout(layout, true).expect("room");
        let offset = area.offset_of(object).expect("of the area");
        drop((objects, area));
        let opened =
            builder().open_at(&directory.path().join("area")).expect("its objects are gone, and so are their caches");
        let objects = llfree_area::objects::Objects::new(opened.area().expect("address space"), 0);
        let object = objects.area().at(offset).expect("it is in there");
        // SAFETY: it was allocated with this layout, and nobody uses it.
        unsafe { objects.deallocate_layout(object, layout) }.expect("its owner");
        assert_eq!(objects.area().status().expect("known").used_bytes, 0);
    });
}
