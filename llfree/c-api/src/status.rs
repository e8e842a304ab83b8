//! [`Status`]: what every call returns, and how the errors of `llfree` map to it.

use core::ffi::CStr;
use llfree::{AllocError, Allocation, FreeError, Refused, TableError};

/// `llfree_status`; the header says what each one means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
#[expect(missing_docs, reason = "`llfree.h` is their documentation")]
pub enum Status {
    Ok = 0,
    Evicted = 1,
    NoMemory = -1,
    Range = -2,
    Alignment = -3,
    NotFree = -4,
    NotAllocated = -5,
    Corrupt = -6,
    Argument = -7,
    Null = -8,
    Pointer = -9,
    HugeFrames = -10,
    Length = -11,
    Handle = -12,
    Busy = -13,
    Refused = -14,
    Callback = -15,
}

impl Status {
    /// All of them, with their names in C and what they mean, for people.
    pub const ALL: [(Self, &str, &CStr); 17] = [
        (Self::Ok, "LLFREE_OK", c"success"),
        (Self::Evicted, "LLFREE_EVICTED", c"nothing is behind the block: have it installed and confirm it, or free it"),
        (Self::NoMemory, "LLFREE_ERR_NO_MEMORY", c"out of memory: no free block of this order"),
        (Self::Range, "LLFREE_ERR_RANGE", c"the block does not lie in the table"),
        (Self::Alignment, "LLFREE_ERR_ALIGNMENT", c"a block of this order cannot start at this frame"),
        (Self::NotFree, "LLFREE_ERR_NOT_FREE", c"a frame of the block has an owner, or the host holds it"),
        (
            Self::NotAllocated,
            "LLFREE_ERR_NOT_ALLOCATED",
            c"no such block is allocated: a double free, or another order",
        ),
        (
            Self::Corrupt,
            "LLFREE_ERR_CORRUPT",
            c"a huge frame's words contradict each other: something overwrote the table",
        ),
        (Self::Argument, "LLFREE_ERR_ARGUMENT", c"no such order, class or initial state"),
        (Self::Null, "LLFREE_ERR_NULL", c"a pointer is null"),
        (Self::Pointer, "LLFREE_ERR_POINTER", c"a pointer is not aligned"),
        (Self::HugeFrames, "LLFREE_ERR_HUGE_FRAMES", c"the number of huge frames is out of range"),
        (Self::Length, "LLFREE_ERR_LENGTH", c"the region or the residency is too short"),
        (Self::Handle, "LLFREE_ERR_HANDLE", c"the table, handle or host was not initialised, or is destroyed"),
        (Self::Busy, "LLFREE_ERR_BUSY", c"another thread of the host is at this huge frame: try again"),
        (Self::Refused, "LLFREE_ERR_REFUSED", c"the huge frame is not in a state to do this"),
        (Self::Callback, "LLFREE_ERR_CALLBACK", c"the callback failed, and the huge frame is as it was"),
    ];

    /// Both ends of a call whose failures are statuses already.
    pub(crate) fn of(result: Result<Self, Self>) -> Self {
        match result {
            Ok(status) | Err(status) => status,
        }
    }

    /// Whether a block may be used.
    pub(crate) fn of_allocation(allocation: &Allocation) -> Self {
        match allocation {
            Allocation::Ready(_) => Self::Ok,
            Allocation::Evicted(_) => Self::Evicted,
        }
    }
}

impl From<AllocError> for Status {
    fn from(error: AllocError) -> Self {
        match error {
            AllocError::OutOfMemory(_) => Self::NoMemory,
            AllocError::OutOfRange(..) => Self::Range,
            AllocError::Misaligned(..) => Self::Alignment,
            AllocError::NotFree(..) => Self::NotFree,
        }
    }
}

impl From<FreeError> for Status {
    fn from(error: FreeError) -> Self {
        match error {
            FreeError::OutOfRange(..) => Self::Range,
            FreeError::Misaligned(..) => Self::Alignment,
            FreeError::NotAllocated(..) => Self::NotAllocated,
            FreeError::Corrupt(_) => Self::Corrupt,
        }
    }
}

impl From<TableError> for Status {
    fn from(error: TableError) -> Self {
        match error {
            TableError::HugeFrames { .. } => Self::HugeFrames,
            TableError::Length { .. } => Self::Length,
            TableError::Misaligned { .. } => Self::Pointer,
        }
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NotFree(_) | Refused::Residency(_) => Self::Refused,
            Refused::Contended => Self::Busy,
        }
    }
}
