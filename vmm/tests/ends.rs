//! Real machines on /dev/kvm with two vCPUs that come to an end at nearly the same time: the reason that is given is
//! the one that makes sense, whichever thread of the host was first.

use guest_abi::Call;
use guest_abi::header::{ABI_VERSION, HEADER_BYTES};
use llfree_base::units::Bytes;
use llfree_monitor::memory::Backing;
use std::sync::Arc;
use std::time::Duration;
use test_machine::image::{self, Image as Bytecode};
use test_machine::{DEADLINE, MIB, need_kvm};
use vmm::boot::Image;
use vmm::exit::ExitReason;
use vmm::vm::{Vm, VmConfig};

/// A word in the first vCPU's mailbox that no call uses: what one vCPU tells the other.
const FLAG: u32 = HEADER_BYTES as u32 + 20 * 8;

/// The first vCPU says that it is about to end, waits for that number of turns of a loop, and makes the exit call. The second
/// one fails as soon as it hears of that.
fn one_exits_and_one_fails(turns: u32) -> Vec<u8> {
    let hello = image::call(Call::Hello, &[ABI_VERSION.into()]);
    let exit = image::call(Call::Exit, &[0]);
    // mov dword [rdi + FLAG], 1
    let mut say = vec![0xc7, 0x87];
    say.extend(FLAG.to_le_bytes());
    say.extend(1_u32.to_le_bytes());
    // mov ecx, turns; again: pause; dec ecx; jnz again
    let mut delay = vec![0xb9];
    delay.extend((turns + 1).to_le_bytes());
    delay.extend([0xf3, 0x90, 0xff, 0xc9, 0x75, 0xfa]);
    let first = [hello, say, delay, exit, image::LOOP.to_vec()].concat();
    // again: pause; cmp dword [rdi + FLAG], 0; je again; ud2
    let mut second = vec![0xf3, 0x90, 0x83, 0xbf];
    second.extend(FLAG.to_le_bytes());
    second.extend([0, 0x74, 0xf5]);
    second.extend(image::UD2);
    // test esi, esi; jnz second
    let mut code = vec![0x85, 0xf6, 0x0f, 0x85];
    code.extend((first.len() as u32).to_le_bytes());
    [code, first, second].concat()
}

/// How such a guest ended, if it took some time until somebody stopped it, and how many calls its first vCPU made.
fn end_after(turns: u32, until_stopped: Duration) -> (ExitReason, u64) {
    let image = Image::parse("two ends", Bytecode::new(&[&one_exits_and_one_fails(turns)]).bytes()).expect("an image");
    let kernel = Some(Arc::new(image));
    let vm = Vm::launch(VmConfig { kernel, ..VmConfig::new(Bytes(16 * MIB), 2, Backing::Anon) });
    let vm = vm.unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    vm.wait_for_end(DEADLINE).expect("one of them ends it");
    std::thread::sleep(until_stopped);
    vm.stop();
    (vm.ended().expect("it did"), vm.vcpus()[0].counters().rings.calls.get())
}

#[test]
fn a_guest_that_asked_for_its_end_has_not_crashed_whatever_another_vcpu_does_meanwhile() {
    need_kvm!();
    // From an exit call that comes first to one that comes too late.
    for turns in (0..16).map(|round| 8 << round) {
        // Hello, and the exit call unless it was stopped before that.
        match end_after(turns, Duration::from_millis(10)) {
            (ExitReason::Exited(0), 2) | (ExitReason::Exception { .. }, 1) => {}
            (end, calls) => panic!("{turns} turns, {calls} calls: {end:?}"),
        }
    }
}

#[test]
fn a_guest_that_crashed_is_not_let_run_on_to_a_good_end() {
    need_kvm!();
    let (end, calls) = end_after(1 << 20, Duration::from_millis(200));
    assert!(matches!(end, ExitReason::Exception { .. }) && calls == 1, "{calls} calls: {end:?}");
}
