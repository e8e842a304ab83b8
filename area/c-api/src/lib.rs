//! `llfree_area.h`: large objects for programs in C.
//!
//! Each function is what the header says of it. Pointers of the caller's are checked for null, sizes and alignments for
//! what they can be; that a pointer is what it is said to be is the caller's word, as in all of C. No panic leaves this
//! library: its profile aborts, and nothing here panics. Areas in named files are in [`mod@file`].

pub mod file;

use llfree_area::objects::Objects;
use llfree_area::{AllocError, Area, AreaError, Builder, FreeError, MemoryKind, RegisterError, Registered, Switch};
use std::alloc::Layout;
use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::{self, NonNull};

/// What a call returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
#[expect(missing_docs, reason = "the header says what they mean")]
pub enum Status {
    Ok = 0,
    NoMemory = -1,
    Argument = -2,
    Foreign = -3,
    Forked = -4,
    Registered = -5,
    Keeper = -6,
    System = -7,
    File = -8,
    Absent = -9,
    Exists = -10,
    InUse = -11,
    Torn = -12,
}

/// The header's names, and what they mean, for people.
pub const STATUS: [(Status, &str, &CStr); 13] = [
    (Status::Ok, "LLFREE_AREA_OK", c"all is well"),
    (Status::NoMemory, "LLFREE_AREA_ERR_NO_MEMORY", c"out of memory: nothing as large is free side by side"),
    (Status::Argument, "LLFREE_AREA_ERR_ARGUMENT", c"an argument that cannot be"),
    (Status::Foreign, "LLFREE_AREA_ERR_FOREIGN", c"the memory belongs to others"),
    (Status::Forked, "LLFREE_AREA_ERR_FORKED", c"a forked child does not have the area"),
    (Status::Registered, "LLFREE_AREA_ERR_REGISTERED", c"a keeper takes memory back from the area"),
    (Status::Keeper, "LLFREE_AREA_ERR_KEEPER", c"there is no keeper, or it refused"),
    (Status::System, "LLFREE_AREA_ERR_SYSTEM", c"the kernel refused, or somebody wrote to the table"),
    (Status::File, "LLFREE_AREA_ERR_FILE", c"the file cannot be used, or is no area"),
    (Status::Absent, "LLFREE_AREA_ERR_ABSENT", c"there is no such file"),
    (Status::Exists, "LLFREE_AREA_ERR_EXISTS", c"there is such a file already"),
    (Status::InUse, "LLFREE_AREA_ERR_IN_USE", c"somebody has the file open as an area"),
    (
        Status::Torn,
        "LLFREE_AREA_ERR_TORN",
        c"the machine went down while the file was open; nothing in it can be relied on",
    ),
];
/// The header's flags.
pub const FLAGS: [(u32, &str); 3] =
    [(0, "LLFREE_AREA_PRIVATE"), (FILE, "LLFREE_AREA_FILE"), (KEEP, "LLFREE_AREA_KEEP")];

const FILE: u32 = 1;
const KEEP: u32 = 16;

impl From<AllocError> for Status {
    fn from(error: AllocError) -> Self {
        match error {
            AllocError::OutOfMemory { .. } | AllocError::Unavailable => Self::NoMemory,
            AllocError::Size { .. } | AllocError::Alignment(_) => Self::Argument,
            AllocError::Forked => Self::Forked,
        }
    }
}

impl From<FreeError> for Status {
    fn from(error: FreeError) -> Self {
        match error {
            FreeError::Foreign => Self::Foreign,
            FreeError::Run(_) | FreeError::Block(_) => Self::System,
            FreeError::Forked => Self::Forked,
        }
    }
}

impl From<AreaError> for Status {
    fn from(error: AreaError) -> Self {
        match error {
            AreaError::Size { .. } => Self::Argument,
            AreaError::Memory(_) | AreaError::Table(_) => Self::NoMemory,
            AreaError::Switch(_) | AreaError::Monitor(_) => Self::System,
            AreaError::Registered => Self::Registered,
            AreaError::Forked => Self::Forked,
        }
    }
}

/// `llfree_area_stats`.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
#[expect(missing_docs, reason = "the header says what they mean")]
pub struct CStats {
    pub size: u64,
    pub limit: u64,
    pub resident: u64,
    pub used: u64,
    pub reclaimable: u64,
}

/// `llfree_objects`.
#[derive(Debug)]
pub struct CObjects(Objects);

/// `llfree_registration`.
#[derive(Debug)]
pub struct CRegistration(#[expect(dead_code, reason = "its drop ends the registration")] Registered);

/// The caller's objects; an error for null.
///
/// # Safety
/// Null, or what `llfree_objects_create` made and nobody destroyed.
unsafe fn objects<'a>(objects: *const CObjects) -> Result<&'a Objects, Status> {
    // SAFETY: as above.
    unsafe { objects.as_ref() }.map(|objects| &objects.0).ok_or(Status::Argument)
}

fn layout(size: usize, align: usize) -> Result<Layout, Status> {
    Layout::from_size_align(size, align).ok().filter(|layout| layout.size() > 0).ok_or(Status::Argument)
}

fn status(result: Result<(), Status>) -> i32 {
    result.err().unwrap_or(Status::Ok) as i32
}

/// # Safety
/// Null, or a place for a value.
unsafe fn put<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: the caller's place.
        unsafe { to.write(value) };
    }
}

/// See the header.
///
/// # Safety
/// `to` is null or a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_create(size: u64, flags: u32, to: *mut *mut CObjects) -> i32 {
    let create = || {
        let memory = match flags & !KEEP {
            0 => MemoryKind::Private,
            FILE => MemoryKind::MemoryFile,
            _ => return Err(Status::Argument),
        };
        if to.is_null() {
            return Err(Status::Argument);
        }
        let area = builder(flags).size(size).memory(memory).build()?;
        // SAFETY: the caller's place.
        unsafe { put_objects(to, area) };
        Ok(())
    };
    status(create())
}

/// With automatic reclaim as the flags have it.
fn builder(flags: u32) -> Builder {
    Area::builder().auto_reclaim(Switch((flags & KEEP == 0).then_some(Builder::AUTO_RECLAIM)))
}

/// # Safety
/// A place for a pointer.
unsafe fn put_objects(to: *mut *mut CObjects, area: Area) {
    let made = Box::new(CObjects(Objects::new(area, Objects::LOCAL_BYTES)));
    // SAFETY: the caller's place.
    unsafe { put(to, Box::into_raw(made)) };
}

/// See the header.
///
/// # Safety
/// Null, or what `llfree_objects_create` made; nobody uses it or what was allocated in it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_destroy(objects: *mut CObjects) {
    if !objects.is_null() {
        // SAFETY: it was made as a box, and is not used any more.
        drop(unsafe { Box::from_raw(objects) });
    }
}

/// # Safety
/// As [`objects`].
unsafe fn alloc(of: *const CObjects, size: usize, align: usize, zeroed: bool) -> *mut c_void {
    let alloc = || {
        // SAFETY: the caller's word.
        let objects = unsafe { objects(of) }?;
        objects.allocate_layout(layout(size, align)?, zeroed).map_err(Status::from)
    };
    alloc().map_or(ptr::null_mut(), |start: NonNull<u8>| start.as_ptr().cast())
}

/// See the header.
///
/// # Safety
/// The objects are null, or were created and not destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_alloc(objects: *const CObjects, size: usize, align: usize) -> *mut c_void {
    // SAFETY: the caller's word.
    unsafe { alloc(objects, size, align, false) }
}

/// See the header.
///
/// # Safety
/// As `llfree_objects_alloc`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_alloc_zeroed(
    objects: *const CObjects,
    size: usize,
    align: usize,
) -> *mut c_void {
    // SAFETY: the caller's word.
    unsafe { alloc(objects, size, align, true) }
}

/// See the header.
///
/// # Safety
/// As `llfree_objects_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_realloc(
    of: *const CObjects,
    start: *mut c_void,
    size: usize,
    align: usize,
    new_size: usize,
) -> *mut c_void {
    let Some(old) = NonNull::new(start.cast::<u8>()) else {
        // SAFETY: the caller's word.
        return unsafe { alloc(of, new_size, align, false) };
    };
    let realloc = || {
        // SAFETY: the caller's word.
        let objects = unsafe { objects(of) }?;
        let (from, to) = (layout(size, align)?, layout(new_size, align)?);
        // SAFETY: the caller's block, of this layout.
        if unsafe { objects.resize_layout(old, from, new_size) }.is_ok() {
            return Ok(old);
        }
        let new = objects.allocate_layout(to, false)?;
        // SAFETY: two distinct blocks of at least that size; the old one is the caller's, who gives it up.
        unsafe { ptr::copy_nonoverlapping(old.as_ptr(), new.as_ptr(), size.min(new_size)) };
        // SAFETY: the caller's block, of this layout.
        if let Err(refused) = unsafe { objects.deallocate_layout(old, from) } {
            // SAFETY: ours, made just now, of this layout.
            unsafe { objects.deallocate_layout(new, to)? };
            return Err(refused.into());
        }
        Ok::<_, Status>(new)
    };
    realloc().map_or(ptr::null_mut(), |start| start.as_ptr().cast())
}

/// See the header.
///
/// # Safety
/// The objects are null, or were created and not destroyed. `start` is null, or was allocated there with this size and
/// alignment, and nobody uses it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_free(
    of: *const CObjects,
    start: *mut c_void,
    size: usize,
    align: usize,
) -> i32 {
    let free = || {
        // SAFETY: the caller's word.
        let objects = unsafe { objects(of) }?;
        let Some(start) = NonNull::new(start.cast()) else { return Ok(()) };
        // SAFETY: the caller's word.
        Ok(unsafe { objects.deallocate_layout(start, layout(size, align)?) }?)
    };
    status(free())
}

/// See the header.
///
/// # Safety
/// The objects are null, or were created and not destroyed; `freed` is null or a place for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_reclaim(of: *const CObjects, bytes: u64, freed: *mut u64) -> i32 {
    let reclaim = || {
        // SAFETY: the caller's word.
        let pass = unsafe { objects(of) }?.area().reclaim(bytes)?;
        // SAFETY: as above.
        unsafe { put(freed, pass.freed_bytes) };
        Ok(())
    };
    status(reclaim())
}

/// See the header.
///
/// # Safety
/// As `llfree_objects_reclaim`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_limit(of: *const CObjects, bytes: u64, actual: *mut u64) -> i32 {
    let limit = || {
        // SAFETY: the caller's word.
        let area = unsafe { objects(of) }?.area();
        let resize = match bytes < area.status()?.limit_bytes {
            true => area.shrink_to(bytes)?,
            false => area.grow_to(bytes.min(area.bytes()))?,
        };
        // SAFETY: as above.
        unsafe { put(actual, resize.actual) };
        Ok(())
    };
    status(limit())
}

/// See the header.
///
/// # Safety
/// The objects are null, or were created and not destroyed; `to` is null or a place for the structure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_stats(of: *const CObjects, to: *mut CStats) -> i32 {
    let stats = || {
        // SAFETY: the caller's word.
        let status = unsafe { objects(of) }?.area().status()?;
        let stats = CStats {
            size: status.bytes,
            limit: status.limit_bytes,
            resident: status.resident_bytes,
            used: status.used_bytes,
            reclaimable: status.reclaimable_bytes,
        };
        // SAFETY: as above.
        unsafe { put(to, stats) };
        if to.is_null() { Err(Status::Argument) } else { Ok(()) }
    };
    status(stats())
}

/// See the header.
///
/// # Safety
/// The objects are null, or were created and not destroyed; both texts are null or strings; `to` is null or a place for
/// a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_objects_register(
    of: *const CObjects,
    path: *const c_char,
    name: *const c_char,
    to: *mut *mut CRegistration,
) -> i32 {
    let register = || {
        if path.is_null() || name.is_null() || to.is_null() {
            return Err(Status::Argument);
        }
        // SAFETY: the caller's word.
        let (objects, path, name) = unsafe { (objects(of)?, CStr::from_ptr(path), CStr::from_ptr(name)) };
        let name = name.to_str().map_err(|_| Status::Argument)?;
        let registered = objects.area().register(Path::new(OsStr::from_bytes(path.to_bytes())), name);
        let registered = registered.map_err(|error| match error {
            RegisterError::Name(_) | RegisterError::NotShared => Status::Argument,
            RegisterError::Area(error) => error.into(),
            _ => Status::Keeper,
        })?;
        // SAFETY: the caller's place.
        unsafe { put(to, Box::into_raw(Box::new(CRegistration(registered)))) };
        Ok(())
    };
    status(register())
}

/// See the header.
///
/// # Safety
/// Null, or what `llfree_objects_register` made, once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_registration_end(registration: *mut CRegistration) {
    if !registration.is_null() {
        // SAFETY: it was made as a box, and is not used any more.
        drop(unsafe { Box::from_raw(registration) });
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn llfree_area_strerror(status: i32) -> *const c_char {
    let known = STATUS.into_iter().find(|(known, ..)| *known as i32 == status);
    known.map_or(c"no such status", |(.., text)| text).as_ptr()
}
