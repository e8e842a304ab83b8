//! [`Rest`]: what is left of a huge frame that a handle emptied, frame by frame.
//!
//! A list and no bits: of rows that have one or two frames each, and which ones nobody could predict, the next frame would
//! have to be worked out from the one before.

use crate::row::ROW_FRAMES;
use crate::rows::ROWS;
use core::ops::Range;

/// Frames of one huge frame, 64 at most.
#[derive(Clone, Debug)]
pub(super) struct Rest {
    /// Where they lie in it. Two places more than they need: two are written at once.
    frames: [u16; ROW_FRAMES + 2],
    len: u8,
}

impl Rest {
    pub(super) const NOTHING: Self = Self { frames: [0; ROW_FRAMES + 2], len: 0 };

    #[inline]
    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) const fn len(&self) -> usize {
        self.len as usize
    }

    fn listed(&self) -> &[u16] {
        self.frames.get(..self.len()).unwrap_or(&[])
    }

    /// Adds some frames of a row, a bit each; what there is no room for is not added.
    #[inline]
    pub(super) fn push(&mut self, row: usize, bits: u64) {
        let mut bits = bits;
        // Two at a time, without a branch on whether there is a second.
        while bits != 0 {
            let second = bits & (bits - 1);
            let len = usize::from(self.len);
            if let Some(to) = self.frames.get_mut(len..len + 2) {
                let place = |bits: u64| (row * ROW_FRAMES) as u16 + bits.trailing_zeros() as u16;
                to.copy_from_slice(&[place(bits), place(second)]);
            }
            self.len = (self.len + 1 + u8::from(second != 0)).min(ROW_FRAMES as u8);
            bits = second & second.wrapping_sub(1);
        }
    }

    /// The last one.
    #[inline]
    pub(super) fn pop(&mut self) -> Option<u16> {
        let len = self.len.checked_sub(1)?;
        self.len = len;
        self.frames.get(usize::from(len)).copied()
    }

    /// All that lie in the row of the last one, and the row.
    pub(super) fn pop_row(&mut self) -> Option<(usize, u64)> {
        let row_of = |frame: u16| usize::from(frame) / ROW_FRAMES;
        let row = row_of(*self.listed().last()?);
        let (mut bits, mut len) = (0, 0);
        // Where others took some as well, a row may have been added to twice.
        for at in 0..self.len() {
            let frame = *self.frames.get(at)?;
            if row_of(frame) == row {
                bits |= 1 << (usize::from(frame) % ROW_FRAMES);
            } else {
                *self.frames.get_mut(len)? = frame;
                len += 1;
            }
        }
        self.len = len as u8;
        Some((row, bits))
    }

    /// Whether one of them lies in a stretch of the huge frame.
    pub(super) fn has_any(&self, stretch: &Range<usize>) -> bool {
        self.listed().iter().any(|frame| stretch.contains(&usize::from(*frame)))
    }

    /// Their rows.
    pub(super) fn rows(&self) -> [u64; ROWS] {
        let mut rows = [0; ROWS];
        for frame in self.listed() {
            if let Some(row) = rows.get_mut(usize::from(*frame) / ROW_FRAMES) {
                *row |= 1 << (usize::from(*frame) % ROW_FRAMES);
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_comes_out_once() {
        let rows = [0b1011, 0, 1 << 63, 0, 0, u64::MAX >> 10, 0, 0b11];
        let fill = || {
            let mut rest = Rest::NOTHING;
            rows.iter().enumerate().for_each(|(row, bits)| rest.push(row, *bits));
            rest
        };
        let mut rest = fill();
        assert_eq!((rest.len(), rest.rows()), (60, rows));
        assert!(rest.has_any(&(3..4)) && !rest.has_any(&(2..3)) && rest.has_any(&(128..512)));
        let mut seen = [0; ROWS];
        while let Some(frame) = rest.pop() {
            let (row, bit) = (usize::from(frame) / 64, 1 << (frame % 64));
            assert_eq!(seen[row] & bit, 0, "{frame}");
            seen[row] |= bit;
        }
        assert_eq!(seen, rows);
        let mut rest = fill();
        for row in [7, 5, 2, 0] {
            assert_eq!(rest.pop_row(), Some((row, rows[row])));
        }
        assert_eq!(rest.pop_row(), None);
    }

    #[test]
    fn nothing_is_left_of_a_row_that_was_added_to_twice() {
        let mut rest = Rest::NOTHING;
        (0..ROWS).for_each(|row| rest.push(row, 1));
        rest.push(3, 2);
        assert_eq!(rest.pop_row(), Some((3, 3)));
        assert!(rest.len() == ROWS - 1 && !rest.has_any(&(3 * ROW_FRAMES..4 * ROW_FRAMES)));
    }

    #[test]
    fn a_whole_row_fits_and_no_more() {
        let mut rest = Rest::NOTHING;
        rest.push(3, u64::MAX);
        assert_eq!((rest.len(), rest.rows()[3]), (64, u64::MAX));
        rest.push(4, 0b111);
        assert_eq!((rest.len(), rest.rows()[4]), (64, 0));
    }
}
