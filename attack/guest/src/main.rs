//! A guest that does what no guest should: it writes over the words that it shares with its host, touches memory
//! that it does not have, installs what is not its own, and rings for calls that there are none of, on all vCPUs
//! at once and for ever. It leaves alone what would end it: its image, its stacks, and the calls that say so.
#![no_std]
#![no_main]

#[path = "../../../images/guest-template/src/runtime.rs"]
#[allow(dead_code, reason = "the template shows more than this guest needs")]
mod runtime;

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use guest_abi::Call;
use guest_abi::mailbox::WORDS;
use runtime::Vcpu;

/// Huge frames from the first on that are left alone: the image is there, and what is called free is taken.
const IMAGE_FRAMES: u64 = 8;
/// Where RAM begins that is not the image's.
const BEHIND_IMAGE: u64 = IMAGE_FRAMES << 21;
/// Entries that look right.
const LIKELY: [u16; 8] = [0x4200, 0x0200, 0xc000, 0x2000, 0x6000, 0x0000, 0x01ff, 0xffff];

/// xorshift64*, seeded by the clock.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8) % end.max(1)
    }
}

fn main(vcpu: &mut Vcpu) -> u32 {
    // SAFETY: it reads the time-stamp counter.
    let clock = unsafe { core::arch::x86_64::_rdtsc() };
    let mut random = Random(clock << 1 | 1);
    loop {
        match random.below(16) {
            0..3 => scribble(vcpu, &mut random),
            3..6 => lie(vcpu, &mut random),
            6..10 => touch(vcpu, &mut random),
            10..14 => install(vcpu, &mut random),
            14 => call(vcpu, &mut random),
            _ => ring(vcpu, &mut random),
        }
    }
}

/// Any byte of the shared region, but those that call the frames of this guest's image its own.
fn scribble(vcpu: &Vcpu, random: &mut Random) {
    let offset = random.below(vcpu.layout.total) as usize;
    let image = vcpu.layout.entries as usize..vcpu.layout.entries as usize + 2 * IMAGE_FRAMES as usize;
    if image.contains(&offset) {
        return;
    }
    // SAFETY: in the region; all parties access it atomically, and this vCPU's own words may have any value.
    unsafe { AtomicU8::from_ptr(vcpu.region.add(offset)) }.store(random.below(256) as u8, Ordering::Relaxed);
}

/// An entry, with a value that looks right.
fn lie(vcpu: &Vcpu, random: &mut Random) {
    let index = (IMAGE_FRAMES + random.below(u64::from(vcpu.layout.huge_frames) - IMAGE_FRAMES)) as usize;
    // SAFETY: an entry of the table in the region; as above.
    let entry = unsafe { AtomicU16::from_ptr(vcpu.region.add(vcpu.layout.entries as usize).cast::<u16>().add(index)) };
    entry.store(LIKELY[random.below(8) as usize], Ordering::Relaxed);
}

/// A word of memory that this guest may have, or not.
fn touch(vcpu: &Vcpu, random: &mut Random) {
    let end = u64::from(vcpu.layout.huge_frames) << 21;
    let address = vcpu.header.ram_base + (BEHIND_IMAGE + random.below(end - BEHIND_IMAGE)) / 8 * 8;
    // SAFETY: RAM, which is mapped; whoever else is at work there has it coming.
    let word = unsafe { AtomicU64::from_ptr(with_exposed_provenance_mut(address as usize)) };
    if random.below(2) == 0 {
        word.store(address, Ordering::Relaxed);
    } else {
        core::hint::black_box(word.load(Ordering::Relaxed));
    }
}

/// Any range, in RAM or not.
fn install(vcpu: &mut Vcpu, random: &mut Random) {
    let first = random.below(u64::from(vcpu.layout.huge_frames) + 8);
    request(vcpu, [first, random.below(40)], random);
    vcpu.ring(Call::Install as u64);
}

/// A call that goes on, with any words.
fn call(vcpu: &mut Vcpu, random: &mut Random) {
    let calls = [Call::Done, Call::Done, Call::Install, Call::Log];
    request(vcpu, [random.below(u64::MAX), random.below(u64::MAX)], random);
    vcpu.ring(calls[random.below(4) as usize] as u64);
}

/// Any place in the doorbell's page, but where this guest would end or sleep.
fn ring(vcpu: &mut Vcpu, random: &mut Random) {
    let offset = random.below(1023) * 4;
    // A Hello with another version is one of these.
    let ends = [Call::Hello, Call::Wait, Call::Panic, Call::Exit, Call::Exception];
    if ends.iter().all(|call| offset != *call as u64) {
        vcpu.ring(offset);
    }
}

fn request(vcpu: &Vcpu, first: [u64; 2], random: &mut Random) {
    for index in 0..WORDS {
        let word = first.get(index).copied().unwrap_or_else(|| random.below(u64::MAX));
        vcpu.word(index).store(word, Ordering::Relaxed);
    }
}
