//! [`Image`]: what `--kernel` names, told apart by its contents.

use super::elf::{Kernel, KernelError, read_image};
use super::linux::{LinuxError, LinuxKernel};
use std::path::Path;

/// A guest's image.
#[derive(Debug)]
pub enum Image {
    /// One that was built for this project: it runs in ring 3 and speaks the shared table.
    Own(Kernel),
    /// A Linux kernel, which runs in ring 0 and knows nothing of us.
    Linux(LinuxKernel),
}

/// Why a file is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read, or is a program that is none of ours.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// It is a Linux kernel that cannot be started.
    #[error(transparent)]
    Linux(#[from] LinuxError),
}

impl Image {
    /// Reads and checks the image at `path`.
    ///
    /// # Errors
    /// The first thing that keeps it from running as a guest.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let (name, image) = read_image(path)?;
        Self::parse(&name, image)
    }

    /// Checks an image; `name` is what errors call it.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn parse(name: &str, image: Vec<u8>) -> Result<Self, ImageError> {
        if LinuxKernel::is_one(&image) {
            Ok(Self::Linux(LinuxKernel::parse(name, image)?))
        } else {
            Ok(Self::Own(Kernel::parse(name, image)?))
        }
    }

    /// An image of this project, with its symbols.
    #[must_use]
    pub fn kernel(&self) -> Option<&Kernel> {
        match self {
            Self::Own(kernel) => Some(kernel),
            Self::Linux(_) => None,
        }
    }

    /// What a running guest keeps of it: all that it has copied into its memory is gone.
    #[must_use]
    pub fn without_contents(&self) -> Option<Self> {
        match self {
            // Its symbols name the addresses of a crash.
            Self::Own(_) => None,
            Self::Linux(kernel) => Some(Self::Linux(kernel.without_image())),
        }
    }
}
