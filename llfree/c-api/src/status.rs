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
    /// All of them, with their names in C.
    pub const ALL: [(Self, &str); 17] = [
        (Self::Ok, "LLFREE_OK"),
        (Self::Evicted, "LLFREE_EVICTED"),
        (Self::NoMemory, "LLFREE_ERR_NO_MEMORY"),
        (Self::Range, "LLFREE_ERR_RANGE"),
        (Self::Alignment, "LLFREE_ERR_ALIGNMENT"),
        (Self::NotFree, "LLFREE_ERR_NOT_FREE"),
        (Self::NotAllocated, "LLFREE_ERR_NOT_ALLOCATED"),
        (Self::Corrupt, "LLFREE_ERR_CORRUPT"),
        (Self::Argument, "LLFREE_ERR_ARGUMENT"),
        (Self::Null, "LLFREE_ERR_NULL"),
        (Self::Pointer, "LLFREE_ERR_POINTER"),
        (Self::HugeFrames, "LLFREE_ERR_HUGE_FRAMES"),
        (Self::Length, "LLFREE_ERR_LENGTH"),
        (Self::Handle, "LLFREE_ERR_HANDLE"),
        (Self::Busy, "LLFREE_ERR_BUSY"),
        (Self::Refused, "LLFREE_ERR_REFUSED"),
        (Self::Callback, "LLFREE_ERR_CALLBACK"),
    ];

    /// Its meaning, for people.
    pub(crate) const fn text(self) -> &'static CStr {
        match self {
            Self::Ok => c"success",
            Self::Evicted => c"nothing is behind the block: have it installed and confirm it, or free it",
            Self::NoMemory => c"out of memory: no free block of this order",
            Self::Range => c"the block does not lie in the table",
            Self::Alignment => c"a block of this order cannot start at this frame",
            Self::NotFree => c"a frame of the block has an owner, or the host holds it",
            Self::NotAllocated => c"no such block is allocated: a double free, or another order",
            Self::Corrupt => c"a huge frame's words contradict each other: something overwrote the table",
            Self::Argument => c"no such order, class or initial state",
            Self::Null => c"a pointer is null",
            Self::Pointer => c"a pointer is not aligned",
            Self::HugeFrames => c"the number of huge frames is out of range",
            Self::Length => c"the region or the residency is too short",
            Self::Handle => c"the table, handle or host was not initialised, or is destroyed",
            Self::Busy => c"another thread of the host is at this huge frame: try again",
            Self::Refused => c"the huge frame is not in a state to do this",
            Self::Callback => c"the callback failed, and the huge frame is as it was",
        }
    }

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
