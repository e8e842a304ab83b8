//! The `Allocator` trait of allocator-api2 for [`Objects`]: collections whose buffers are large objects.

use crate::objects::Objects;
use allocator_api2::alloc::{AllocError, Allocator, Layout};
use std::ptr::NonNull;

fn whole(start: NonNull<u8>, layout: Layout) -> NonNull<[u8]> {
    NonNull::slice_from_raw_parts(start, layout.size())
}

// SAFETY: an object is as large and as aligned as asked for, nobody else's, and stays where it is until it is freed,
// whichever clone of the reference frees it; the objects outlive the reference.
unsafe impl Allocator for &Objects {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if layout.size() == 0 {
            let dangling = std::ptr::without_provenance_mut(layout.align());
            return NonNull::new(dangling).map(|start| whole(start, layout)).ok_or(AllocError);
        }
        self.take(layout.size(), layout.align()).map(|raw| whole(raw.start, layout)).map_err(|_| AllocError)
    }

    fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if layout.size() == 0 {
            return self.allocate(layout);
        }
        self.take_zeroed(layout.size(), layout.align()).map(|raw| whole(raw.start, layout)).map_err(|_| AllocError)
    }

    unsafe fn deallocate(&self, start: NonNull<u8>, layout: Layout) {
        if layout.size() > 0 {
            let _ = self.give_sized(start, layout.size(), layout.align());
        }
    }

    unsafe fn grow(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if old.size() > 0
            && old.align() == new.align()
            && Objects::grow(self, start, old.size(), new.size(), new.align()).is_ok()
        {
            return Ok(whole(start, new));
        }
        let larger = self.allocate(new)?;
        // SAFETY: the new block is distinct and at least as large as the old one, which is the caller's.
        unsafe {
            std::ptr::copy_nonoverlapping(start.as_ptr(), larger.cast().as_ptr(), old.size());
            self.deallocate(start, old);
        }
        Ok(larger)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::area::Area;
    use llfree_base::choices::Switch;

    #[test]
    fn a_vector_grows_in_the_area() {
        let objects =
            Objects::new(Area::builder().size(256 << 20).auto_reclaim(Switch(None)).build().expect("address space"), 0);
        let mut vector = allocator_api2::vec::Vec::new_in(&objects);
        vector.extend(0..1_000_000u64);
        assert_eq!(vector.iter().sum::<u64>(), 999_999 * 500_000);
        assert!(objects.contains(NonNull::from(&vector[0]).cast()));
        drop(vector);
        assert_eq!(objects.area().status().expect("known").used_bytes, 0);
    }
}
