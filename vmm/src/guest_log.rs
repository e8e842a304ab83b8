//! What a guest can make us write: text of its choice, and lines as often as it likes.
//!
//! Everything that comes from a guest, its image or another process goes through [`printable`] on
//! its way to a terminal, and every line that a guest can cause again and again goes through a
//! [`Rarely`]. So no guest moves the operator's cursor, and none fills the host's disk.

use std::sync::atomic::{AtomicU64, Ordering};

/// A text for a terminal: control characters become blanks, and characters that show nothing but
/// reorder or hide others are left out.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !is_invisible(*c)).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Unicode's format characters: joiners, marks of direction (which reorder what stands around
/// them), byte order mark, annotations, tags; and its two separators of lines.
fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{00ad}' | '\u{061c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Counts events and says which of them to log: the 1st, 2nd, 4th, 8th and so on, 64 lines at most.
#[derive(Default, Debug)]
pub struct Rarely(AtomicU64);

impl Rarely {
    /// One more event; its number, from 1, if it is to be logged.
    pub fn tick(&self) -> Option<u64> {
        let number = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        number.is_power_of_two().then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_send_escape_sequences() {
        assert_eq!(printable("\x1b[2Jhi\n\u{9b}31m\u{fffd}"), " [2Jhi  31m\u{fffd}");
    }

    #[test]
    fn a_guest_cannot_reorder_or_hide_text() {
        assert_eq!(printable("exit\u{202e}0 edoc\u{2066}\u{200b}\u{feff} \u{e0041}Größe 中"), "exit0 edoc Größe 中");
    }

    #[test]
    fn lines_that_a_guest_causes_grow_rare() {
        let rarely = Rarely::default();
        let logged: Vec<u64> = (0..1000).filter_map(|_| rarely.tick()).collect();
        assert_eq!(logged, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    }
}
