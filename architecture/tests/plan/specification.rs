//! SPECIFICATION.md promises nothing that nobody holds: each of its rows has a number of its own and names tests or
//! benchmarks that exist. And two of its promises are about manifests, and are held here.

use crate::links::{exists_as_test, is_name_of_a_test};
use crate::workspace::{packages, resolved, top};
use std::collections::BTreeSet;

/// A row of a table.
struct Promise<'a> {
    number: &'a str,
    words: &'a str,
    /// What stands in code in the last column, and where its links lead.
    holders: Vec<&'a str>,
}

/// All promises of the page, in its order.
fn promises(page: &str) -> Vec<Promise<'_>> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let cells = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
    let promises = cells.filter_map(|cells| match cells[..] {
        [number, words, held_by] if is_number(number) => Some(Promise { number, words, holders: holders(held_by) }),
        _ => None,
    });
    promises.collect()
}

fn is_number(cell: &str) -> bool {
    cell.starts_with(|c: char| c.is_ascii_uppercase()) && cell[1..].parse::<u32>().is_ok()
}

fn holders(cell: &str) -> Vec<&str> {
    let code = cell.split('`').skip(1).step_by(2);
    let links = cell.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    code.chain(links).collect()
}

/// Why this holds nothing, if so.
fn missing(holder: &str) -> Option<String> {
    if let Some(command) = holder.strip_prefix("llfree-bench ") {
        let figure = command.split(' ').next().unwrap_or_default();
        let source = top().join(format!("benches/src/{figure}.rs"));
        return (!source.exists()).then(|| format!("llfree-bench has no {figure}"));
    }
    let is_there = if is_name_of_a_test(holder) { exists_as_test(holder) } else { top().join(holder).exists() };
    (!is_there).then(|| format!("there is no {holder}"))
}

fn page() -> String {
    std::fs::read_to_string(top().join("SPECIFICATION.md")).expect("the page is there")
}

#[test]
fn every_promise_has_a_number_of_its_own_and_somebody_who_holds_it() {
    let page = page();
    let promises = promises(&page);
    assert!(promises.len() > 30, "only {} promises were found", promises.len());
    let mut numbers = BTreeSet::new();
    let mut wrong = Vec::new();
    for Promise { number, words, holders } in &promises {
        if !numbers.insert(number) {
            wrong.push(format!("{number} is given twice"));
        }
        if holders.is_empty() {
            wrong.push(format!("{number} ({words}) is held by nothing"));
        }
        wrong.extend(holders.iter().filter_map(|holder| Some(format!("{number}: {}", missing(holder)?))));
    }
    assert!(wrong.is_empty(), "promises that nobody holds:\n{}", wrong.join("\n"));
}

#[test]
fn what_holds_nothing_is_found() {
    let page = "| | promise | held by |\n|---|---|---|\n| M1 | a | `no_such_test_is_there`, [x](none/such) |\n\
                | M2 | b | `llfree-bench none`, `llfree-bench boot --mem 1G`, `arrows_point_down` |\n";
    let promises = promises(page);
    assert_eq!(promises.iter().map(|promise| promise.number).collect::<Vec<_>>(), ["M1", "M2"]);
    assert_eq!(promises[0].holders, ["no_such_test_is_there", "none/such"]);
    assert!(promises[0].holders.iter().all(|holder| missing(holder).is_some()));
    let found: Vec<_> = promises[1].holders.iter().map(|holder| missing(holder).is_some()).collect();
    assert_eq!(found, [true, false, false]);
}

#[test]
fn no_crate_needs_a_newer_rust_than_is_promised() {
    let ours = packages();
    let promised = ours[0].rust_version.as_ref().expect("the workspace states one");
    let graph = resolved();
    let newer = graph.packages.iter().filter(|package| package.rust_version.as_ref().is_some_and(|it| it > promised));
    let newer: Vec<_> = newer.map(|package| format!("{} {}", package.name, package.version)).collect();
    assert!(newer.is_empty(), "crates that need a Rust above {promised}: {newer:?}");
    let silent: Vec<_> = ours.iter().filter(|package| package.rust_version.is_none()).map(|it| &it.name).collect();
    assert!(silent.is_empty(), "packages that do not say `rust-version.workspace = true`: {silent:?}");
}

#[test]
fn each_third_party_crate_has_a_reason() {
    let manifest = std::fs::read_to_string(top().join("Cargo.toml")).expect("the manifest is there");
    let table = manifest.split("[workspace.dependencies]").nth(1).and_then(|rest| rest.split("\n[").next());
    let lines: Vec<&str> = table.expect("the table of dependencies is there").lines().collect();
    let is_third_party = |line: &str| line.contains(" = ") && !line.starts_with('#') && !line.contains("path = ");
    // One line may speak of several crates that follow it.
    let mut explained = false;
    let mut bare = Vec::new();
    for line in lines {
        explained = line.starts_with('#') || (explained && !line.is_empty());
        if is_third_party(line) && !explained {
            bare.push(line);
        }
    }
    assert!(bare.is_empty(), "crates without a line that says why they are here: {bare:#?}");
    // And no package goes around the table.
    let around = packages().into_iter().flat_map(|package| {
        let text = std::fs::read_to_string(&package.manifest_path).expect("a manifest is readable");
        let own = text.lines().filter(|line| line.contains("version = \"") && line.contains('{')).map(str::to_owned);
        own.map(|line| format!("{}: {line}", package.name)).collect::<Vec<_>>()
    });
    let around: Vec<_> = around.collect();
    assert!(around.is_empty(), "dependencies that are not in the workspace's table: {around:#?}");
}
