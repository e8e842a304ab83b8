//! [`Escape`]: finds the keys that are for us in what is typed. Pure: bytes in, bytes out.

/// Ctrl-A, as a terminal sends it.
pub const PREFIX: u8 = 0x01;

/// Whether the last key was Ctrl-A.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Escape {
    armed: bool,
}

/// What the keys asked for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Asked {
    /// Ctrl-A X. What was typed after it is for nobody.
    pub leave: bool,
    /// Ctrl-A H.
    pub help: bool,
}

impl Escape {
    /// Takes what was typed, adds what is the guest's to `to_guest`, and says what else was asked.
    /// Ctrl-A with a key that means nothing to us goes to the guest with that key, as typed.
    pub fn feed(&mut self, typed: &[u8], to_guest: &mut Vec<u8>) -> Asked {
        let mut asked = Asked::default();
        for key in typed {
            if !std::mem::take(&mut self.armed) {
                self.armed = *key == PREFIX;
                if !self.armed {
                    to_guest.push(*key);
                }
                continue;
            }
            match key {
                b'x' | b'X' => {
                    asked.leave = true;
                    return asked;
                }
                b'h' | b'H' => asked.help = true,
                b'a' | b'A' | &PREFIX => to_guest.push(PREFIX),
                other => to_guest.extend([PREFIX, *other]),
            }
        }
        asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the guest gets and what is asked, typed at once and key by key.
    #[track_caller]
    fn check(typed: &[u8], guest: &[u8], leave: bool, help: bool) {
        let mut at_once = Vec::new();
        assert_eq!(Escape::default().feed(typed, &mut at_once), Asked { leave, help });
        assert_eq!(at_once, guest);
        let (mut escape, mut by_key, mut asked) = (Escape::default(), Vec::new(), Asked::default());
        for key in typed.chunks(1) {
            let now = escape.feed(key, &mut by_key);
            asked.help |= now.help;
            if now.leave {
                asked.leave = true;
                break;
            }
        }
        assert_eq!((by_key, asked), (guest.to_vec(), Asked { leave, help }));
    }

    #[test]
    fn only_ctrl_a_is_special() {
        let all: Vec<u8> = (0..=255).filter(|key| *key != PREFIX).collect();
        check(&all, &all, false, false);
        check(b"xXhHaA\x03\x1a\x1b[A", b"xXhHaA\x03\x1a\x1b[A", false, false);
    }

    #[test]
    fn ctrl_a_x_leaves_and_the_rest_is_for_nobody() {
        check(b"ls\n\x01xrm\n", b"ls\n", true, false);
        check(b"\x01X", b"", true, false);
    }

    #[test]
    fn ctrl_a_twice_is_one_ctrl_a() {
        for second in [b"\x01\x01", b"\x01a", b"\x01A"] {
            check(second, b"\x01", false, false);
        }
        check(b"\x01\x01x", b"\x01x", false, false);
        check(b"\x01\x01\x01x", b"\x01", true, false);
    }

    #[test]
    fn ctrl_a_h_helps() {
        check(b"a\x01hb\x01H", b"ab", false, true);
    }

    #[test]
    fn ctrl_a_and_any_other_key_reach_the_guest() {
        check(b"\x01e\x01\x1b", b"\x01e\x01\x1b", false, false);
        check(b"a\x01", b"a", false, false);
    }
}
