//! Metrics of the VM of this process: a thread that answers scrapers and writes a file.

use super::error::{RunError, host};
use crate::args::{LaunchArgs, METRICS_INTERVAL};
use crate::roles;
use llfree_base::identity::effective_user;
use llfree_base::thread::Spawner;
use llfree_base::{RateLimit, error_line};
use llfree_harden::Seccomp;
use llfree_metrics::address::Listener;
use llfree_metrics::file::MetricsFile;
use llfree_metrics::publisher::Publisher;
use llfree_metrics::vms::{self, Observed};
use std::io::PipeWriter;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm::service::Service;

/// How long the end of a launch waits for a scrape.
const LAST_SCRAPE: Duration = Duration::from_secs(1);

/// Metrics on their way out. They end with it.
pub(super) struct Publishing {
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

/// What publishes metrics, if that is wanted. Whatever can be refused is refused here.
pub(super) fn prepare(args: &LaunchArgs) -> Result<Option<Publisher>, RunError> {
    if args.metrics_listen.is_none() && args.metrics_file.is_none() {
        return Ok(None);
    }
    let listener = args.metrics_listen.as_ref().map(Listener::bind).transpose()?;
    if let Some(listener) = &listener
        && listener.address().is_public()
    {
        log::warn!(
            "{} can be reached from other machines, and whoever reaches it reads the metrics",
            listener.address()
        );
    }
    let file = args.metrics_file.as_deref().map(MetricsFile::new).transpose()?;
    if let Some(file) = &file {
        check_owner(file.path(), args.seccomp.unwrap_or_default())?;
    }
    let file = file.map(|file| (file, args.metrics_interval.unwrap_or(METRICS_INTERVAL)));
    Ok(Some(Publisher { listener, file, ..Publisher::default() }))
}

/// Root may write into a directory of somebody else, and a thread of the VM has given that up.
fn check_owner(file: &Path, mode: Seccomp) -> Result<(), RunError> {
    let dir = file.parent().unwrap_or(file);
    let owner = std::fs::metadata(dir).map_or(effective_user(), |dir| dir.uid());
    if mode == Seccomp::Off || owner == effective_user() || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(RunError::MetricsDir { dir: dir.to_owned(), owner })
}

impl Publishing {
    /// Starts the thread.
    pub(super) fn start(
        publisher: Publisher,
        service: &Arc<Service>,
        name: &str,
        threads: &Spawner,
    ) -> Result<Self, RunError> {
        let (end, stop) = std::io::pipe().map_err(host("create a pipe"))?;
        // It must not be what keeps a VM in memory.
        let service = Arc::downgrade(service);
        let name = name.to_owned();
        let publish = move || {
            let troubles = RateLimit::default();
            publisher.run(end.as_fd(), || Some(vms::families(&[observe(&service, &name, &troubles)?])));
        };
        let thread = threads.spawn("metrics", roles::METRICS, publish).map_err(host("start a thread"))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

/// The VM as it is; `None` once it is gone.
fn observe(service: &Weak<Service>, name: &str, troubles: &RateLimit) -> Option<Observed> {
    let status = service.upgrade()?.status();
    let status = status.inspect_err(|error| {
        if let Some(number) = troubles.tick() {
            log::warn!("no metrics ({number} so far): {}", error_line(error));
        }
    });
    Some(Observed { name: name.to_owned(), status: status.ok() })
}

impl Drop for Publishing {
    fn drop(&mut self) {
        // The pipe tells the thread, which removes its files.
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + LAST_SCRAPE;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        if !thread.is_finished() {
            log::warn!("a scrape did not finish within {LAST_SCRAPE:?}; the VM ends without it");
        }
    }
}
