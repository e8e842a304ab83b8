//! [`GuestView`]: what a guest says about its own memory, and why, judging by that, a resize fell short.
//!
//! A guest that shares its table says so there, up to date at any moment. Linux says so in the statistics
//! of its balloon, now and then; through virtio-mem it says nothing. What is unknown or too old is `None`:
//! never a zero, never the last guess. Pure: reports in, numbers and sentences out.

use llfree::Census;
use llfree_base::units::Bytes;
use llfree_control::report::{BalloonStatus, ElasticStatus, GuestSays, GuestStatsReport, MemStatus};
use shared_layout::{FRAME_SIZE, HUGE_SIZE};

/// What a guest says about its memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestView {
    /// The source of the numbers.
    pub says: GuestSays,
    /// Allocated memory.
    pub used: Option<u64>,
    /// Free memory.
    pub free: Option<u64>,
    /// Free memory in huge frames that are not entirely free.
    pub fragmented: Option<u64>,
    /// Memory that a shrink could take right now.
    pub reclaimable: Option<u64>,
}

impl GuestView {
    /// What the shared table says; `given_away` is what a device's driver gave to the host, which the
    /// table counts as used.
    #[must_use]
    pub fn of_table(census: &Census, given_away: u64) -> Self {
        let whole = (census.free_installed + census.free_evicted) * HUGE_SIZE;
        let fragmented = census.fragmented_frames * FRAME_SIZE;
        // Huge frame 0 belongs to nobody: its entry keeps the guest from using it.
        let used = (census.used_frames * FRAME_SIZE).saturating_sub(HUGE_SIZE).saturating_sub(given_away);
        Self {
            says: GuestSays::Table,
            used: Some(used),
            free: Some(whole.saturating_add(fragmented)),
            fragmented: Some(fragmented),
            reclaimable: Some(whole),
        }
    }

    /// What a table of whole huge frames says, and what the guest says of the others.
    #[must_use]
    pub fn of_huge_frames(census: &Census, fragmented: u64) -> Self {
        let whole = (census.free_installed + census.free_evicted) * HUGE_SIZE;
        // It is up to a second old.
        let fragmented = fragmented.min(census.used_frames * FRAME_SIZE);
        Self {
            says: GuestSays::Table,
            used: Some(census.used_frames * FRAME_SIZE - fragmented),
            free: Some(whole.saturating_add(fragmented)),
            fragmented: Some(fragmented),
            reclaimable: Some(whole),
        }
    }

    /// What the statistics of a balloon say, while they are fresh.
    #[must_use]
    pub fn of_statistics(elastic: &ElasticStatus) -> Self {
        let Some((balloon, stats)) = fresh(elastic) else {
            return Self { says: GuestSays::Nowhere, used: None, free: None, fragmented: None, reclaimable: None };
        };
        // Linux subtracts what it gave away from its total, unless it may take it back at any time.
        let given_away = if balloon.deflates_on_oom { balloon.inflated_bytes } else { 0 };
        let used = |total: u64, free: u64| total.saturating_sub(free).saturating_sub(given_away);
        Self {
            says: GuestSays::Statistics,
            used: stats.total_bytes.zip(stats.free_bytes).map(|(total, free)| used(total, free)),
            free: stats.free_bytes,
            // Linux does not tell, and its balloon takes single pages.
            fragmented: None,
            // Its balloon can also take disk caches: the memory that is available beyond what is free.
            reclaimable: stats.available_bytes.or(stats.free_bytes),
        }
    }
}

/// The balloon's statistics, if they are up to date.
fn fresh(elastic: &ElasticStatus) -> Option<(&BalloonStatus, &GuestStatsReport)> {
    let balloon = elastic.balloon.as_ref()?;
    let stats = balloon.guest.as_ref().filter(|stats| elastic.driven && !stats.stale)?;
    Some((balloon, stats))
}

/// Milliseconds as seconds, for a sentence.
fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}

/// Why a resize fell short, according to the shared table; `floor` is what stays free because the guest asks for
/// it. `advice` ends the sentence.
#[must_use]
pub fn why_by_table(in_use: Bytes, fragmented: Bytes, floor: Bytes, advice: &str) -> String {
    let between = match fragmented {
        Bytes(0) => String::new(),
        some => format!(", and {some} lie free between used pages, in frames that are not entirely free"),
    };
    let left = match floor {
        Bytes(0) => String::new(),
        some => format!(", and {some} are left to it as it asks, lest it kill for want of memory"),
    };
    format!("the guest uses {in_use}{between}{left}; {advice}")
}

/// Why a resize fell short in a guest that shares no table; `is_working` says whether its driver is
/// still working on it. `advice` ends the sentence, unless it is empty or of no use.
#[must_use]
pub fn why_by_device(elastic: &ElasticStatus, grows: bool, is_working: bool, advice: &str) -> String {
    if elastic.driven && is_working {
        return "the guest's driver is still working on it: look again later".to_owned();
    }
    let why = match (&elastic.balloon, &elastic.mem) {
        _ if !elastic.driven => {
            let device = &elastic.kind;
            return format!(
                "the guest has no driver for its {device} yet: it is still booting, or its kernel has none"
            );
        }
        (Some(balloon), _) if grows => {
            format!("the guest's driver still keeps {} in its balloon", Bytes(balloon.inflated_bytes))
        }
        (Some(balloon), _) => why_by_balloon(elastic, balloon),
        (None, Some(mem)) => why_by_blocks(mem, grows),
        (None, None) => "the guest's memory stays as it is".to_owned(),
    };
    if advice.is_empty() { why } else { format!("{why}; {advice}") }
}

fn why_by_balloon(elastic: &ElasticStatus, balloon: &BalloonStatus) -> String {
    let found_no_more = "its driver found no more to give";
    match (fresh(elastic), &balloon.guest) {
        (Some((_, stats)), _) => {
            let said = match (stats.available_bytes, stats.free_bytes) {
                (Some(available), _) => format!("{} available", Bytes(available)),
                (None, Some(free)) => format!("{} free", Bytes(free)),
                (None, None) => return format!("{found_no_more}, and it does not say what the guest uses"),
            };
            let of = stats.total_bytes.map_or_else(String::new, |total| format!(" of {}", Bytes(total)));
            format!("the guest said {} ago that it has {said}{of}, and {found_no_more}", seconds(stats.age_ms))
        }
        (None, Some(stats)) => {
            format!("{found_no_more}, and what the guest uses is unknown: it said so {} ago", seconds(stats.age_ms))
        }
        (None, None) => format!("{found_no_more}, and what the guest uses is unknown: it sent no statistics"),
    }
}

fn why_by_blocks(mem: &MemStatus, grows: bool) -> String {
    let (plugged, requested) = (Bytes(mem.plugged_bytes), Bytes(mem.requested_bytes));
    if grows {
        return format!(
            "the guest's driver plugged {plugged} of {requested}: it is not done, lacks the memory to manage more, or \
             the rest is not a whole block of its kernel (128 MiB on Linux)"
        );
    }
    let rest = Bytes(mem.plugged_bytes.saturating_sub(mem.requested_bytes));
    format!("blocks of {rest} could not be offlined: the guest uses them, or cannot move what lies in them")
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_control::report::ElasticKind;

    const MIB: u64 = 1 << 20;

    fn balloon(guest: Option<GuestStatsReport>) -> ElasticStatus {
        let balloon = BalloonStatus { inflated_bytes: 100 * MIB, guest, ..BalloonStatus::default() };
        ElasticStatus {
            kind: ElasticKind::Balloon.into(),
            driven: true,
            balloon: Some(balloon),
            ..ElasticStatus::default()
        }
    }

    fn stats() -> GuestStatsReport {
        GuestStatsReport {
            age_ms: 1250,
            free_bytes: Some(300 * MIB),
            available_bytes: Some(500 * MIB),
            total_bytes: Some(1000 * MIB),
            ..GuestStatsReport::default()
        }
    }

    fn mem() -> ElasticStatus {
        let mem = MemStatus { requested_bytes: 128 * MIB, plugged_bytes: 384 * MIB, ..MemStatus::default() };
        ElasticStatus { kind: ElasticKind::VirtioMem.into(), driven: true, mem: Some(mem), ..ElasticStatus::default() }
    }

    #[test]
    fn the_table_counts_frames_and_leaves_out_what_was_given_away() {
        let census = Census {
            used_frames: 1024 + 512,
            fragmented_frames: 10,
            free_installed: 3,
            free_evicted: 4,
            ..Census::default()
        };
        let view = GuestView::of_table(&census, HUGE_SIZE);
        assert_eq!((view.says, view.used), (GuestSays::Table, Some(HUGE_SIZE)));
        assert_eq!((view.fragmented, view.reclaimable), (Some(10 * FRAME_SIZE), Some(7 * HUGE_SIZE)));
        assert_eq!(view.free, Some(7 * HUGE_SIZE + 10 * FRAME_SIZE));
    }

    #[test]
    fn statistics_are_the_guests_own_words() {
        let view = GuestView::of_statistics(&balloon(Some(stats())));
        assert_eq!(view.says, GuestSays::Statistics);
        assert_eq!((view.used, view.free), (Some(700 * MIB), Some(300 * MIB)));
        assert_eq!((view.reclaimable, view.fragmented), (Some(500 * MIB), None));
        // A guest that may have the balloon's pages back still counts them.
        let mut deflates = balloon(Some(stats()));
        deflates.balloon.as_mut().expect("a balloon").deflates_on_oom = true;
        assert_eq!(GuestView::of_statistics(&deflates).used, Some(600 * MIB));
        // Nonsense stays in bounds.
        let nonsense = GuestStatsReport { free_bytes: Some(u64::MAX - 1), ..stats() };
        assert_eq!(GuestView::of_statistics(&balloon(Some(nonsense))).used, Some(0));
    }

    #[test]
    fn what_is_missing_or_old_is_unknown() {
        let unknown = |elastic: &ElasticStatus| {
            let view = GuestView::of_statistics(elastic);
            assert_eq!((view.used, view.free, view.fragmented, view.reclaimable), (None, None, None, None));
            assert_eq!(view.says, GuestSays::Nowhere);
        };
        unknown(&balloon(None));
        unknown(&balloon(Some(GuestStatsReport { stale: true, ..stats() })));
        unknown(&ElasticStatus { driven: false, ..balloon(Some(stats())) });
        unknown(&mem());
        unknown(&ElasticStatus { kind: ElasticKind::None.into(), ..ElasticStatus::default() });
        // Each number stands on its own.
        let some = GuestStatsReport { total_bytes: None, available_bytes: None, ..stats() };
        let view = GuestView::of_statistics(&balloon(Some(some)));
        assert_eq!((view.used, view.free, view.reclaimable), (None, Some(300 * MIB), Some(300 * MIB)));
    }

    #[test]
    fn a_shortfall_of_the_table_names_only_what_there_is() {
        let text = |in_use: u64, fragmented: u64| {
            why_by_table(Bytes(in_use << 20), Bytes(fragmented << 20), Bytes(0), "free some")
        };
        assert_eq!(text(104, 0), "the guest uses 104 MiB; free some");
        assert!(text(104, 3).contains("104 MiB, and 3 MiB lie free between used pages"), "{}", text(104, 3));
        let floor = why_by_table(Bytes(104 << 20), Bytes(0), Bytes(32 << 20), "free some");
        assert!(floor.starts_with("the guest uses 104 MiB, and 32 MiB are left to it as it asks"), "{floor}");
    }

    #[test]
    fn a_table_of_huge_frames_needs_the_guests_word_for_the_rest() {
        let census = Census { used_frames: 3 * 512, free_installed: 2, free_evicted: 4, ..Census::default() };
        let view = GuestView::of_huge_frames(&census, 100 * FRAME_SIZE);
        assert_eq!(view.used, Some((3 * 512 - 100) * FRAME_SIZE));
        assert_eq!((view.fragmented, view.reclaimable), (Some(100 * FRAME_SIZE), Some(6 * HUGE_SIZE)));
        assert_eq!(view.free, Some(6 * HUGE_SIZE + 100 * FRAME_SIZE));
        assert_eq!(GuestView::of_huge_frames(&census, u64::MAX).used, Some(0), "nonsense stays in bounds");
    }

    #[test]
    fn a_shortfall_of_a_device_says_who_said_what_and_when() {
        let text = why_by_device(&balloon(Some(stats())), false, false, "wait");
        assert_eq!(
            text,
            "the guest said 1.2 s ago that it has 500 MiB available of 1000 MiB, and its driver found no more to \
             give; wait"
        );
        let text = why_by_device(&balloon(Some(stats())), false, true, "wait");
        assert!(text.contains("still working on it") && text.contains("look again later"), "{text}");
        let text = why_by_device(&balloon(None), false, false, "wait");
        assert!(text.contains("unknown: it sent no statistics; wait"), "{text}");
        let old = GuestStatsReport { stale: true, age_ms: 34_000, ..stats() };
        let text = why_by_device(&balloon(Some(old)), false, false, "");
        assert!(text.contains("unknown: it said so 34.0 s ago") && !text.contains("500 MiB"), "{text}");
        let text = why_by_device(&balloon(None), true, false, "");
        assert!(text.contains("still keeps 100 MiB in its balloon"), "{text}");
        let text = why_by_device(&mem(), false, false, "wait");
        assert!(text.starts_with("blocks of 256 MiB could not be offlined") && text.ends_with("; wait"), "{text}");
        let text = why_by_device(&mem(), true, false, "");
        assert!(text.contains("128 MiB on Linux"), "{text}");
        for elastic in [balloon(None), mem()] {
            let text = why_by_device(&ElasticStatus { driven: false, ..elastic }, false, false, "wait");
            assert!(text.contains("no driver for its") && !text.contains("wait"), "{text}");
        }
    }
}
