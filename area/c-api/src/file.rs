//! The part of `llfree_area.h` about areas in named files.

use crate::{CObjects, KEEP, Status, builder, objects, put_objects, status};
use llfree_area::file::NamedFile;
use llfree_area::objects::Objects;
use llfree_area::{Builder, FileError, FileFault};
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::{self, NonNull};

/// `llfree_area_owned`: whether what is allocated at an offset has an owner.
pub type COwned = unsafe extern "C" fn(*mut c_void, *const c_void, u64, u64, u64) -> c_int;

impl From<FileError> for Status {
    fn from(error: FileError) -> Self {
        match error.fault {
            FileFault::Io(_, error) if error.kind() == ErrorKind::NotFound => Self::Absent,
            FileFault::Exists => Self::Exists,
            FileFault::InUse | FileFault::StillUsed => Self::InUse,
            FileFault::Torn => Self::Torn,
            FileFault::Area(error) => error.into(),
            FileFault::Io(..)
            | FileFault::NotAFile
            | FileFault::Magic { .. }
            | FileFault::Version { .. }
            | FileFault::Header { .. }
            | FileFault::Length { .. }
            | FileFault::Table(_)
            | FileFault::CannotPunch(_) => Self::File,
        }
    }
}

/// What a call about a file was given.
///
/// # Safety
/// `path` is null or a string.
unsafe fn arguments<'a>(
    path: *const c_char,
    flags: u32,
    to: *mut *mut CObjects,
) -> Result<(&'a Path, Builder), Status> {
    if path.is_null() || to.is_null() || flags & !KEEP != 0 {
        return Err(Status::Argument);
    }
    // SAFETY: the caller's word.
    let path = unsafe { CStr::from_ptr(path) };
    Ok((Path::new(OsStr::from_bytes(path.to_bytes())), builder(flags)))
}

/// See the header.
///
/// # Safety
/// `path` is null or a string; `to` is null or a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_create_at(
    path: *const c_char,
    size: u64,
    flags: u32,
    to: *mut *mut CObjects,
) -> i32 {
    let create = || {
        // SAFETY: the caller's word.
        let (path, builder) = unsafe { arguments(path, flags, to) }?;
        let area = builder.size(size).create_at(path)?;
        // SAFETY: the caller's place.
        unsafe { put_objects(to, area) };
        Ok(())
    };
    status(create())
}

/// See the header.
///
/// # Safety
/// `path` is null or a string; `owned` is null or a function that may be called with `context`; `to` is null or a place for
/// a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_open_at(
    path: *const c_char,
    flags: u32,
    owned: Option<COwned>,
    context: *mut c_void,
    to: *mut *mut CObjects,
) -> i32 {
    let open = || {
        // SAFETY: the caller's word.
        let (path, builder) = unsafe { arguments(path, flags, to) }?;
        let mut opened = builder.open_at(path)?;
        if let Some(owned) = owned {
            let memory = opened.at(0).map_or(ptr::null(), |start| start.as_ptr().cast_const().cast());
            let root = opened.file().root();
            // SAFETY: the caller's function, with the context that it is for.
            opened.free_unowned(|offset, bytes| unsafe { owned(context, memory, root, offset, bytes) } != 0);
        }
        // SAFETY: the caller's place.
        unsafe { put_objects(to, opened.area()?) };
        Ok(())
    };
    status(open())
}

/// See the header.
///
/// # Safety
/// Null, or what `llfree_objects_create_at` or `llfree_objects_open_at` made; nobody uses it or what was allocated in it any
/// more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_close(objects: *mut CObjects) -> i32 {
    if objects.is_null() {
        return Status::Ok as i32;
    }
    // SAFETY: it was made as a box, and is not used any more.
    let CObjects(objects) = *unsafe { Box::from_raw(objects) };
    status(objects.close().map_err(Status::from))
}

/// The file of objects that lie in one.
fn file(objects: &Objects) -> Result<&NamedFile, Status> {
    objects.area().file().ok_or(Status::Argument)
}

/// See the header.
///
/// # Safety
/// The objects are null, or were made and not closed or destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_root(of: *const CObjects) -> u64 {
    // SAFETY: the caller's word.
    unsafe { objects(of) }.and_then(file).map_or(0, NamedFile::root)
}

/// See the header.
///
/// # Safety
/// As `llfree_objects_root`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_set_root(of: *const CObjects, root: u64) -> i32 {
    // SAFETY: the caller's word.
    status(unsafe { objects(of) }.and_then(file).map(|file| file.set_root(root)))
}

/// See the header.
///
/// # Safety
/// As `llfree_objects_root`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_at(of: *const CObjects, offset: u64) -> *mut c_void {
    // SAFETY: the caller's word.
    let at = unsafe { objects(of) }.ok().and_then(|objects| objects.area().at(offset));
    at.map_or(ptr::null_mut(), |start| start.as_ptr().cast())
}

/// See the header.
///
/// # Safety
/// As `llfree_objects_root`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_offset(of: *const CObjects, start: *const c_void) -> u64 {
    // SAFETY: the caller's word.
    let objects = unsafe { objects(of) }.ok();
    let offset = NonNull::new(start.cast_mut().cast()).and_then(|start| objects?.area().offset_of(start));
    offset.unwrap_or(u64::MAX)
}
