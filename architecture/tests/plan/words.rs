//! No library speaks of the command line: it says what failed, and the command line adds which flag to turn.
//!
//! This reads the string literals of all code below the command line, including those in attributes and in the
//! arguments of macros. Documentation is free to name flags.

use crate::fixtures::read;
use crate::floors::is_below_the_command_line;
use crate::source::Text;
use crate::workspace::products;

/// The command, as in a line to be typed.
const COMMAND: &str = "llfree-vmm ";

/// The flags and commands that a string names, each with its line.
fn spoken(text: &Text) -> Vec<(usize, String)> {
    let line = |at: usize| text.line + text.source[..at].matches('\n').count();
    let flags = text.source.match_indices("--").filter_map(|(at, _)| Some((line(at), flag(&text.source, at)?)));
    let commands = text.source.match_indices(COMMAND).map(|(at, word)| (line(at), word.to_owned()));
    flags.chain(commands).collect()
}

/// The flag that begins at a `--`, unless that is a dash or part of a drawing.
fn flag(text: &str, at: usize) -> Option<String> {
    let (before, flag) = text.split_at(at);
    let begins = !before.ends_with(|c: char| c == '-' || c.is_alphanumeric());
    let named = flag[2..].starts_with(|c: char| c.is_ascii_lowercase());
    let length = flag.find(|c: char| !(c == '-' || c.is_ascii_alphanumeric())).unwrap_or(flag.len());
    (begins && named).then(|| flag[..length].to_owned())
}

/// What looks like a flag of `llfree-vmm` but is not: the file, the word, and what it is.
const NOT_OURS: &[(&str, &str, &str)] =
    &[("images/linux/agent/src/main.rs", "--help", "the agent is a program of its own, started inside the guest")];

const MEND: &str = "\
A library says what failed (a typed error with the value and the limit); the command line matches on it and says which \
flag to turn.
A flag of another program goes into NOT_OURS in architecture/tests/plan/words.rs, with the reason.";

#[test]
fn lower_crates_do_not_speak_of_the_command_line() {
    let mut stale = Vec::from(NOT_OURS);
    let mut found = Vec::new();
    for product in products().iter().filter(|product| is_below_the_command_line(product.package)) {
        for file in &product.krate.files {
            for (line, word) in file.strings.iter().flat_map(spoken) {
                let is_this = |other: &(&str, &str, &str)| other.0 == file.path && other.1 == word;
                if NOT_OURS.iter().any(is_this) {
                    stale.retain(|other| !is_this(other));
                } else {
                    found.push(format!("{}:{line}: {word}", file.path));
                }
            }
        }
    }
    found.dedup();
    let found = found.join("\n");
    assert!(found.is_empty(), "words of the command line in libraries:\n{found}\n{MEND}");
    assert!(stale.is_empty(), "lines of NOT_OURS that nothing needs any more: {stale:#?}");
}

fn words(source: &str) -> Vec<(usize, String)> {
    spoken(&Text { line: 10, source: source.to_owned() })
}

#[test]
fn flags_and_commands_are_found_on_their_lines() {
    assert_eq!(words(r#""`--mem 1G` is too much""#), [(10, "--mem".to_owned())]);
    let two = "\"one \\\n   --install-pool=0,\n or --on-violation\"";
    assert_eq!(words(two), [(11, "--install-pool".to_owned()), (12, "--on-violation".to_owned())]);
    assert_eq!(words(r#""try llfree-vmm stop""#), [(10, COMMAND.to_owned())]);
}

#[test]
fn dashes_and_drawings_are_not_flags() {
    for plain in [r#""a -- b""#, r#""---x""#, r#""i--x""#, r#""<--""#, r#""-->""#, r#""--""#, r#""llfree-vmm:""#] {
        assert_eq!(words(plain), [], "{plain}");
    }
}

#[test]
fn strings_in_attributes_and_macros_count_and_documentation_and_tests_do_not() {
    let text = r##"//! Set by `--in-docs`.
/// Set by `--in-docs`.
#[error("too much for {0}, see --in-attribute")]
struct TooMuch;
const HELP: &str = r#"--in-raw"#;
fn f() {
    log::warn!("{}", [format!("{} --in-macro", 1)].len());
    bitflags! {
        /// Set by `--in-docs`.
        const FLAG = "--in-block";
    }
}
const BYTES: &[u8] = b"--in-bytes";
const C: &CStr = c"--in-c";
#[cfg(test)]
const ARGS: &str = "--in-test";
"##;
    let krate = read(&[("lib.rs", text)]);
    let found: Vec<_> = krate.files[0].strings.iter().flat_map(spoken).collect();
    let found: Vec<_> = found.iter().map(|(line, word)| (*line, word.as_str())).collect();
    let product = [(3, "--in-attribute"), (5, "--in-raw"), (7, "--in-macro"), (10, "--in-block")];
    let not_utf8 = [(13, "--in-bytes"), (14, "--in-c")];
    assert_eq!(found, [product.as_slice(), &not_utf8].concat());
}
