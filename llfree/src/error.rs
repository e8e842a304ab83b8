//! Why an allocation or a free was refused. Every misuse that can be seen has a variant.

use core::fmt;
use shared_layout::{FrameId, HugeId, Order};

/// Why there is no block.
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
