//! [`MetricsFile`]: metrics in a file, as node_exporter's textfile collector reads them.
//!
//! A reader sees one whole text or the one before: each is written beside the file and takes its place in one step. The
//! file goes when its owner does, so that nobody reads the figures of a VM that is gone; one that was killed leaves it.

use rustix::fs::{CWD, Mode, OFlags};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// How it is opened: anew each time, and through no link that somebody put there.
pub const OPEN: OFlags =
    OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A file of metrics.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    /// Beside it.
    next: PathBuf,
}

/// A file that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the metrics to {path}")]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// The kernel's answer.
    pub source: io::Error,
}

impl MetricsFile {
    /// The file at this path, which is absolute from here on.
    ///
    /// # Errors
    /// A path without a file name, or without a directory that it could be made in, which is tried; or of something there
    /// that is no regular file.
    pub fn new(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError { path: path.to_owned(), source };
        let absolute = std::path::absolute(path).map_err(failed)?;
        let name = absolute.file_name().filter(|_| !absolute.is_dir());
        let Some(name) = name else {
            return Err(failed(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory")));
        };
        // It is exchanged and removed, which no device or pipe should be.
        if absolute.metadata().is_ok_and(|there| !there.is_file()) {
            return Err(failed(io::Error::other("it is not a regular file")));
        }
        let mut beside = std::ffi::OsString::from(".");
        beside.push(name);
        beside.push(format!(".{}", std::process::id()));
        let file = Self { next: absolute.with_file_name(beside), path: absolute };
        // What cannot be written should fail the launch, and not the first scrape.
        file.create().map_err(failed)?;
        let _ = std::fs::remove_file(&file.next);
        Ok(file)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn create(&self) -> io::Result<File> {
        // It has the number of this process in its name: what lies there is a dead one's.
        let _ = std::fs::remove_file(&self.next);
        Ok(rustix::fs::openat(CWD, &self.next, OPEN, Mode::from(0o644))?.into())
    }

    /// Exchanges what is in it.
    ///
    /// # Errors
    /// The kernel does not let us; the file is then as it was.
    pub fn write(&self, text: &str) -> Result<(), FileError> {
        let written = self.create().and_then(|mut file| file.write_all(text.as_bytes()));
        written.and_then(|()| std::fs::rename(&self.next, &self.path)).map_err(|source| {
            let _ = std::fs::remove_file(&self.next);
            FileError { path: self.path.clone(), source }
        })
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        for path in [&self.path, &self.next] {
            // It may be gone already, or was never written.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_sees_whole_texts_and_the_file_goes_with_its_owner() {
        let scratch = tempfile::tempdir().expect("scratch");
        let path = scratch.path().join("vm.prom");
        let file = MetricsFile::new(&path).expect("writable");
        assert!(!path.exists(), "there is nothing to say yet");
        let texts = ["a 1\n".repeat(2000), "b 2\n".repeat(2000)];
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = 0;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Ok(text) = std::fs::read_to_string(&path) {
                        assert!(texts.contains(&text), "{} bytes", text.len());
                        seen += 1;
                    }
                }
                seen
            });
            for round in 0..200 {
                file.write(&texts[round % 2]).expect("writable");
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(reader.join().expect("no panic") > 0);
        });
        drop(file);
        assert_eq!(std::fs::read_dir(scratch.path()).expect("readable").count(), 0);
    }

    #[test]
    fn a_path_that_cannot_be_written_is_refused_before_anything_else() {
        let scratch = tempfile::tempdir().expect("scratch");
        // A socket in the place of a device, which a test that fails would remove.
        let device = scratch.path().join("device");
        let _socket = std::os::unix::net::UnixListener::bind(&device).expect("scratch");
        let unwritable =
            [scratch.path().join("no/such/vm.prom"), scratch.path().to_owned(), "/proc/x.prom".into(), device.clone()];
        for path in unwritable {
            let error = MetricsFile::new(&path).expect_err("no file");
            assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
        }
        std::fs::remove_file(&device).expect("it stays");
        let file = MetricsFile::new(&scratch.path().join("vm.prom")).expect("writable");
        std::fs::create_dir(scratch.path().join("vm.prom")).expect("scratch");
        file.write("a 1\n").expect_err("a directory took its place");
        assert_eq!(std::fs::read_dir(scratch.path()).expect("readable").count(), 1, "nothing is left beside it");
    }
}
