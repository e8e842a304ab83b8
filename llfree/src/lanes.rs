//! [`look`] and [`bits`]: words of 16 bits, entries or hints, eight at a time.
//!
//! A search is looks at entries and hints, and a compiler loads atomics one by one: 32 loads and 32 stores for one cache line.
//! A processor of x86-64 with its usual registers takes four of each, and makes a mask of 16 comparisons in two
//! instructions. Elsewhere, and in the programs of checkers, the same is said word by word.

use crate::sync::AtomicU16;

/// Words that [`look`] reads at a time, and flags that [`bits`] gathers: what is asked for is a multiple of them.
const LANES: usize = 8;

/// So many words, each as by a relaxed load.
#[inline]
pub(crate) fn look<const N: usize>(words: &[AtomicU16; N]) -> [u16; N] {
    const { assert!(N.is_multiple_of(LANES)) };
    imp::look(words)
}

/// A bit for each word that `likes` says yes to, the first word's the lowest; at most 64.
#[inline]
pub(crate) fn bits<T: Copy, const N: usize>(words: &[T; N], likes: impl Fn(T) -> bool) -> u64 {
    const { assert!(N.is_multiple_of(2 * LANES) && N <= u64::BITS as usize) };
    // A loop: `map` is a call for each word.
    let mut flags = [0; N];
    flags.iter_mut().zip(words).for_each(|(flag, word)| *flag = -i16::from(likes(*word)));
    imp::bits(&flags)
}

#[cfg(all(target_arch = "x86_64", target_feature = "sse2", not(any(loom, shuttle, stepping, lines, miri))))]
use eight as imp;
#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2", not(any(loom, shuttle, stepping, lines, miri)))))]
use single as imp;

#[cfg(all(target_arch = "x86_64", target_feature = "sse2", not(any(loom, shuttle, stepping, lines, miri))))]
mod eight {
    use super::{AtomicU16, LANES};
    use core::arch::asm;
    use core::arch::x86_64::{__m128i, _mm_movemask_epi8, _mm_packs_epi16, _mm_set_epi16};

    #[inline]
    pub(super) fn look<const N: usize>(words: &[AtomicU16; N]) -> [u16; N] {
        let mut seen = [0; N];
        for (from, to) in words.as_chunks::<LANES>().0.iter().zip(seen.as_chunks_mut::<LANES>().0) {
            let eight: __m128i;
            // SAFETY: it reads the eight words of `from`, which others may change meanwhile, and nothing else. To the compiler
            // that is eight relaxed loads in some order. Each word is whole: processors tear such a load between cache lines, if
            // at all, and no word lies across two. No promise of theirs says so of loads that are not aligned.
            unsafe {
                asm!(
                    "movdqu {eight}, xmmword ptr [{from}]",
                    from = in(reg) from.as_ptr(),
                    eight = lateout(xmm_reg) eight,
                    options(nostack, readonly, preserves_flags),
                );
            }
            // SAFETY: both are 16 bytes of which any will do.
            *to = unsafe { core::mem::transmute::<__m128i, [u16; LANES]>(eight) };
        }
        seen
    }

    /// Of flags that are 0 or -1.
    #[inline]
    pub(super) fn bits(flags: &[i16]) -> u64 {
        let (sixteens, _) = flags.as_chunks::<{ 2 * LANES }>();
        sixteens.iter().enumerate().fold(0, |all, (index, of)| all | u64::from(mask(of)) << (2 * LANES * index))
    }

    #[inline]
    fn mask(flags: &[i16; 2 * LANES]) -> u16 {
        let [a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7] = *flags;
        // SAFETY: the target has SSE2, or this would not be compiled.
        unsafe {
            let first = _mm_set_epi16(a7, a6, a5, a4, a3, a2, a1, a0);
            let second = _mm_set_epi16(b7, b6, b5, b4, b3, b2, b1, b0);
            _mm_movemask_epi8(_mm_packs_epi16(first, second)) as u16
        }
    }
}

/// Word by word.
#[cfg(any(
    test,
    not(all(target_arch = "x86_64", target_feature = "sse2", not(any(loom, shuttle, stepping, lines, miri))))
))]
mod single {
    use super::{AtomicU16, LANES};
    use crate::sync::Ordering;

    #[inline]
    pub(super) fn look<const N: usize>(words: &[AtomicU16; N]) -> [u16; N] {
        core::array::from_fn(|index| words[index].load(Ordering::Relaxed))
    }

    /// Of flags that are 0 or -1. Without a branch: the compiler makes several bits at once.
    #[inline]
    pub(super) fn bits(flags: &[i16]) -> u64 {
        /// Gathers the lowest bit of each byte.
        const GATHER: u64 = 0x0102_0408_1020_4080;
        let (eights, _) = flags.as_chunks::<LANES>();
        let bits =
            |eight: &[i16; LANES]| u64::from_le_bytes(eight.map(|flag| (flag & 1) as u8)).wrapping_mul(GATHER) >> 56;
        eights.iter().enumerate().fold(0, |all, (index, eight)| all | bits(eight) << (LANES * index))
    }
}

#[cfg(all(test, not(any(loom, shuttle, stepping))))]
mod tests {
    use super::*;

    #[test]
    fn a_look_sees_each_word_in_its_place() {
        let words: [AtomicU16; 64] = core::array::from_fn(|index| AtomicU16::new(index as u16 * 1021));
        assert_eq!(look(&words), core::array::from_fn(|index| index as u16 * 1021));
        // Wherever they begin.
        let some: &[AtomicU16; 32] = words[3..].first_chunk().expect("longer");
        assert_eq!(look(some), core::array::from_fn(|index| (index as u16 + 3) * 1021));
    }

    #[test]
    fn word_by_word_is_the_same() {
        let words: [AtomicU16; 64] = core::array::from_fn(|index| AtomicU16::new((index as u16).wrapping_mul(0x9e37)));
        assert_eq!(single::look(&words), look(&words));
        for bit in 0..16 {
            let flags = look(&words).map(|word| -((word >> bit & 1) as i16));
            assert_eq!(single::bits(&flags), bits(&flags, |flag| flag != 0), "bit {bit}");
        }
    }

    #[test]
    fn each_word_that_is_liked_has_its_bit() {
        for liked in [0, 1, 1 << 63, 0xa5c3_1f08_0ff0_8001, u64::MAX] {
            let words: [u64; 64] = core::array::from_fn(|index| liked >> index & 1);
            assert_eq!(bits(&words, |word| word == 1), liked);
            let half: &[u64; 32] = words.first_chunk().expect("longer");
            assert_eq!(bits(half, |word| word == 0), u64::from(!liked as u32));
        }
    }
}
