//! [`Query`]: what a search is for, and [`Broken`]: what it found to be untrue on its way.

use crate::class::{Class, Rank};
use crate::entries::Want;
use crate::hint::TreeHint;
use crate::steps::{
    HUGE_NEAR, HUGE_STEPS, HUGE_TABLE, NO_STEP, SMALL_NEAR, SMALL_STEPS, SMALL_TABLE, SMALL_TURNS, Step, StepTable,
};
use crate::tenant::Tenant;
use shared_layout::Order;

/// Trees whose hints promised too much, in one search, before it counts all of them.
const BROKEN_PROMISES: usize = 8;

/// The goal of a search.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    pub(crate) order: Order,
    pub(crate) class: Class,
    /// The trees that blocks come from are marked as the asking CPU's own.
    pub(crate) reserve: bool,
    /// One block is taken, and no row or rest to serve others from.
    pub(crate) single: bool,
    /// A tree that the caller found nothing more in: its hint is not up to date.
    pub(crate) through: Option<u32>,
}

impl Query {
    /// For a caller without a handle: its place remembers a reservation for small blocks.
    pub(crate) const fn at_place(order: Order) -> Self {
        Self { order, class: Class::of(order), reserve: !order.is_huge(), single: false, through: None }
    }

    /// For a CPU with a handle.
    pub(crate) const fn reserving(order: Order, class: Class) -> Self {
        Self { order, class, reserve: true, single: false, through: None }
    }

    /// For a CPU with a handle that has rows already, or cannot use any.
    pub(crate) const fn single(order: Order, class: Class) -> Self {
        Self { single: true, ..Self::reserving(order, class) }
    }

    #[inline]
    pub(crate) fn rank(self, tenant: &Tenant<'_>, hint: TreeHint) -> Rank {
        tenant.policy.rank(self.class, hint.class())
    }

    #[inline]
    pub(crate) fn step_of(self, tenant: &Tenant<'_>, hint: TreeHint) -> u8 {
        self.number_in(&SMALL_TABLE, tenant, hint)
    }

    /// When a walk past all trees takes this one.
    #[inline]
    pub(crate) fn turn_of(self, tenant: &Tenant<'_>, hint: TreeHint) -> u8 {
        self.number_in(&SMALL_TURNS, tenant, hint)
    }

    /// What a table says of a tree, for huge blocks that of their steps.
    #[inline]
    fn number_in(self, small: &StepTable, tenant: &Tenant<'_>, hint: TreeHint) -> u8 {
        let table = if self.order.is_huge() { &HUGE_TABLE } else { small };
        table[self.rank(tenant, hint) as usize][hint.offer(self.order).index()]
    }

    /// The tree that a search finds may be our own from then on.
    #[inline]
    pub(crate) fn stays(self) -> bool {
        self.reserve && (!self.order.is_huge() || self.class == Class::HUGE)
    }

    /// Whether a handle takes this step in its own vicinity rather than to go abroad for a better one: it costs no
    /// install, and puts no small block among those of another class. A whole huge frame is in nobody's way.
    pub(crate) fn is_near_enough(self, step: u8) -> bool {
        if !self.order.is_huge() {
            return step <= SMALL_NEAR;
        }
        step <= HUGE_NEAR || step != NO_STEP && self.class == Class::HUGE && self.want(step) == Want::Installed
    }

    /// Whether a huge block by this step is of order 9 and no half of a pair.
    pub(crate) fn is_choosy(self, step: u8) -> bool {
        self.order == Order::HUGE && HUGE_STEPS.get(usize::from(step)).is_some_and(Step::is_choosy)
    }

    pub(crate) fn want(self, step: u8) -> Want {
        let steps: &[Step] = if self.order.is_huge() { &HUGE_STEPS } else { &SMALL_STEPS };
        steps.get(usize::from(step)).map_or(Want::Free, |step| step.0)
    }
}

/// Trees that a search found without what their hints promise.
#[derive(Default)]
pub(crate) struct Broken {
    trees: [u32; BROKEN_PROMISES],
    len: usize,
}

impl Broken {
    pub(crate) fn has(&self, tree: u32) -> bool {
        self.trees[..self.len].contains(&tree)
    }

    /// False if there is no room for more.
    pub(crate) fn add(&mut self, tree: u32) -> bool {
        let Some(place) = self.trees.get_mut(self.len) else { return false };
        *place = tree;
        self.len += 1;
        true
    }
}
