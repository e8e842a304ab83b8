//! [`Warm`]: where a handle freed blocks lately, by their order.
//!
//! The next block of that order fits there, or elsewhere in that row: nothing is searched, as a rule no larger run is cut
//! up, and the lines are near. So memory that blocks of all sizes come and go in stays as tidy as it is. Places to look and nothing more: any value
//! will do.

use shared_layout::{FrameId, HugeEntry, Order};

/// Places for each order: nine of ten blocks find one where all orders are alike. With half as many, blocks of all orders cost
/// a tenth more at 95 % used; with twice as many little less.
const PLACES: usize = 32;
/// Orders 1 to 8, and 10. Single frames and huge frames have registers of their own.
const ORDERS: usize = Order::HUGE.get() as usize;
/// A huge frame with more free frames than this may soon be free as a whole. For a block of half of one there are few
/// others, so wherever a part is in use its place is remembered.
const MOST_FREE: u16 = 256;
const HALF: Order = match Order::new(Order::HUGE.get() - 1) {
    Some(half) => half,
    None => panic!("below order 9"),
};

/// The first frame of a block of order 1 or more, in half the room: beyond 32 TiB none is remembered.
#[derive(Clone, Copy, Debug)]
struct Packed(u32);

impl Packed {
    #[inline]
    fn of(frame: FrameId) -> Option<Self> {
        u32::try_from(frame.0 / 2).ok().map(Self)
    }

    #[inline]
    const fn frame(self) -> FrameId {
        FrameId(self.0 as u64 * 2)
    }
}

#[derive(Clone, Copy, Debug)]
struct Places {
    /// A ring: the last one in comes out first, and takes the place of the oldest.
    frames: [Packed; PLACES],
    next: u8,
    len: u8,
}

/// The places of one handle.
#[derive(Debug)]
pub(crate) struct Warm {
    places: [Places; ORDERS],
    /// The orders that have some, a bit each.
    orders: u16,
}

impl Warm {
    pub(crate) const NOTHING: Self =
        Self { places: [Places { frames: [Packed(0); PLACES], next: 0, len: 0 }; ORDERS], orders: 0 };

    /// Whether there is a place for a block of this order.
    #[inline]
    pub(crate) const fn has(&self, order: Order) -> bool {
        self.orders >> order.get() & 1 != 0
    }

    #[inline]
    fn of(&mut self, order: Order) -> Option<&mut Places> {
        let place = match order {
            Order::MAX => ORDERS,
            Order::HUGE => return None,
            order => usize::from(order.get()),
        };
        self.places.get_mut(place.wrapping_sub(1))
    }

    /// A block was freed; its huge frame is `after` now.
    #[inline]
    pub(crate) fn put(&mut self, frame: FrameId, order: Order, after: HugeEntry) {
        let fits = match order {
            order if order.is_huge() => !after.is_evicted(),
            _ => after.free() <= MOST_FREE || order == HALF && !after.is_all_free(),
        };
        if fits
            && let Some(packed) = Packed::of(frame)
            && let Some(places) = self.of(order)
        {
            places.frames[usize::from(places.next) % PLACES] = packed;
            places.next = places.next.wrapping_add(1);
            places.len = (places.len + 1).min(PLACES as u8);
            self.orders |= 1 << order.get();
        }
    }

    /// The place of the last block of this order that was freed and whose place was not asked for since.
    #[inline]
    pub(crate) fn pop(&mut self, order: Order) -> Option<FrameId> {
        let places = self.of(order).filter(|places| places.len > 0)?;
        places.len -= 1;
        places.next = places.next.wrapping_sub(1);
        let (frame, len) = (places.frames[usize::from(places.next) % PLACES].frame(), places.len);
        self.orders &= !(u16::from(len == 0) << order.get());
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_place_comes_first_and_the_oldest_are_forgotten() {
        let mut warm = Warm::NOTHING;
        let used = HugeEntry::FREE_INSTALLED.take(300).expect("in range");
        let order = |order| Order::new(order).expect("in range");
        let past = PLACES as u64 + 2;
        for frame in (0..past).map(|n| FrameId(8 * n)) {
            warm.put(frame, order(3), used);
        }
        warm.put(FrameId(4), order(1), used);
        warm.put(FrameId(1 << 33), order(1), used);
        for expected in (2..past).rev() {
            assert_eq!(warm.pop(order(3)), Some(FrameId(8 * expected)));
        }
        assert_eq!((warm.pop(order(3)), warm.pop(order(8))), (None, None));
        warm.put(FrameId(48), order(3), used);
        assert_eq!((warm.pop(order(3)), warm.pop(order(1))), (Some(FrameId(48)), Some(FrameId(4))));
        assert_eq!(warm.pop(order(3)), None);
    }

    #[test]
    fn what_has_to_be_installed_or_may_soon_be_free_as_a_whole_has_no_place() {
        let mut warm = Warm::NOTHING;
        let used = HugeEntry::FREE_INSTALLED.take(300).expect("in range");
        warm.put(FrameId(0), Order::BASE, used);
        assert_eq!(warm.pop(Order::BASE), None);
        warm.put(FrameId(0), Order::HUGE, HugeEntry::FREE_INSTALLED);
        assert_eq!(warm.pop(Order::HUGE), None);
        warm.put(FrameId(0), Order::MAX, HugeEntry::FREE_EVICTED);
        assert_eq!(warm.pop(Order::MAX), None, "no memory is behind it");
        warm.put(FrameId(1024), Order::MAX, HugeEntry::FREE_INSTALLED);
        assert_eq!(warm.pop(Order::MAX), Some(FrameId(1024)));
        warm.put(FrameId(0), Order::ROW, HugeEntry::FREE_INSTALLED.take(255).expect("in range"));
        assert_eq!(warm.pop(Order::ROW), None);
        warm.put(FrameId(0), Order::ROW, HugeEntry::FREE_INSTALLED.take(256).expect("in range"));
        assert_eq!(warm.pop(Order::ROW), Some(FrameId(0)));
        warm.put(FrameId(256), HALF, HugeEntry::FREE_INSTALLED.take(1).expect("in range"));
        assert_eq!(warm.pop(HALF), Some(FrameId(256)));
        warm.put(FrameId(256), HALF, HugeEntry::FREE_INSTALLED);
        assert_eq!(warm.pop(HALF), None);
    }
}
