//! What a VM's guest says about its memory, and why, judging by that, a resize fell short.

use super::Vm;
use crate::guest_view::{self, GuestView};
use llfree::Census;
use llfree_base::units::Bytes;
use llfree_control::report::{ElasticKind, ElasticStatus, GuestSays};
use std::time::Duration;

impl Vm {
    /// Whether the guest shares the table of its allocator with the host by now, whatever moves its memory.
    #[must_use]
    pub fn shares_table(&self) -> bool {
        self.guest.shares_table() && self.monitor.is_shared()
    }

    /// What the guest says about its memory: in its table if it shares one, otherwise in the statistics
    /// of its balloon.
    #[must_use]
    pub fn view(&self, elastic: &ElasticStatus, census: &Census) -> GuestView {
        if !self.shares_table() {
            return GuestView::of_statistics(elastic);
        }
        // A device's driver allocates what it gives away.
        let given_away = match self.elastic.table() {
            Some(_) => 0,
            None => self.config.memory.0.saturating_sub(self.elastic.limit()),
        };
        match &elastic.table {
            Some(said) => GuestView::of_huge_frames(census, said.fragmented_bytes),
            None => GuestView::of_table(census, given_away),
        }
    }

    /// The guest's free memory according to its table, in bytes: all of it, and the part in entirely free
    /// huge frames. `None` without a table.
    #[must_use]
    pub fn free_by_table(&self) -> Option<(u64, u64)> {
        self.shares_table().then(|| {
            let view = self.view(&self.elastic.status(), &self.monitor.census());
            (view.free.unwrap_or_default(), view.reclaimable.unwrap_or_default())
        })
    }

    /// Why a resize fell short, as a sentence that ends with `advice`; `grows` says whether it was
    /// meant to raise the limit.
    #[must_use]
    pub fn why_short(&self, view: &GuestView, elastic: &ElasticStatus, grows: bool, advice: &str) -> String {
        if view.says == GuestSays::Table {
            let known = |bytes: Option<u64>| Bytes(bytes.unwrap_or_default());
            let floor =
                Bytes(elastic.table.as_ref().map_or(0, |said| said.floor_bytes).min(view.free.unwrap_or_default()));
            return guest_view::why_by_table(known(view.used), known(view.fragmented), floor, advice);
        }
        if elastic.kind == ElasticKind::Undecided {
            return "the guest's kernel has not said that it shares its free memory, and has no driver for its balloon yet: \
                    it is still booting, or was built without either"
                .to_owned();
        }
        if elastic.table.is_some() {
            return "the guest's kernel does not share its free memory: it is still booting, or was built without that"
                .to_owned();
        }
        guest_view::why_by_device(elastic, grows, self.elastic.is_moving(Duration::MAX), advice)
    }
}
