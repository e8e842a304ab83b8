//! Why an allocation or a free was refused, and what is wrong with the parts of a table. Every misuse
//! that can be seen has a variant.

use core::fmt;
use shared_layout::table::MAX_HUGE_FRAMES;
use shared_layout::{FrameId, HugeId, Order};

/// The reason that there is no block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocError {
    /// A pass over every huge entry found no free block of this order.
    OutOfMemory(Order),
    /// The block does not lie in the table.
    OutOfRange(FrameId, Order),
    /// A block of this order cannot start at this frame.
    Misaligned(FrameId, Order),
    /// Somebody owns a frame of the block, or the host holds it.
    NotFree(FrameId, Order),
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfMemory(o) => write!(f, "out of memory: no free block of order {}", o.get()),
            Self::OutOfRange(frame, o) => write!(f, "frame {} and order {} lie beyond the table", frame.0, o.get()),
            Self::Misaligned(frame, o) => write!(f, "frame {} is not aligned to order {}", frame.0, o.get()),
            Self::NotFree(frame, o) => write!(f, "the block of order {} at frame {} is not free", o.get(), frame.0),
        }
    }
}

impl core::error::Error for AllocError {}

/// Why a block was not freed; nothing was changed unless the variant says so, or unless another
/// party frees a part of the block at this very moment: then each frame is free once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FreeError {
    /// The block does not lie in the table.
    OutOfRange(FrameId, Order),
    /// A block of this order cannot start at this frame.
    Misaligned(FrameId, Order),
    /// A frame of the block is free already (double free), or was allocated with an order on the
    /// other side of 9: huge frames are neither freed piecewise nor put together.
    NotAllocated(FrameId, Order),
    /// The huge frame's counter contradicts its bitfield: the frames are lost until a repair.
    Corrupt(HugeId),
}

impl fmt::Display for FreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange(frame, o) => write!(f, "frame {} and order {} lie beyond the table", frame.0, o.get()),
            Self::Misaligned(frame, o) => write!(f, "frame {} is not aligned to order {}", frame.0, o.get()),
            Self::NotAllocated(frame, o) => {
                write!(f, "no block of order {} is allocated at frame {}", o.get(), frame.0)
            }
            Self::Corrupt(huge) => write!(f, "the counter of huge frame {} contradicts its bitfield", huge.0),
        }
    }
}

impl core::error::Error for FreeError {}

/// The parts of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// All of it: one region of memory, in bytes.
    Region,
    /// Rows of 64 frames, eight words a huge frame.
    Rows,
    /// One word a tree.
    Hints,
    /// Bitmaps over the trees, a cursor and a counter, in words.
    Summary,
    /// The host's own knowledge, a byte a huge frame.
    Residency,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Region => "region (bytes)",
            Self::Rows => "bitfields (64-bit rows)",
            Self::Hints => "hints (16-bit words)",
            Self::Summary => "summary (64-bit words)",
            Self::Residency => "residency (bytes)",
        })
    }
}

/// Why some memory cannot be a table; nothing in it was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableError {
    /// More huge frames than a table can have, or none where there must be some.
    HugeFrames {
        /// Huge frames asked for.
        found: usize,
    },
    /// A part has not the length that the number of huge frames asks for.
    Length {
        /// Which one.
        part: Part,
        /// Elements that it has.
        found: usize,
        /// Elements that it needs: exactly these, of a region at least.
        needed: usize,
    },
    /// The region does not begin at a cache line.
    Misaligned {
        /// Its start address.
        address: usize,
        /// The alignment required.
        align: usize,
    },
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HugeFrames { found } => {
                write!(f, "a table cannot have {found} huge frames, only 1 to {MAX_HUGE_FRAMES}")
            }
            Self::Length { part, found, needed } => {
                write!(f, "length of the table's {part}: {found}, its huge frames need {needed}")
            }
            Self::Misaligned { address, align } => {
                write!(f, "the table's region begins at {address:#x}, which is not a multiple of {align}")
            }
        }
    }
}

impl core::error::Error for TableError {}

pub(crate) fn check_huge_frames(found: usize) -> Result<(), TableError> {
    if found <= MAX_HUGE_FRAMES as usize { Ok(()) } else { Err(TableError::HugeFrames { found }) }
}

pub(crate) fn check_len(part: Part, found: usize, needed: usize) -> Result<(), TableError> {
    if found == needed { Ok(()) } else { Err(TableError::Length { part, found, needed }) }
}
