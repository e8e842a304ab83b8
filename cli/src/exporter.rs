//! `llfree-vmm exporter`: the metrics of all VMs from one place, until a signal ends it.
//!
//! It asks the VMs when it is asked, over the control sockets that every command uses, and needs no right beyond those.

use crate::args::{ExporterArgs, METRICS_INTERVAL};
use crate::client_commands::Output;
use crate::exit;
use crate::failure::{Fails, Failure};
use llfree_base::{RateLimit, error_line};
use llfree_metrics::address::{Address, ListenError, Listener};
use llfree_metrics::file::{FileError, MetricsFile};
use llfree_metrics::fleet;
use llfree_metrics::publisher::Publisher;
use llfree_metrics::text::Families;
use llfree_metrics::vms;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;

/// Where scrapers come to if nothing else is said.
const ADDRESS: Address = Address::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9837));

/// Why there is no exporter.
#[derive(Debug, thiserror::Error)]
pub enum ExporterError {
    /// Nowhere to listen.
    #[error("no metrics")]
    Listen(#[from] ListenError),
    /// No file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something that the host has not to give.
    #[error("the host could not {step}")]
    Host {
        /// The step.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// Our output has nowhere to go.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

impl Fails for ExporterError {
    fn failure(&self) -> Failure {
        let kind = match self {
            Self::Listen(ListenError::InUse(_)) => "in_use",
            Self::Listen(_) | Self::File(_) | Self::Host { .. } => "host",
            Self::Output(_) => "output",
        };
        let mut message = error_line(self);
        if matches!(self, Self::Listen(ListenError::InUse(_))) {
            message.push_str("; choose another one with --listen");
        }
        Failure { kind: kind.to_owned(), reason: None, message, exit_code: exit::ERROR }
    }
}

/// Serves metrics until it is told to end.
///
/// # Errors
/// [`ExporterError`].
pub fn run(args: &ExporterArgs, output: &mut Output<'_>) -> Result<u8, ExporterError> {
    let host = |step| move |source| ExporterError::Host { step, source };
    // Before there is a file that an early signal could leave behind.
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(host("watch for signals"))?;
    let address = args.listen.clone().or_else(|| args.file.is_none().then_some(ADDRESS));
    let listener = address.as_ref().map(Listener::bind).transpose()?;
    let file = args.file.as_deref().map(MetricsFile::new).transpose()?;
    let address = listener.as_ref().map(|listener| listener.address().clone());
    let text = announcement(address.as_ref(), file.as_ref(), output.json);
    let file = file.map(|file| (file, args.interval.unwrap_or(METRICS_INTERVAL)));
    let publisher = Publisher { listener, file, ..Publisher::default() };
    let (stop, end) = io::pipe().map_err(host("create a pipe"))?;
    let troubles = RateLimit::default();
    let publish = move || publisher.run(stop.as_fd(), || Some(collect(&troubles)));
    let thread = std::thread::Builder::new().name("exporter".to_owned()).spawn(publish);
    let thread = thread.map_err(host("start a thread"))?;
    output.to.write_all(text.as_bytes()).and_then(|()| output.to.flush()).map_err(ExporterError::Output)?;
    let signal = signals.forever().next();
    // At most a VM's patience from now the files are gone.
    drop(end);
    if thread.join().is_err() {
        log::error!("the thread that served metrics panicked");
    }
    Ok(if signal == Some(SIGINT) { exit::INTERRUPTED } else { exit::OK })
}

/// The metrics of all VMs; of none where they cannot be found.
fn collect(troubles: &RateLimit) -> Families {
    let vms = fleet::observe().unwrap_or_else(|error| {
        if let Some(number) = troubles.tick() {
            log::warn!("VMs could not be looked for ({number} so far): {}", error_line(&error));
        }
        Vec::new()
    });
    vms::families(&vms)
}

fn announcement(address: Option<&Address>, file: Option<&MetricsFile>, json: bool) -> String {
    // Lossy: JSON has no way to say a path that is not UTF-8.
    let (address, file) = (address.map(ToString::to_string), file.map(|file| file.path().display().to_string()));
    if json {
        return format!("{}\n", serde_json::json!({ "listen": address, "file": file }));
    }
    let places = address.map(|address| format!("at {address}/metrics")).into_iter();
    let places: Vec<_> = places.chain(file.map(|file| format!("in {file}"))).collect();
    format!("metrics of all VMs are {}\n", places.join(" and "))
}
