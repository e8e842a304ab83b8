//! No module cycle, at any level of a crate.
//!
//! At each level the nodes are a module's own file and its children, each child together with everything below it.
//! This forbids two things: siblings that need each other, however deep inside, and a parent that uses a child (beyond
//! `mod` and `pub use`) which in turn uses what the parent defines. What both need belongs in a child of its own, or
//! further down. A crate that passes can be read from the ground up, each file after all those it rests on.

use crate::resolve::{Use, uses};
use crate::source::Crate;
use crate::workspace::products;
use std::collections::BTreeMap;
use std::fmt::Write;

/// How many uses per arrow a failure shows.
const SHOWN: usize = 4;

/// The uses from one node to another.
type Arrows<'a> = BTreeMap<(usize, usize), Vec<&'a Use>>;

/// The nodes in order, the first one not repeated.
type Cycle = Vec<usize>;

/// Describes the cycles of a crate, one paragraph per cycle.
pub(crate) fn cycles(krate: &Crate) -> Vec<String> {
    let uses = uses(krate);
    (0..krate.files.len()).flat_map(|level| cycles_in(krate, level, &uses)).collect()
}

/// The cycles among a module and its children. After each one its lightest arrow is removed and the search repeats
/// until none is left, so one run reports a full set of cuts, and each cycle is as short as possible.
fn cycles_in(krate: &Crate, level: usize, uses: &[Use]) -> Vec<String> {
    let mut arrows = arrows(krate, level, uses);
    let mut found = Vec::new();
    while let Some(cycle) = shortest_cycle(&arrows) {
        let steps = steps(&cycle);
        let lightest = steps.iter().min_by_key(|step| arrows[step].len()).copied().expect("a cycle has steps");
        found.push(describe(krate, level, &steps, &arrows, lightest));
        arrows.remove(&lightest);
    }
    found
}

fn arrows<'a>(krate: &Crate, level: usize, uses: &'a [Use]) -> Arrows<'a> {
    let mut arrows = Arrows::new();
    for one in uses {
        let ends = (node(krate, level, one.from), node(krate, level, one.to));
        if let (Some(from), Some(to)) = ends
            && from != to
        {
            arrows.entry((from, to)).or_default().push(one);
        }
    }
    arrows
}

/// The node that a file belongs to at a level: the level's own file, or the child that it is or lies below.
fn node(krate: &Crate, level: usize, file: usize) -> Option<usize> {
    let up = |file: usize| krate.files[file].parent;
    let child = |&file: &usize| up(file) == Some(level);
    if file == level { Some(level) } else { std::iter::successors(Some(file), |&file| up(file)).find(child) }
}

fn steps(cycle: &Cycle) -> Vec<(usize, usize)> {
    let next = cycle.iter().cycle().skip(1);
    cycle.iter().copied().zip(next.copied()).collect()
}

/// The first of the shortest cycles.
fn shortest_cycle(arrows: &Arrows) -> Option<Cycle> {
    let ways_back = arrows.keys().filter_map(|&(from, to)| shortest_way(arrows, to, from));
    let mut cycle = ways_back.min_by_key(Vec::len)?;
    cycle.rotate_right(1);
    Some(cycle)
}

fn shortest_way(arrows: &Arrows, from: usize, to: usize) -> Option<Vec<usize>> {
    let mut came_from = BTreeMap::from([(from, from)]);
    let mut front = vec![from];
    while !front.is_empty() && !came_from.contains_key(&to) {
        let mut next = Vec::new();
        for &(start, end) in arrows.keys() {
            if front.contains(&start) && !came_from.contains_key(&end) {
                came_from.insert(end, start);
                next.push(end);
            }
        }
        front = next;
    }
    let back = |&node: &usize| came_from.get(&node).copied().filter(|_| node != from);
    let mut way: Vec<_> = came_from.get(&to).map(|_| std::iter::successors(Some(to), back).collect())?;
    way.reverse();
    Some(way)
}

fn describe(
    krate: &Crate,
    level: usize,
    steps: &[(usize, usize)],
    arrows: &Arrows,
    lightest: (usize, usize),
) -> String {
    let name = |node: usize| match (node, krate.files[node].name.as_str()) {
        (node, name) if node == level => name.to_owned(),
        (_, name) => name.trim_start_matches("crate::").to_owned(),
    };
    let names: Vec<_> = steps.iter().map(|&(from, _)| name(from)).collect();
    let mut text = format!("{} -> {}\n", names.join(" -> "), names[0]);
    for step in steps {
        let uses = &arrows[step];
        let hint = if *step == lightest { "  <- fewest: look here first" } else { "" };
        writeln!(text, "  {} -> {}: {}{hint}", name(step.0), name(step.1), uses.len())
            .expect("writing to a String cannot fail");
        for one in uses.iter().take(SHOWN) {
            let (from, to) = (&krate.files[one.from].path, &krate.files[one.to].path);
            writeln!(text, "    {from}:{}: `{}` is in {to}", one.line, one.path)
                .expect("writing to a String cannot fail");
        }
    }
    text
}

const MEND: &str = "\
Each paragraph above is a cycle: modules that can only be read, tested and moved together. Cut one arrow of each:
- move what both sides need (a constant, a wire struct, an error, an id) into a module below them;
- or let the lower module take a value or a closure, and the upper one pass it;
- if a parent and its child use each other, move what the child needs into a child of its own.
The rule stands at the top of architecture/tests/plan/cycles.rs.";

#[test]
fn no_module_cycle() {
    let mut found = String::new();
    for product in products() {
        for cycle in cycles(&product.krate) {
            write!(found, "\n{}: {cycle}", product.name()).expect("writing to a String cannot fail");
        }
    }
    assert!(found.is_empty(), "modules that need each other:\n{found}\n{MEND}");
}
