//! [`Text`]: a message on the stack, for a guest whose only allocator hands out pages.

use core::fmt;
use guest_abi::mailbox::{TEXT_BYTES, Words, pack_text};

/// As much text as a mailbox carries; what is too long is cut at a character.
#[derive(Clone, Debug)]
pub struct Text {
    bytes: [u8; TEXT_BYTES],
    len: usize,
}

impl Text {
    /// The formatted message, cut where the mailbox ends.
    #[must_use]
    pub fn of(args: fmt::Arguments<'_>) -> Self {
        let mut text = Self { bytes: [0; TEXT_BYTES], len: 0 };
        // An error means that the rest did not fit: the message is cut.
        let _ = fmt::write(&mut text, args);
        text
    }

    /// The message.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Only whole characters were ever copied, so nothing is lost to the default.
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }

    /// The message as the words of a call.
    #[must_use]
    pub fn words(&self) -> Words {
        pack_text(self.as_str())
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = TEXT_BYTES - self.len;
        let mut take = part.len().min(room);
        while !part.is_char_boundary(take) {
            take -= 1;
        }
        self.bytes[self.len..self.len + take].copy_from_slice(&part.as_bytes()[..take]);
        self.len += take;
        if take == part.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_abi::mailbox::text_bytes;

    #[test]
    fn a_message_reaches_the_mailbox_whole_or_cut_at_a_character() {
        let text = Text::of(format_args!("frame {} of {}", 7, 9));
        assert_eq!(text.as_str(), "frame 7 of 9");
        assert_eq!(text_bytes(&text.words()), b"frame 7 of 9");
        let long = Text::of(format_args!("x{}{}", "ü".repeat(200), "never seen"));
        assert_eq!(long.as_str().len(), TEXT_BYTES - 1);
        assert!(long.as_str().ends_with('ü'));
    }
}
