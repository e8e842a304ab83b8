//! [`Slot`]: a value of ours in memory that a C program gave us, and the checks of its pointers.

use crate::status::Status;
use core::mem::MaybeUninit;

/// A value after a word that says whether it is there: zeroed memory, or whatever a stack held
/// before, is told from one that was initialised.
#[repr(C)]
pub struct Slot<T> {
    magic: u64,
    value: MaybeUninit<T>,
}

/// The kind of value in a slot, in the word before it.
pub trait Kind {
    /// No pattern that memory has by chance.
    const MAGIC: u64;
    /// Words that `llfree.h` sets aside.
    const WORDS: usize;
}

/// A pointer that is neither null nor misaligned.
pub(crate) fn checked<T>(pointer: *const T) -> Result<*const T, Status> {
    if pointer.is_null() {
        return Err(Status::Null);
    }
    if pointer.is_aligned() { Ok(pointer) } else { Err(Status::Pointer) }
}

/// Writes one result for the caller.
///
/// # Safety
/// Unless null or misaligned, `to` is valid for a write.
pub(crate) unsafe fn put<T>(to: *mut T, value: T) -> Result<(), Status> {
    checked(to)?;
    // SAFETY: checked, and by the caller's contract.
    unsafe { to.write(value) };
    Ok(())
}

impl<T: Kind> Slot<T> {
    const FITS: () = assert!(size_of::<Self>() <= T::WORDS * 8 && align_of::<Self>() == 8);

    /// Puts a value into the caller's memory.
    ///
    /// # Safety
    /// Unless null or misaligned, `slot` is valid for a write of the words that the header sets aside.
    pub(crate) unsafe fn fill(slot: *mut Self, value: T) -> Result<(), Status> {
        const { Self::FITS }
        // SAFETY: by the caller's contract.
        unsafe { put(slot, Self { magic: T::MAGIC, value: MaybeUninit::new(value) }) }
    }

    /// The value in a slot.
    ///
    /// # Safety
    /// Unless null or misaligned, `slot` points to readable memory that nobody changes for as long as `'a`.
    pub(crate) unsafe fn get<'a>(slot: *const Self) -> Result<&'a T, Status> {
        checked(slot)?;
        // SAFETY: readable; the value is there if the word before it says so.
        unsafe {
            match (*slot).magic == T::MAGIC {
                true => Ok((*slot).value.assume_init_ref()),
                false => Err(Status::Handle),
            }
        }
    }

    /// The same for its only user.
    ///
    /// # Safety
    /// As [`get`](Self::get), and nobody else uses the slot meanwhile.
    pub(crate) unsafe fn get_mut<'a>(slot: *mut Self) -> Result<&'a mut T, Status> {
        checked(slot)?;
        // SAFETY: as above, and exclusive.
        unsafe {
            match (*slot).magic == T::MAGIC {
                true => Ok((*slot).value.assume_init_mut()),
                false => Err(Status::Handle),
            }
        }
    }

    /// Takes the value out; the slot is destroyed.
    ///
    /// # Safety
    /// As [`get_mut`](Self::get_mut).
    pub(crate) unsafe fn take(slot: *mut Self) -> Result<T, Status> {
        checked(slot)?;
        // SAFETY: as above; the word is gone before anybody could take the value again.
        unsafe {
            if (*slot).magic != T::MAGIC {
                return Err(Status::Handle);
            }
            (*slot).magic = 0;
            Ok((*slot).value.assume_init_read())
        }
    }
}
