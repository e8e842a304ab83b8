//! Time from the time-stamp counter, which ring 3 may read. The host states its frequency; when
//! it does not, there is no clock and every duration reads 0.

/// The time-stamp counter and its frequency.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    khz: u64,
}

impl Clock {
    /// A counter of `khz` kHz; 0 if nobody knows.
    #[must_use]
    pub(crate) const fn new(khz: u64) -> Self {
        Self { khz }
    }
}

impl llfree_agent_core::Clock for Clock {
    fn now(self) -> u64 {
        // SAFETY: rdtsc reads a register; the VMM leaves CR4.TSD clear.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    fn ticks(self, millis: u64) -> Option<u64> {
        if self.khz == 0 { None } else { Some(self.khz.saturating_mul(millis)) }
    }

    fn nanos(self, ticks: u64) -> u64 {
        if self.khz == 0 {
            return 0;
        }
        // In two parts, as the product of all ticks and a million overflows after hours.
        let whole = (ticks / self.khz).saturating_mul(1_000_000);
        whole.saturating_add((ticks % self.khz).saturating_mul(1_000_000) / self.khz)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_agent_core::Clock as _;

    #[test]
    fn a_year_of_ticks_is_a_year_of_nanoseconds() {
        let clock = Clock::new(2_500_000);
        let seconds = 365 * 86_400;
        assert_eq!(clock.nanos(seconds * 2_500_000_000 + 5), seconds * 1_000_000_000 + 2);
        assert_eq!(clock.ticks(3), Some(7_500_000));
    }

    #[test]
    fn without_a_frequency_there_is_no_time() {
        let clock = Clock::new(0);
        assert_eq!(clock.nanos_since(0), 0);
        assert_eq!(clock.ticks(3), None);
    }
}
