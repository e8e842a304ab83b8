//! Operations on a table out of the bytes that a fuzzer makes: any bytes are some operations, and a
//! small change of the bytes is a small change of them.

use crate::ops::{self, CPUS, Op, SIZES};
use llfree::Class;
use shared_layout::Order;

/// Runs what a fuzzer made: a byte for the size of the table, then four an operation.
pub(crate) fn run(bytes: &[u8]) {
    let Some((size, ops)) = bytes.split_first() else { return };
    let size = SIZES[usize::from(*size) % SIZES.len()];
    let ops = ops.chunks_exact(4).map(|op| decode([op[0], op[1], op[2], op[3]], size));
    ops::run(size, ops);
}

/// Four bytes: what, and three arguments.
fn decode([kind, a, b, c]: [u8; 4], size: usize) -> Op {
    let order = |byte: u8| Order::new([0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10][usize::from(byte & 15)]);
    let order = |byte: u8| order(byte).unwrap_or(Order::BASE);
    let cpu = usize::from(a) % (CPUS + 1);
    let huge = u32::from(a) % (size as u32 + 1);
    let frame = u64::from(huge) * 512 + u64::from(b) * 2 + u64::from(c >> 7);
    match kind % 32 {
        0..12 => {
            let class = Class::new(c % 7).filter(|_| c & 0x80 != 0).unwrap_or(Class::of(order(b)));
            Op::Alloc { cpu, order: order(b), class }
        }
        12 | 13 => {
            let order = order(c);
            // Aligned most of the time.
            Op::AllocAt { frame: if c & 0x70 == 0 { frame } else { frame & !(order.frames() - 1) }, order }
        }
        14..22 => Op::Free { cpu, pick: usize::from(u16::from_le_bytes([b, c])) },
        22 => Op::FreeRaw { cpu: usize::from(c >> 4) % (CPUS + 1), frame, order: order(c) },
        23 => Op::Drain { cpu },
        24..27 => Op::Reclaim { huge, hard: b & 1 != 0, fails: b & 0x0e == 0 },
        27 => Op::Release { huge, epoch: b & 1 != 0 },
        28 | 29 => Op::Install { huge, fails: b & 7 == 0 },
        30 => Op::Recount,
        _ => Op::Scribble { word: usize::from(a), bits: u64::from_le_bytes([b, c, b, c, c, b, c, b]) },
    }
}
