//! `metrics`: the text that a scraper would get, once.

use super::error::CommandError;
use super::output::{Output, ask_status};
use crate::args::{Global, MetricsFormat};
use crate::exit;
use llfree_metrics::fleet;
use llfree_metrics::text::Format;
use llfree_metrics::vms::{Observed, families};

pub(super) fn metrics(global: &Global, format: MetricsFormat, output: &mut Output) -> Result<u8, CommandError> {
    let vms = match global.name.is_some() || global.socket.is_some() {
        true => {
            let status = ask_status(&mut super::find::connect(global)?, fleet::PATIENCE)?;
            vec![Observed { name: status.name.clone(), status: Some(status) }]
        }
        // None is no error: a machine without VMs has no metrics of any.
        false => fleet::observe()?,
    };
    let format = match format {
        MetricsFormat::Openmetrics => Format::OpenMetrics,
        MetricsFormat::Prometheus => Format::Prometheus,
    };
    let text = families(&vms).to_text(format);
    output.to.write_all(text.as_bytes()).and_then(|()| output.to.flush()).map_err(CommandError::Output)?;
    Ok(exit::OK)
}
