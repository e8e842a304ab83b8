//! Every page of documentation leads where it says: a moved file takes its links along.
//!
//! Checked are relative links, their anchors where they lead into a page, and the names of source files in prose. A
//! name need not begin at the top: `monitor/resize.rs` stands for any file whose path ends so. What the network has
//! is not asked for.

use crate::workspace::{files, top};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// One page, without its code blocks: lines of code are neither links nor headings.
struct Page {
    path: PathBuf,
    prose: String,
}

/// All pages of the workspace.
fn pages() -> Vec<Page> {
    let pages: Vec<_> = files(".md").into_iter().map(|path| Page { prose: prose(&read(&path)), path }).collect();
    assert!(pages.len() > 5, "only {} pages were found", pages.len());
    pages
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The text with its fenced code blocks emptied; line numbers stay.
fn prose(text: &str) -> String {
    let mut in_code = false;
    let lines = text.lines().map(|line| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        if in_code || is_fence { "" } else { line }
    });
    Vec::from_iter(lines).join("\n")
}

/// The targets of all links, each with its line.
fn links(prose: &str) -> Vec<(usize, &str)> {
    let ends = prose.match_indices("](").map(|(at, bracket)| at + bracket.len());
    ends.filter_map(|at| Some((line(prose, at), prose[at..].split_once(')')?.0))).collect()
}

fn line(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// What is wrong with a link of a page, if anything.
fn dead(page: &Path, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
    let file = if file.is_empty() { page.to_owned() } else { page.with_file_name(file) };
    if !file.exists() {
        return Some(format!("{link}: no such file"));
    }
    let is_page = file.extension().is_some_and(|extension| extension == "md");
    let leads_nowhere = is_page && !anchor.is_empty() && !anchors(&prose(&read(&file))).contains(anchor);
    leads_nowhere.then(|| format!("{link}: no such heading"))
}

/// The anchors of a page's headings, as they are made from the text of each.
fn anchors(prose: &str) -> BTreeSet<String> {
    let headings = prose
        .lines()
        .filter_map(|line| line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#')));
    headings.map(anchor).collect()
}

fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

/// The names of source files that a page mentions, each with its line.
fn named_files(prose: &str) -> Vec<(usize, &str)> {
    let lines = prose.lines().enumerate().map(|(line, text)| (line + 1, text));
    let words = lines.flat_map(|(line, text)| text.split(|c| !is_of_a_path(c)).map(move |word| (line, word)));
    words.filter(|(_, word)| word.ends_with(".rs")).collect()
}

fn is_of_a_path(c: char) -> bool {
    c.is_ascii_alphanumeric() || "/._-".contains(c)
}

/// Whether some file's path ends so. Links begin with steps up, which [`dead`] follows.
fn exists(named: &str, sources: &[PathBuf]) -> bool {
    let named = named.trim_start_matches("../");
    sources.iter().any(|source| source.ends_with(named))
}

#[test]
fn links_lead_somewhere() {
    let mut wrong = Vec::new();
    for Page { path, prose } in &pages() {
        let name = path.strip_prefix(top()).expect("pages lie in the workspace").display();
        for (line, link) in links(prose) {
            wrong.extend(dead(path, link).map(|why| format!("{name}:{line}: {why}")));
        }
    }
    assert!(wrong.is_empty(), "links that lead nowhere:\n{}", wrong.join("\n"));
}

#[test]
fn files_named_in_prose_exist() {
    let sources = files(".rs");
    let mut wrong = Vec::new();
    for Page { path, prose } in &pages() {
        let name = path.strip_prefix(top()).expect("pages lie in the workspace").display();
        let missing = named_files(prose).into_iter().filter(|(_, named)| !exists(named, &sources));
        wrong.extend(missing.map(|(line, named)| format!("{name}:{line}: {named}")));
    }
    assert!(wrong.is_empty(), "files that pages name and nobody has:\n{}", wrong.join("\n"));
}

/// The names of tests that a page mentions, each with its line.
fn named_tests(prose: &str) -> Vec<(usize, &str)> {
    let lines = prose.lines().enumerate().map(|(line, text)| (line + 1, text));
    let words = lines.flat_map(|(line, text)| text.split('`').skip(1).step_by(2).map(move |word| (line, word)));
    words.filter(|(_, word)| is_name_of_a_test(word)).collect()
}

/// Whether this can only be the name of a test: words in code of three parts or more.
pub(crate) fn is_name_of_a_test(word: &str) -> bool {
    let is_name = word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    is_name && word.matches('_').count() >= 2
}

/// Whether there is a test of that name, or a module of tests that say together what its name says. A function that is no
/// test holds nothing, and neither does a test that nobody runs.
pub(crate) fn exists_as_test(name: &str) -> bool {
    static SOURCES: OnceLock<Vec<String>> = OnceLock::new();
    let sources = SOURCES.get_or_init(|| files(".rs").iter().map(|path| read(path)).collect());
    sources.iter().any(|source| has_test(source, name))
}

fn has_test(source: &str, name: &str) -> bool {
    let module = format!("mod {name} {{");
    let function = format!("fn {name}(");
    let mut heads = source.match_indices(&function).map(|(at, _)| attributes_above(&source[..at]));
    source.contains(&module)
        || heads.any(|above| above.contains(&"#[test]") && !above.iter().any(|line| line.starts_with("#[ignore")))
}

/// Attributes and comments right above where this text ends, in whatever order.
fn attributes_above(text: &str) -> Vec<&str> {
    // The line itself is cut off, or empty.
    let lines = text.rsplit('\n').skip(1).map(str::trim);
    lines.take_while(|line| line.starts_with("#[") || line.starts_with("//")).collect()
}

#[test]
fn tests_named_in_the_page_of_waits_exist() {
    let page = pages().into_iter().find(|page| page.path.ends_with("docs/waits.md")).expect("it is there");
    let named = named_tests(&page.prose);
    assert!(named.len() > 30, "only {} tests were found", named.len());
    // Of three parts there are other names in it.
    let named = named.into_iter().filter(|(_, name)| name.matches('_').count() >= 3);
    let missing: Vec<_> = named.filter(|(_, name)| !exists_as_test(name)).collect();
    assert!(missing.is_empty(), "tests that nobody has: {missing:?}");
}

#[test]
fn a_test_is_a_function_that_is_run_as_one() {
    let source = "#[test]\n/// a\n#[cfg(unix)]\nfn one_a_b() {}\nfn two_a_b() {}\n  #[test]\n  #[ignore = \"x\"]\n  fn three_a_b() {}\n\
                  mod four_a_b {\n}\n#[test]\n\nfn five_a_b() {}\n";
    let found =
        ["one_a_b", "two_a_b", "three_a_b", "four_a_b", "five_a_b", "six_a_b"].map(|name| has_test(source, name));
    assert_eq!(found, [true, false, false, true, false, false]);
}

#[test]
fn links_and_names_in_code_blocks_are_free() {
    let text = "[a](x.md)\n```\n[b](y.md) gone.rs\n# no heading\n```\nsee [`c`\nd](z.md#e), `f/g.rs`.";
    let prose = prose(text);
    assert_eq!(links(&prose), [(1, "x.md"), (7, "z.md#e")]);
    assert_eq!(named_files(&prose), [(7, "f/g.rs")]);
    assert!(anchors(&prose).is_empty());
}

#[test]
fn anchors_are_made_of_headings() {
    let expected = ["a-vm-reclaim-return-install", "the-image---kernel"].map(str::to_owned);
    assert_eq!(anchors("## A VM: reclaim, return, install\n### The image (`--kernel`)\n#no"), BTreeSet::from(expected));
}

#[test]
fn a_dead_link_is_told_from_a_living_one() {
    let page = top().join("README.md");
    for alive in ["LICENSE-MIT", "docs/", "https://example.org/x#y", "#layout", "docs/devices.md#disks"] {
        assert_eq!(dead(&page, alive), None);
    }
    for nowhere in ["docs/none.md", "#no-such-heading", "docs/devices.md#no-such-heading"] {
        assert!(dead(&page, nowhere).is_some(), "{nowhere}");
    }
}

#[test]
fn a_name_stands_for_the_end_of_a_path() {
    let sources = [PathBuf::from("/top/monitor/src/monitor/resize.rs")];
    assert!(exists("monitor/resize.rs", &sources) && exists("../monitor/src/monitor/resize.rs", &sources));
    assert!(!exists("size.rs", &sources) && !exists("vmm/resize.rs", &sources));
}
