//! The way to the host: a port of a virtio console, found by its name, and the frames on it.
//!
//! Commands come in one after another, each is answered before the next is read. A host that goes
//! away leaves what was allocated as it is; it may come back, and is greeted again.

use crate::agent::Agent;
use agent_abi::channel::{FRAME_BYTES, Frame, PORT_NAME};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The interval at which the port is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// The reason that the port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// None has the name.
    #[error("no virtio port is named {PORT_NAME} after {0:?}; load virtio_console, and start the VM with such a port")]
    None(Duration),
    /// It cannot be opened.
    #[error("cannot open {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
}

/// Waits for the port to appear, and opens it.
///
/// # Errors
/// [`PortError`].
pub fn open(patience: Duration) -> Result<File, PortError> {
    let start = Instant::now();
    loop {
        if let Some(path) = find(Path::new("/sys/class/virtio-ports")) {
            return OpenOptions::new().read(true).write(true).open(&path).map_err(|error| PortError::Open(path, error));
        }
        if start.elapsed() >= patience {
            return Err(PortError::None(patience));
        }
        std::thread::sleep(LOOK);
    }
}

/// The device file of the port with our name, among those that `class` lists.
fn find(class: &Path) -> Option<PathBuf> {
    fs::read_dir(class).ok()?.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim_end() == PORT_NAME).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// Greets the host and obeys it until it goes away.
///
/// # Errors
/// Those of the port, save its end.
pub fn serve(port: &mut (impl Read + Write), agent: &mut Agent) -> io::Result<()> {
    port.write_all(&Frame::hello().to_bytes())?;
    let mut bytes = [0; FRAME_BYTES];
    loop {
        match port.read_exact(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        let frame = Frame::from_bytes(bytes);
        let report = agent.obey(frame.to_command());
        port.write_all(&Frame::report(frame.ticket, &report).to_bytes())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::room::Room;
    use agent_abi::{Command, Outcome};
    use guest_abi::header::ABI_VERSION;
    use guest_abi::mailbox::WORDS;
    use shared_layout::Order;
    use std::os::unix::net::UnixStream;

    fn receive(host: &mut UnixStream) -> Frame {
        let mut bytes = [0; FRAME_BYTES];
        host.read_exact(&mut bytes).expect("a frame");
        Frame::from_bytes(bytes)
    }

    #[test]
    fn the_host_is_greeted_and_each_command_answered_with_its_ticket() {
        let (mut host, mut guest) = UnixStream::pair().expect("sockets");
        let guest = std::thread::spawn(move || serve(&mut guest, &mut Agent::new(Room::with_reserve(0))));
        let hello = receive(&mut host);
        assert_eq!(hello.hello_version(), Some(u64::from(ABI_VERSION)));
        let mut ask = |frame: Frame| {
            host.write_all(&frame.to_bytes()).expect("the guest reads");
            let answer = receive(&mut host);
            assert_eq!(answer.ticket, frame.ticket);
            answer.to_report()
        };
        let report = ask(Frame::command(7, &Command::Alloc { bytes: 1 << 20, order: Order::BASE, seed: 5 }));
        assert_eq!((report.outcome, report.held_bytes), (Outcome::Ok as u64, 1 << 20));
        assert_eq!(ask(Frame { ticket: 8, words: [u64::MAX; WORDS] }).outcome, Outcome::Unknown as u64);
        assert_eq!(ask(Frame::command(9, &Command::Verify)).bytes, 1 << 20);
        drop(host);
        guest.join().expect("no panic").expect("the end of the port is no error");
    }

    #[test]
    fn the_port_is_found_by_its_name_alone() {
        let class = tempfile::tempdir().expect("a directory");
        assert_eq!(find(class.path()), None);
        for (port, name) in [("vport0p1", "other\n"), ("vport0p2", ""), ("vport3p1", "org.llfree.agent\n")] {
            fs::create_dir(class.path().join(port)).expect("a directory");
            fs::write(class.path().join(port).join("name"), name).expect("a file");
        }
        assert_eq!(find(class.path()), Some(PathBuf::from("/dev/vport3p1")));
        assert_eq!(find(Path::new("/nonexistent")), None);
    }
}
