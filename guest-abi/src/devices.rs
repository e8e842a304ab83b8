//! The window of virtio-mmio devices above the doorbell page, and what this project adds to virtio.
//!
//! Each device has one page with the registers of virtio-mmio version 2, in the standard's layout.
//! The header says where the first page is and how many there are
//! ([`FEATURE_DEVICES`](crate::header::FEATURE_DEVICES)); which device it is, its page says.

use shared_layout::units::FRAME_SIZE;

/// Bytes from one device's registers to the next one's.
pub const DEVICE_BYTES: u64 = FRAME_SIZE;
/// The most devices: this many pages are mapped for the guest, used or not.
pub const DEVICE_SLOTS: u32 = 8;

/// A feature bit of the balloon, from the range that the standard leaves to a device: each page
/// frame number on the inflate and deflate queues, still in units of 4 KiB, stands for the 2 MiB
/// block that starts there, and must be aligned to it. `num_pages` and `actual` stay in units of
/// 4 KiB. Published comparisons call this a balloon of huge pages.
pub const BALLOON_F_HUGE: u32 = 23;
