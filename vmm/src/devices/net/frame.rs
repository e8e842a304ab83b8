//! How large a frame is, with and without the header before it.

use virtio_bindings::virtio_net::virtio_net_hdr_v1;

/// Bytes of the largest frame.
pub const MAX_FRAME: usize = 64 << 10;
/// Bytes before each frame, in requests as on the tap.
pub(super) const HEADER_BYTES: usize = size_of::<virtio_net_hdr_v1>();
