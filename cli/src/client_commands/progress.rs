//! A sign of life while a VM works on a request: what it is at, and for how long already.

use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::{Reply, Request};
use llfree_control::report::GuestCommandsReport;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The pause before the first sign, and between two.
const SIGN: Duration = Duration::from_secs(1);
/// Time that the VM has to say what it is at.
const ASK: Duration = Duration::from_millis(500);

/// Asks, and shows on a terminal's stderr that the answer takes its time.
pub(super) fn call(client: &mut Client, request: &Request) -> Result<Reply, ClientError> {
    if !matches!(request, Request::Guest(_)) || !io::stderr().is_terminal() {
        return client.call(request);
    }
    let (path, start) = (client.path().to_owned(), Instant::now());
    let (sender, answer) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The receiver waits for it.
            let _ = sender.send(client.call(request));
        });
        let mut shown = false;
        loop {
            match answer.recv_timeout(SIGN) {
                Ok(answer) => {
                    if shown {
                        show("\r\x1b[K");
                    }
                    return answer;
                }
                Err(RecvTimeoutError::Timeout) => {
                    shown = true;
                    show(&format!("\r\x1b[K{}", sign(at_work(&path).as_ref(), start.elapsed())));
                }
                // The thread cannot end without an answer.
                Err(RecvTimeoutError::Disconnected) => return Err(ClientError::Ended(path)),
            }
        }
    })
}

/// What the VM's guest is at.
fn at_work(path: &Path) -> Option<GuestCommandsReport> {
    match Client::connect(path).ok()?.call_within(&Request::Status, ASK).ok()? {
        Reply::Status(status) => status.guest_commands,
        _ => None,
    }
}

fn sign(work: Option<&GuestCommandsReport>, waited: Duration) -> String {
    let seconds = waited.as_secs();
    let Some(work) = work else { return format!("{seconds} s ...") };
    let at = work.at_work.as_deref().map(llfree_base::printable).unwrap_or_default();
    match work.queued {
        0 => format!("{seconds} s: the guest works on '{at}' ..."),
        1 => format!("{seconds} s: the guest works on '{at}', and 1 command waits ..."),
        more => format!("{seconds} s: the guest works on '{at}', and {more} commands wait ..."),
    }
}

fn show(text: &str) {
    let mut stderr = io::stderr();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_says_what_the_guest_is_at_and_who_else_waits() {
        let work = |queued| GuestCommandsReport { at_work: Some("churn".to_owned()), age_ms: Some(1), queued };
        let wait = Duration::from_millis(3200);
        assert_eq!(sign(None, wait), "3 s ...");
        assert_eq!(sign(Some(&work(0)), wait), "3 s: the guest works on 'churn' ...");
        assert_eq!(sign(Some(&work(2)), wait), "3 s: the guest works on 'churn', and 2 commands wait ...");
    }
}
