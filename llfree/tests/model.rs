//! The allocator and its host against a model: random operations, made smaller when they fail.

use crate::ops::{CPUS, Op, SIZES};
use crate::{hostile, ops};
use llfree::Class;
use proptest::prelude::*;
use shared_layout::Order;

fn order() -> impl Strategy<Value = Order> {
    // All orders, and often the ones that exhaust a table or need it whole.
    prop_oneof![4 => 0u8..=10, 3 => Just(0u8), 2 => 9u8..=10].prop_map(|o| Order::new(o).expect("in range"))
}

fn op(size: usize) -> impl Strategy<Value = Op> {
    let frame = 0..(size as u64 + 1) * 512;
    let aligned = (frame, order(), 0u8..8)
        .prop_map(|(frame, order, odd)| (if odd == 0 { frame } else { frame & !(order.frames() - 1) }, order));
    let aligned = aligned.boxed();
    let huge = 0..size as u32 + 1;
    // One more than there are: without a handle.
    let cpu = 0..CPUS + 1;
    let class = (0u8..7).prop_map(|class| Class::new(class).expect("in range"));
    let fails = (0u8..6).prop_map(|n| n == 0);
    prop_oneof![
        6 => (cpu.clone(), order()).prop_map(|(cpu, order)| Op::Alloc { cpu, order, class: Class::of(order) }),
        3 => (cpu.clone(), order(), class).prop_map(|(cpu, order, class)| Op::Alloc { cpu, order, class }),
        2 => aligned.clone().prop_map(|(frame, order)| Op::AllocAt { frame, order }),
        7 => (cpu.clone(), any::<usize>()).prop_map(|(cpu, pick)| Op::Free { cpu, pick }),
        1 => (cpu.clone(), aligned).prop_map(|(cpu, (frame, order))| Op::FreeRaw { cpu, frame, order }),
        1 => cpu.prop_map(|cpu| Op::Drain { cpu }),
        3 => (huge.clone(), any::<bool>(), fails.clone()).prop_map(|(huge, hard, fails)| Op::Reclaim { huge, hard, fails }),
        2 => (huge.clone(), any::<bool>()).prop_map(|(huge, epoch)| Op::Release { huge, epoch }),
        2 => (huge, fails).prop_map(|(huge, fails)| Op::Install { huge, fails }),
        1 => Just(Op::Recount),
        1 => (any::<usize>(), any::<u64>()).prop_map(|(word, bits)| Op::Scribble { word, bits }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn both_sides_agree_with_the_model(
        (size, ops) in prop::sample::select(&SIZES[..])
            .prop_flat_map(|size| (Just(size), prop::collection::vec(op(size), 1..400))),
    ) {
        ops::run(size, ops);
    }

    #[test]
    fn the_host_is_total_on_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        hostile::run_bytes(&bytes);
    }
}
