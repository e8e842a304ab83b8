//! How long an attack goes on, and what it came to.

use serde::{Deserialize, Serialize};
use std::time::Instant;

/// The way that an attack runs.
pub(crate) struct Round {
    pub(crate) end: Instant,
    pub(crate) seed: u64,
}

impl Round {
    pub(crate) fn goes_on(&self) -> bool {
        Instant::now() < self.end
    }
}

/// What an attack came to.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// What was done, and how often.
    pub(crate) amounts: Vec<(String, u64)>,
    /// What should not have happened.
    pub(crate) findings: Vec<String>,
    /// Why there was nothing to attack here, if so.
    pub(crate) skipped: Option<String>,
}

/// Findings of one kind tell little more than the first few of them.
const MOST_FINDINGS: usize = 20;

impl Outcome {
    pub(crate) fn skip(why: impl std::fmt::Display) -> Self {
        Self { skipped: Some(why.to_string()), ..Self::default() }
    }

    pub(crate) fn count(&mut self, what: &str, more: u64) {
        match self.amounts.iter_mut().find(|(name, _)| name == what) {
            Some((_, count)) => *count += more,
            None => self.amounts.push((what.to_owned(), more)),
        }
    }

    pub(crate) fn find(&mut self, what: impl Into<String>) {
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(what.into());
        }
    }

    pub(crate) fn check(&mut self, ok: bool, what: impl FnOnce() -> String) {
        if !ok {
            self.find(what());
        }
    }
}
