//! Text for a terminal: error chains on one line, and nothing in it that moves a cursor.
//!
//! Everything that comes from a guest, its image or another process goes through [`printable`] on
//! its way to a terminal or a log.

use std::error::Error;

/// An error and all its causes on one line, joined by `: `, fit for a terminal.
#[must_use]
pub fn error_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    // A cause from elsewhere may bring line breaks of its own, and worse.
    printable(&line).split_whitespace().collect::<Vec<_>>().join(" ")
}

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
}
