//! [`Keys`]: the keys in what a terminal sends. Pure and total: any bytes in, in any pieces, keys out.
//!
//! A reader of the sequences that any terminal may send is much more than three keys need, and one that fails on half a
//! sequence takes the screen with it: so this one knows only where a sequence ends.

/// Parameters that a sequence may have. What claims more is none, and must not swallow what is typed after it.
const LONGEST: u8 = 32;
/// Bytes of a mouse's click after the old sequence for one, which has no parameters to hold them.
const CLICK: u8 = 3;

/// What a key means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Key {
    Quit,
    Up,
    Down,
    Order,
    Reverse,
    Shrink,
    Grow,
}

impl Key {
    /// The meaning of a key that is one byte.
    fn of(byte: u8) -> Option<Self> {
        // Ctrl-C.
        const INTERRUPT: u8 = 0x03;
        Some(match byte {
            b'q' | b'Q' | INTERRUPT => Self::Quit,
            b'k' => Self::Up,
            b'j' => Self::Down,
            b'o' => Self::Order,
            b'r' => Self::Reverse,
            b's' | b'-' => Self::Shrink,
            b'g' | b'+' => Self::Grow,
            _ => return None,
        })
    }
}

/// How far a sequence has come. It goes on in the next read, wherever the last one ended.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum At {
    #[default]
    Start,
    /// After Escape, the key or the first byte of a sequence.
    Escape,
    /// After Escape and `[` or `O`, and this many parameters.
    Parameters(u8),
    /// In a click, with this many bytes to come.
    Click(u8),
}

/// Finds the keys; what means nothing here is skipped.
#[derive(Default, Debug)]
pub(super) struct Keys {
    at: At,
}

impl Keys {
    /// Takes what was typed, and gives the keys that it completes.
    pub(super) fn feed(&mut self, typed: &[u8]) -> Vec<Key> {
        typed.iter().filter_map(|byte| self.take(*byte)).collect()
    }

    fn take(&mut self, byte: u8) -> Option<Key> {
        const ESCAPE: u8 = 0x1b;
        let at = std::mem::take(&mut self.at);
        // Wherever it comes, Ctrl-C is itself and Escape begins anew.
        if byte == ESCAPE {
            self.at = At::Escape;
            return None;
        }
        match (at, byte) {
            (At::Escape, b'[' | b'O') => self.at = At::Parameters(0),
            (At::Parameters(count @ ..LONGEST), b' '..=b'?') => self.at = At::Parameters(count + 1),
            (At::Parameters(0), b'A') => return Some(Key::Up),
            (At::Parameters(0), b'B') => return Some(Key::Down),
            (At::Parameters(0), b'M') => self.at = At::Click(CLICK),
            // Its end.
            (At::Parameters(_), b'@'..=b'~') => {}
            (At::Click(count), b' '..) => self.at = if count > 1 { At::Click(count - 1) } else { At::Start },
            // A key of its own, also after an Escape that began nothing and in the middle of what is no sequence.
            _ => return Key::of(byte),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(typed: &[u8]) -> Vec<Key> {
        Keys::default().feed(typed)
    }

    #[test]
    fn keys_are_told_from_what_means_nothing() {
        let all = [Key::Up, Key::Down, Key::Order, Key::Reverse, Key::Shrink, Key::Grow, Key::Quit];
        assert_eq!(keys(b"\x1b[A\x1b[Borsg\x03"), all);
        assert_eq!(keys(b"\x1bOA\x1bOBkj-+Q"), [&all[..2], &all[..2], &all[4..]].concat());
        for nothing in [&b"x\x1b[5~\x1b[1;5C\0\xff\xc3\xa9\x1a"[..], b"\x1b", b"\x1b[", b"\x1b[<0;1;1M", b"\x1b[1;5A"] {
            assert_eq!(keys(nothing), [], "{nothing:?}");
        }
    }

    #[test]
    fn a_sequence_that_is_odd_or_cut_off_fails_nothing_and_the_key_after_it_counts() {
        for odd in [
            &b"\x1b"[..],
            b"\x1b[M!!!",
            b"\x1b[Msgq",
            b"\x1b[M\xff\xff\xff",
            b"\x1b[5~",
            b"\x1b[<0;1;1m",
            b"\x1b[999~",
            b"\x1b[99999999999999999999999~",
            b"\x1b[;;;~",
            b"\x1b[[A",
            b"\x1b[200~\x1b[201~",
            b"\x1b[-+-+R",
            // Cut off by what cannot be in one.
            b"\x1b[<0;1\x7f",
            b"\x1b[M!\x0d",
            b"\x1bO\xc3",
        ] {
            assert_eq!(keys(&[odd, b"g"].concat()), [Key::Grow], "{odd:?}");
        }
        // The next read has the rest.
        let mut halves = Keys::default();
        assert_eq!(
            [&b"\x1b"[..], b"[", b"5", b"~\x1b[", b"B\x1b[<0;1", b";1Ms"].map(|half| halves.feed(half)).concat(),
            [Key::Down, Key::Shrink]
        );
    }

    #[test]
    fn nothing_keeps_a_person_from_leaving() {
        let endless = [&b"\x1b["[..], &[b'1'; 1000]].concat();
        assert_eq!(keys(&[&endless[..], b"q"].concat()), [Key::Quit]);
        for begun in [&b"\x1b"[..], b"\x1b[", b"\x1bO", b"\x1b[<0;1", b"\x1b[M", b"\x1b[M!", &endless] {
            assert_eq!(keys(&[begun, b"\x03"].concat()), [Key::Quit], "{begun:?}");
        }
    }

    /// Any bytes, most of them such as sequences are made of.
    fn typed() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![proptest::sample::select(&b"\x1b\x1b\x1b[[OM<;019~ABq\x03s+-"[..]), any::<u8>()];
        proptest::collection::vec(byte, 0..120)
    }

    proptest! {
        #[test]
        fn any_bytes_are_the_same_keys_in_any_pieces(typed in typed(), cuts in proptest::collection::vec(0_usize..20, 0..20)) {
            let (mut pieces, mut rest, mut found) = (Keys::default(), &typed[..], Vec::new());
            for cut in cuts {
                let (piece, others) = rest.split_at(cut.min(rest.len()));
                found.extend(pieces.feed(piece));
                rest = others;
            }
            found.extend(pieces.feed(rest));
            prop_assert_eq!(found, keys(&typed));
        }
    }
}
