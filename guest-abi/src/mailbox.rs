//! [`Mailbox`]: how one vCPU and the host exchange the words of a call.
//!
//! The guest fills `request`, rings the doorbell and reads `reply` when the doorbell's write
//! returns. The host copies each request word once, before it looks at any of them, and writes
//! only `reply`. The two halves lie on cache lines of their own.

/// 64-bit words in each half.
pub const WORDS: usize = 32;

/// The words of one half of a mailbox.
pub type Words = [u64; WORDS];

/// One vCPU's mailbox; `reply[0]` is the [`Status`](crate::Status) of the call.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Mailbox {
    /// Written by the guest, read by the host.
    pub request: Words,
    /// Written by the host, read by the guest.
    pub reply: Words,
}

const _: () = assert!(size_of::<Mailbox>() == 512);
const _: () = assert!(core::mem::offset_of!(Mailbox, request) == 0);
const _: () = assert!(core::mem::offset_of!(Mailbox, reply) == 256);

/// Longest text that fits after one length word.
pub const TEXT_BYTES: usize = (WORDS - 1) * 8;

/// Packs as much of `text` as fits, cut at a character boundary: `words[0]` is its length.
#[must_use]
pub fn pack_text(text: &str) -> Words {
    let mut end = text.len().min(TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut words = [0; WORDS];
    words[0] = end as u64;
    for (word, part) in words[1..].iter_mut().zip(text.as_bytes()[..end].chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..part.len()].copy_from_slice(part);
        *word = u64::from_ne_bytes(bytes);
    }
    words
}

/// The bytes of a packed text. The length is the writer's claim and is clamped.
#[cfg(feature = "bytes")]
#[must_use]
pub fn text_bytes(words: &Words) -> &[u8] {
    let len = usize::try_from(words[0]).unwrap_or(TEXT_BYTES).min(TEXT_BYTES);
    &zerocopy::IntoBytes::as_bytes(&words[1..])[..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_the_mailbox_and_is_cut_at_a_character() {
        assert_eq!(text_bytes(&pack_text("out of memory")), b"out of memory");
        let long = "ü".repeat(200);
        let packed = pack_text(&long);
        let cut = core::str::from_utf8(text_bytes(&packed)).expect("cut at a boundary");
        assert_eq!(cut.len(), TEXT_BYTES);
    }

    #[test]
    fn a_hostile_text_length_is_clamped() {
        let mut words = pack_text("x");
        words[0] = u64::MAX;
        assert_eq!(text_bytes(&words).len(), TEXT_BYTES);
    }
}
