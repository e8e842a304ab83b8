//! [`Image`]: the file that `--kernel` names; its contents say which kind it is.

use super::elf::{Kernel, KernelError, read_image};
use super::linux::{LinuxError, LinuxKernel};
use std::path::Path;

/// A guest's image.
#[derive(Debug)]
pub enum Image {
    /// An image built for this project: it runs in ring 3 and shares its table.
    Own(Kernel),
    /// A Linux kernel, which runs in ring 0 and knows nothing about us.
    Linux(LinuxKernel),
}

/// Why a file is not an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read, or is not one of our programs.
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

    /// What is kept of it while the guest runs: all but the contents, which were copied into guest memory.
    #[must_use]
    pub fn without_contents(&self) -> Option<Self> {
        match self {
            // Its symbols name the addresses of a crash.
            Self::Own(_) => None,
            Self::Linux(kernel) => Some(Self::Linux(kernel.without_image())),
        }
    }
}
