//! Bytes that begin at a cache line, as a mapping does.

#[derive(Clone)]
pub(crate) struct Memory(Vec<Line>);

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "only its bytes are read")] [u8; 64]);

impl Memory {
    /// At least this many, and a line more, all zero.
    pub(crate) fn new(bytes: usize) -> Self {
        Self(vec![Line([0; 64]); bytes.div_ceil(64) + 1])
    }

    /// The first `len` of them.
    pub(crate) fn bytes(&mut self, len: usize) -> &mut [u8] {
        let all = self.0.len() * 64;
        // SAFETY: lines are bytes without padding, borrowed as exclusively as the vector.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u8>(), all) };
        &mut bytes[..len]
    }
}
