//! The host over words that somebody else writes as he likes: whatever they say, each operation
//! ends, does not panic, and moves R exactly as the operation's own contract says.

use llfree::{Host, Reclaim, Refused, Residency};
use shared_layout::{HugeEntry, HugeId};
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

/// A byte for the size of the table, three a huge frame (its entry and its R), then four an
/// operation: what, which huge frame, and the word that the guest writes before it.
pub(crate) fn run_bytes(bytes: &[u8]) {
    let Some((size, rest)) = bytes.split_first() else { return };
    let size = usize::from(*size) % 64 + 1;
    let (table, ops) = rest.split_at(rest.len().min(size * 3));
    let word = |i: usize| table.get(i * 3..i * 3 + 3).map_or([0; 3], |w| [w[0], w[1], w[2]]);
    let entries: Vec<_> = (0..size).map(|i| AtomicU16::new(u16::from_le_bytes([word(i)[0], word(i)[1]]))).collect();
    // R is the host's own: any state, but no claim is open.
    let mut model: Vec<_> = (0..size)
        .map(|i| [Residency::Evicted, Residency::Installed, Residency::Held][usize::from(word(i)[2]) % 3])
        .collect();
    let residency: Vec<_> = model.iter().map(|r| AtomicU8::new(*r as u8)).collect();
    let host = Host::new(&entries, &residency).expect("lengths fit");
    for op in ops.chunks_exact(4) {
        let huge = HugeId(u32::from(op[1]) % (size as u32 + 1));
        let written = u16::from_le_bytes([op[2], op[3]]);
        if op[0] & 0x80 != 0 && huge.index() < size {
            entries[huge.index()].store(written, Ordering::Relaxed);
        }
        step(&host, &entries, &mut model, op[0] % 16, huge, written);
        for (i, r) in model.iter().enumerate() {
            assert_eq!(host.residency(HugeId(i as u32)), Some(*r), "R moved by itself");
        }
    }
}

fn step(host: &Host<'_>, entries: &[AtomicU16], model: &mut [Residency], op: u8, huge: HugeId, written: u16) {
    let census = host.census();
    let count = |r| model.iter().filter(|m| **m == r).count() as u64;
    assert_eq!(census.installed, count(Residency::Installed));
    assert_eq!(census.held, count(Residency::Held));
    assert_eq!(census.evicted, count(Residency::Evicted));
    assert!(census.used_frames + census.fragmented_frames <= model.len() as u64 * 512);
    assert_eq!(host.scan(huge).count(), model.len());
    if census.corrupt > 0 {
        let violation = host.validate().expect_err("the census saw it");
        assert!(!violation.to_string().is_empty());
    }
    let Some(claim) = host.claim(huge) else {
        assert_eq!(huge.index(), model.len(), "only a frame beyond the table cannot be claimed");
        return;
    };
    assert!(host.claim(huge).is_none(), "one claim at a time");
    let entry = &entries[huge.index()];
    // What the guest writes while the host is between its steps.
    let interfere = || {
        if op & 8 != 0 {
            entry.store(written, Ordering::Relaxed);
        }
    };
    let state = &mut model[huge.index()];
    let before = HugeEntry::from_bits(entry.load(Ordering::Relaxed));
    match op & 7 {
        how @ 0..4 => {
            let (how, settled) =
                if how & 1 == 0 { (Reclaim::Soft, Residency::Evicted) } else { (Reclaim::Hard, Residency::Held) };
            match claim.reclaim(how) {
                Ok(reclaimed) => {
                    assert!(before.is_all_free(), "{before:?} is not free");
                    assert!(*state != Residency::Held);
                    assert_eq!(reclaimed.has_memory(), *state == Residency::Installed);
                    interfere();
                    if op & 2 == 0 {
                        reclaimed.done();
                        *state = settled;
                    } else {
                        drop(reclaimed);
                        if op & 8 == 0 && *state == Residency::Installed {
                            let now = HugeEntry::from_bits(entry.load(Ordering::Relaxed));
                            assert_eq!(now, HugeEntry::FREE_INSTALLED, "undone");
                        }
                    }
                }
                Err(Refused::NotFree(seen)) => assert_eq!(seen, before),
                Err(Refused::Residency(r)) => assert_eq!(r, *state),
                Err(Refused::Contended) => panic!("nobody else is at work"),
            }
        }
        4 | 5 => {
            let released = claim.release();
            assert_eq!(released.is_ok(), *state == Residency::Held);
            if let Ok(clean) = released {
                assert_eq!(clean, before.release().is_some());
                *state = Residency::Evicted;
            }
        }
        done => match claim.install() {
            Ok(installing) => {
                assert_eq!(installing.needs_memory(), *state == Residency::Evicted);
                interfere();
                if done == 6 {
                    installing.done();
                    *state = Residency::Installed;
                    let now = HugeEntry::from_bits(entry.load(Ordering::Relaxed));
                    assert!(!now.is_evicted() || !now.is_valid() || now.is_held(), "installed, and {now:?}");
                }
            }
            Err(refused) => assert_eq!((refused, *state), (Refused::Residency(Residency::Held), Residency::Held)),
        },
    }
}
