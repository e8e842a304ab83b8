//! An allocator in a file, together with the memory that it manages.
//!
//! Each run opens the file, lists the notes in it and adds one; every other run "crashes", and the
//! next one finds out. `cargo run --example persistent -- notes.bin`, a few times; without a file
//! name it shows four runs on a file that vanishes.

use llfree::persist::region_bytes;
use llfree::{FRAME_SIZE, FrameId, HUGE_SIZE, Order, Persistent, WriteBack};
use memmap2::MmapMut;
use rustix::fs::{FlockOperation, flock};
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::process::ExitCode;

/// 8 MiB of notes.
const HUGE_FRAMES: u32 = 4;
const REGION: usize = region_bytes(HUGE_FRAMES).expect("not zero");
/// The notes follow the allocator's region, page aligned.
const FRAMES: usize = REGION.next_multiple_of(FRAME_SIZE as usize);
const BYTES: u64 = FRAMES as u64 + HUGE_FRAMES as u64 * HUGE_SIZE;

/// A note is a frame that begins with these four bytes; its text follows.
const MARK: &[u8] = b"note";

fn main() -> ExitCode {
    match runs() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn runs() -> Result<(), Box<dyn Error>> {
    match std::env::args_os().nth(1) {
        Some(path) => {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            run(&file)
        }
        None => {
            let file = tempfile::tempfile()?;
            (0..4).try_for_each(|_| run(&file))
        }
    }
}

fn run(file: &File) -> Result<(), Box<dyn Error>> {
    // Only one process may have it open: the region cannot tell a dead user from a busy one.
    flock(file, FlockOperation::NonBlockingLockExclusive)?;
    match file.metadata()?.len() {
        0 => file.set_len(BYTES)?,
        BYTES => {}
        bytes => return Err(format!("the file has {bytes} bytes where {BYTES} belong: is it another's?").into()),
    }
    // SAFETY: the lock keeps others of this program away, and no other program knows the file.
    let mut map = unsafe { MmapMut::map_mut(file)? };
    let (region, frames) = map.split_at_mut(FRAMES);
    let region = &mut region[..REGION];

    // A file in the page cache: safe from crashes of this process, without any write-back.
    // What begins with zeros is new, or was left while it was created.
    let mut instance = if region.starts_with(&[0; 8]) {
        Persistent::create(region, HUGE_FRAMES, WriteBack::NONE)?
    } else {
        Persistent::open(region, WriteBack::NONE)?
    };
    let run = instance.generation();
    match instance.recovery() {
        None => println!("run {run}: the file is in order"),
        Some(recovery) => {
            // A note is owned once it has its mark (one that is freed would lose it first); whatever
            // else is allocated, a handle held back.
            let leaks = instance.recover_leaks(|frame, _order| note(frames, frame).starts_with(MARK));
            println!("run {run}: after a crash: {recovery:?}, {} frames were lost and found", leaks.total_frames());
        }
    }
    for frame in (0..frames.len() as u64 / FRAME_SIZE).map(FrameId) {
        if let Some(text) = note(frames, frame).strip_prefix(MARK) {
            let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
            println!("  frame {}: {}", frame.0, String::from_utf8_lossy(text));
        }
    }

    let tenant = instance.tenant();
    let mut cpu = tenant.cpu();
    let (frame, _) = cpu.alloc(Order::BASE)?.position();
    // The text first, the mark last: it makes the frame ours for the next run, too.
    let text = format!("written in run {run}\0");
    note(frames, frame)[MARK.len()..][..text.len()].copy_from_slice(text.as_bytes());
    note(frames, frame)[..MARK.len()].copy_from_slice(MARK);

    if run % 2 == 0 {
        println!("  and now it crashes, with the rest of a row in its handle");
        std::mem::forget(cpu);
    } else {
        drop(cpu);
        // Synced before and after, a close also outlives a power failure.
        file.sync_data()?;
        instance.close()?;
        file.sync_data()?;
    }
    Ok(())
}

fn note(frames: &mut [u8], frame: FrameId) -> &mut [u8] {
    &mut frames[frame.byte_offset() as usize..][..FRAME_SIZE as usize]
}
