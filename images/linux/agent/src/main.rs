//! The program: serves the host, or takes a look at what it shares. Logic lives in the library.

use llfree_agent::agent::Agent;
use llfree_agent::room::Room;
use llfree_agent::{header, port, system};
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "\
Does in a Linux guest what its host asks: allocates, verifies and frees memory.

usage: llfree-agent           serve the virtio port org.llfree.agent, for ever
       llfree-agent header    check the header and the doorbell that the host shares
       llfree-agent --help    this text";

/// Time that the port has to appear.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two attempts when the host went away.
const PAUSE: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] | ["serve"] => serve(),
        ["header"] => look(),
        ["--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(format!("unknown arguments '{}'; see --help", arguments.join(" ").escape_debug()).into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut line = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                line = format!("{line}: {error}");
                cause = error.source();
            }
            eprintln!("llfree-agent: error: {line}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), Box<dyn Error>> {
    if let Err(error) = system::be_killed_last() {
        eprintln!("llfree-agent: warning: the kernel may kill it when memory is short: {error}");
    }
    let mut agent = Agent::new(Room::usual());
    loop {
        let mut port = port::open(PATIENCE)?;
        port::serve(&mut port, &mut agent)?;
        // The kernel allows one opener at a time; the next greeting waits for the host.
        drop(port);
        std::thread::sleep(PAUSE);
    }
}

fn look() -> Result<(), Box<dyn Error>> {
    for line in header::look()? {
        println!("{line}");
    }
    Ok(())
}
