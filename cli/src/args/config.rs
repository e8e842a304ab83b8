//! The file of `--config`: a launch's flags, as TOML.
//!
//! A key is the name of a flag without its dashes. Each is handed to clap as `--key=value`, so that there is one
//! parser, one set of defaults and one help for both; what this file adds is where a word stood, for the line of an error.
//! A file and a command line may say the same, and must not contradict each other: neither is read over.

use crate::file_kind::{must_be_regular, wait_from_now_on};
use clap::builder::ValueRange;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use llfree_base::printable;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};
use toml_writer::{ToTomlValue, TomlStringBuilder};

/// The most bytes in a file.
const MOST_BYTES: u64 = 64 << 10;
/// The most symbolic links in a row that the kernel follows.
const MOST_LINKS: u32 = 40;

/// Flags that are about the command, not about the VM.
const NO_KEYS: [&str; 6] = ["help", "version", "json", "verbose", "config", "print-config"];

/// What a file says.
#[derive(Debug)]
pub(super) struct Config {
    path: PathBuf,
    entries: Vec<Entry>,
}

/// A key with its values, and the line that it stands on.
#[derive(Debug)]
struct Entry {
    key: String,
    line: usize,
    words: Words,
}

/// The values of a key.
#[derive(Debug)]
enum Words {
    /// Of a flag that takes none.
    Switch(bool),
    /// As they would follow the flag.
    Values(Vec<String>),
}

impl Config {
    /// Reads a file with flags of `command`, and checks each key by itself.
    ///
    /// # Errors
    /// The line to print.
    pub(super) fn read(path: &Path, command: &Command) -> Result<Self, String> {
        let text = read_text(path).map_err(|error| format!("cannot read the config {}: {error}", shown(path)))?;
        Self::parse(path, &text, command)
    }

    fn parse(path: &Path, text: &str, command: &Command) -> Result<Self, String> {
        let at =
            |start: usize| text.as_bytes()[..start.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1;
        let table = DeTable::parse(text).map_err(|error| {
            let line = at(error.span().map_or(0, |span| span.start));
            format!("{}:{line}: {}", shown(path), in_one_line(error.message()))
        })?;
        let mut entries = Vec::new();
        for (key, value) in table.get_ref() {
            let (line, key) = (at(key.span().start), key.get_ref().as_ref());
            let entry = entry(key, line, value.get_ref(), command)
                .map_err(|why| format!("{}:{line}: {}: {why}", shown(path), printable(key)))?;
            entries.push(entry);
        }
        entries.sort_by_key(|entry| entry.line);
        Ok(Self { path: path.to_owned(), entries })
    }

    /// The arguments that the file stands for, but for those that the command line `given` has as well.
    ///
    /// # Errors
    /// The command line says something else: the line to print.
    pub(super) fn arguments(&self, given: &ArgMatches) -> Result<Vec<OsString>, String> {
        let mut arguments = Vec::new();
        for entry in &self.entries {
            if given.value_source(&id(&entry.key)) != Some(ValueSource::CommandLine) {
                arguments.extend(entry.arguments().map(OsString::from));
            } else if !entry.agrees(given) {
                let mut told = given_words(given, &entry.key);
                told.retain(|_| matches!(entry.words, Words::Values(_)));
                return Err(format!(
                    "{}:{}: {} contradicts --{}{} on the command line; say it in one place",
                    shown(&self.path),
                    entry.line,
                    printable(&entry.to_toml()),
                    entry.key,
                    if told.is_empty() { String::new() } else { format!(" {}", printable(&told.join(" "))) },
                ));
            }
        }
        Ok(arguments)
    }

    /// An error about all flags together, with the place of the first of them that the file has.
    pub(super) fn place(&self, message: &str) -> String {
        let mentioned = |entry: &Entry| {
            let flag = format!("--{}", entry.key);
            message.match_indices(&flag).map(|(at, _)| at).find(|at| {
                let next = message[at + flag.len()..].chars().next();
                next.is_none_or(|next| !next.is_ascii_alphanumeric() && next != '-')
            })
        };
        let first = self.entries.iter().filter_map(|entry| Some((mentioned(entry)?, entry))).min_by_key(|(at, _)| *at);
        match first {
            Some((_, entry)) => format!("{}:{}: {}: {message}", shown(&self.path), entry.line, entry.key),
            None => format!("{}: {message}", shown(&self.path)),
        }
    }
}

impl Entry {
    fn arguments(&self) -> impl Iterator<Item = String> {
        let switch = matches!(self.words, Words::Switch(true)).then(|| format!("--{}", self.key));
        let values = match &self.words {
            Words::Values(values) => &values[..],
            Words::Switch(_) => &[],
        };
        switch.into_iter().chain(values.iter().map(|value| format!("--{}={value}", self.key)))
    }

    /// Whether the command line says the same.
    fn agrees(&self, given: &ArgMatches) -> bool {
        match &self.words {
            Words::Switch(on) => *on,
            Words::Values(values) => given_words(given, &self.key) == *values,
        }
    }

    fn to_toml(&self) -> String {
        match &self.words {
            Words::Switch(on) => format!("{} = {on}", self.key),
            Words::Values(values) => format!("{} = {}", self.key, list(values)),
        }
    }
}

/// What the flags of `matches` say, as such a file, or as JSON.
///
/// # Errors
/// A value that is no text, as a path may be: the line to print.
pub(super) fn print(matches: &ArgMatches, command: &Command, json: bool) -> Result<String, String> {
    let mut text = String::new();
    let mut object = serde_json::Map::new();
    for (key, arg) in keys(command) {
        if matches.value_source(arg.get_id().as_str()) != Some(ValueSource::CommandLine) {
            continue;
        }
        if takes_none(arg) {
            text += &format!("{key} = true\n");
            object.insert(key.to_owned(), true.into());
            continue;
        }
        let raw = matches.get_raw(arg.get_id().as_str()).into_iter().flatten();
        let words: Option<Vec<String>> = raw.map(|word| word.to_str().map(str::to_owned)).collect();
        let words = words.ok_or_else(|| format!("--{key} is not UTF-8, and a config cannot hold it"))?;
        text += &format!("{key} = {}\n", list(&words));
        let first = || words.first().cloned().unwrap_or_default().into();
        object.insert(key.to_owned(), if is_list(arg) { words.clone().into() } else { first() });
    }
    Ok(if json { format!("{}\n", serde_json::Value::Object(object)) } else { text })
}

/// The flags that may be keys.
fn keys(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    let key = |arg: &Arg| arg.get_long().is_some_and(|long| !NO_KEYS.contains(&long));
    command.get_arguments().filter(move |arg| key(arg)).filter_map(|arg| Some((arg.get_long()?, arg)))
}

fn entry(key: &str, line: usize, value: &DeValue<'_>, command: &Command) -> Result<Entry, String> {
    let Some((_, arg)) = keys(command).find(|(long, _)| *long == key) else {
        return Err(match similar(key, command) {
            _ if NO_KEYS.contains(&key) => "it is for the command line only".to_owned(),
            Some(known) => format!("there is no such key; '{known}' is one"),
            None => "there is no such key".to_owned(),
        });
    };
    let words = match value {
        DeValue::Boolean(on) if takes_none(arg) => Words::Switch(*on),
        other if takes_none(arg) => return Err(format!("it takes true or false, not {}", kind(other))),
        DeValue::Array(array) if is_list(arg) => {
            Words::Values(array.iter().map(|value| word(value.get_ref(), "in its list")).collect::<Result<_, _>>()?)
        }
        other => Words::Values(vec![word(other, if is_list(arg) { "or a list of them" } else { "" })?]),
    };
    let entry = Entry { key: key.to_owned(), line, words };
    let program = std::iter::once("llfree-vmm".to_owned());
    match command.clone().try_get_matches_from(program.chain(entry.arguments())) {
        // What another key may mend.
        Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => Err(super::one_line(&error.to_string())),
        _ => Ok(entry),
    }
}

fn word(value: &DeValue<'_>, more: &str) -> Result<String, String> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().replace('_', "")),
        other => {
            let more = if more.is_empty() { String::new() } else { format!(" {more}") };
            Err(format!("it takes text or a number{more}, not {}", kind(other)))
        }
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a number of this kind",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// The key that was meant, by clap's own guess.
fn similar(key: &str, command: &Command) -> Option<String> {
    let error = command.clone().try_get_matches_from(["llfree-vmm".to_owned(), format!("--{key}=")]).err()?;
    let Some(ContextValue::String(flag)) = error.get(ContextKind::SuggestedArg) else { return None };
    let key = flag.trim_start_matches('-').to_owned();
    (!NO_KEYS.contains(&key.as_str())).then_some(key)
}

fn takes_none(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue) || arg.get_num_args() == Some(ValueRange::EMPTY)
}

fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

/// The name that clap's derive gives the argument of a flag.
fn id(key: &str) -> String {
    key.replace('-', "_")
}

fn given_words(given: &ArgMatches, key: &str) -> Vec<String> {
    let raw = given.try_get_raw(&id(key)).ok().flatten().into_iter().flatten();
    raw.map(|word| word.to_string_lossy().into_owned()).collect()
}

/// One value as such, several as a list.
fn list(words: &[String]) -> String {
    let value = |word: &String| match word.parse::<i64>() {
        Ok(number) if number.to_string() == *word => word.clone(),
        _ => {
            let text = TomlStringBuilder::new(word);
            text.as_basic_pretty().or_else(|| text.as_literal()).unwrap_or_else(|| text.as_basic()).to_toml_value()
        }
    };
    match words {
        [word] => value(word),
        words => format!("[{}]", words.iter().map(value).collect::<Vec<_>>().join(", ")),
    }
}

fn read_text(path: &Path) -> io::Result<String> {
    let is_descriptor = is_descriptor(path);
    if !is_descriptor {
        // Asked before opening: opening a pipe waits for a writer, which may never come.
        must_be_regular(std::fs::metadata(path)?.file_type())?;
    }
    // And not to wait for what takes its place just then, nor for a writer who is through and gone.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if is_descriptor {
        // Who writes may take a while. Opened anew, it has flags of its own: nobody else's change.
        wait_from_now_on(&file)?;
    } else {
        must_be_regular(file.metadata()?.file_type())?;
    }
    let mut text = String::new();
    file.take(MOST_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(io::Error::other(format!("it is larger than {} KiB", MOST_BYTES >> 10)));
    }
    Ok(text)
}

/// Whether a path names what this process was given open, as /dev/stdin and a shell's `<(...)` do: a pipe there has had
/// another end.
fn is_descriptor(path: &Path) -> bool {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let Ok(directory) = std::fs::canonicalize(parent) else { return false };
        // What lies there looks like a link to what is open, and leads to that itself.
        if directory.starts_with("/proc") && directory.ends_with("fd") {
            return true;
        }
        let Ok(target) = std::fs::read_link(&path) else { return false };
        path = directory.join(target);
    }
    false
}

fn shown(path: &Path) -> String {
    printable(&path.display().to_string()).to_string()
}

fn in_one_line(text: &str) -> String {
    printable(&text.split_whitespace().collect::<Vec<_>>().join(" ")).to_string()
}
