//! Writes manual pages and shell completions into a directory, for packages:
//! `cargo run -p llfree-vmm --example words -- DIR`.

use clap::CommandFactory;
use clap_mangen::Man;
use cli::args::{self, Cli};
use cli::completions::{self, Shell};
use std::fs::{File, create_dir_all};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: words DIR");
        return ExitCode::FAILURE;
    };
    match write_all(&dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("words: cannot write to {}: {error}", dir.display());
            ExitCode::FAILURE
        }
    }
}

fn write_all(dir: &Path) -> io::Result<()> {
    let man = dir.join("man/man1");
    create_dir_all(&man)?;
    // `help` has nothing to say that the pages do not.
    let mut command = without_help(Cli::command());
    command.build();
    clap_mangen::generate_to(command.clone(), &man)?;
    write_main_page(command, &man.join("llfree-vmm.1"))?;
    for shell in Shell::ALL {
        let path = dir.join("completions").join(shell.file());
        create_dir_all(path.parent().unwrap_or(dir))?;
        completions::write(shell, &mut File::create(path)?)?;
    }
    Ok(())
}

fn without_help(command: clap::Command) -> clap::Command {
    let below: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let command = command.disable_help_subcommand(true);
    below.into_iter().fold(command, |command, name| command.mut_subcommand(name, without_help))
}

/// The page of the command itself, with what no flag says.
fn write_main_page(command: clap::Command, path: &Path) -> io::Result<()> {
    let page = Man::new(command).manual("llfree-vmm");
    let mut to = Vec::new();
    page.render_title(&mut to)?;
    page.render_name_section(&mut to)?;
    page.render_synopsis_section(&mut to)?;
    page.render_description_section(&mut to)?;
    page.render_options_section(&mut to)?;
    page.render_subcommands_section(&mut to)?;
    section(&mut to, "EXAMPLES", true, args::EXAMPLES)?;
    section(&mut to, "SIZES", false, args::SIZES)?;
    section(&mut to, "EXIT STATUS", false, args::EXIT_CODES)?;
    section(&mut to, "ENVIRONMENT", true, ENVIRONMENT)?;
    section(&mut to, "FILES", true, FILES)?;
    page.render_version_section(&mut to)?;
    File::create(path)?.write_all(&to)
}

/// A section of plain text: line by line, or as a paragraph.
fn section(to: &mut Vec<u8>, title: &str, by_line: bool, text: &str) -> io::Result<()> {
    writeln!(to, ".SH \"{title}\"")?;
    if by_line {
        writeln!(to, ".nf")?;
    }
    for line in text.lines() {
        let escaped = line.replace('\\', "\\e").replace('-', "\\-");
        // A dot or a quote at the beginning would be a request.
        let guard = if escaped.starts_with(['.', '\'']) { "\\&" } else { "" };
        writeln!(to, "{guard}{escaped}")?;
    }
    if by_line {
        writeln!(to, ".fi")?;
    }
    Ok(())
}

const ENVIRONMENT: &str = "\
LLFREE_VMM_DIR   the one directory for control sockets, instead of those below
XDG_RUNTIME_DIR  where control sockets are looked for first
RUST_LOG         what is logged, as in RUST_LOG=debug; overrides -v
NO_COLOR         no colour in the log";

const FILES: &str = "\
$XDG_RUNTIME_DIR/llfree-vmm/NAME.sock, NAME.lock
/run/user/UID/llfree-vmm/
/run/llfree-vmm/       of root
/tmp/llfree-vmm-UID/   where neither can be used";
