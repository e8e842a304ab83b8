//! From a path as written to the file that defines what it names, following re-exports.

use crate::source::{Crate, Import, Module, Written};

/// What a path leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    /// A module itself.
    Module(usize),
    /// Something in this module: an item, or a name that a macro made there.
    Item(usize),
}

/// One file uses what another file of the same crate defines.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Use {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) line: usize,
    /// The path as written.
    pub(crate) path: String,
}

/// All uses between the files of a crate, ordered by file and line.
///
/// A `pub use` of something below the file is not counted: it says where an item can be found, not that this file
/// needs it. Nor is a `use` of a whole module: what is taken from it shows where it is named.
pub(crate) fn uses(krate: &Crate) -> Vec<Use> {
    let mut uses = Vec::new();
    for (index, module) in krate.modules.iter().enumerate() {
        let imports = module.imports.iter().filter_map(|import| Some((imported(krate, index, import)?, &import.path)));
        let named = module.paths.iter().filter_map(|path| Some((mentioned(krate, index, path)?, path)));
        for (target, path) in imports.chain(named) {
            let to = krate.modules[target].file;
            let of_use = Use { from: module.file, to, line: path.line, path: path.segments.join("::") };
            if of_use.from != of_use.to {
                uses.push(of_use);
            }
        }
    }
    uses.sort();
    uses.dedup();
    uses
}

/// The module that a `use` needs.
fn imported(krate: &Crate, from: usize, import: &Import) -> Option<usize> {
    let needed = match (resolve(krate, from, &import.path.segments, &mut Vec::new())?, &import.name) {
        (Target::Item(module), _) => module,
        // A trait that a glob brings in is not named where its methods are called.
        (Target::Module(module), None) if !krate.modules[module].items.is_empty() => module,
        (Target::Module(_), _) => return None,
    };
    let below = is_below(krate, krate.modules[needed].file, krate.modules[from].file);
    (!(import.exported && below)).then_some(needed)
}

/// The module that a path in the code needs. What a private `use` names has been counted there.
fn mentioned(krate: &Crate, from: usize, path: &Written) -> Option<usize> {
    let module = &krate.modules[from];
    let import = module.imports.iter().find(|import| import.name.as_ref() == path.segments.first());
    if import.is_some_and(|import| !import.exported && imported(krate, from, import).is_some()) {
        return None;
    }
    match resolve(krate, from, &path.segments, &mut Vec::new())? {
        Target::Item(module) => Some(module),
        Target::Module(_) => None,
    }
}

fn is_below(krate: &Crate, file: usize, above: usize) -> bool {
    std::iter::successors(Some(file), |&file| krate.files[file].parent).any(|file| file == above)
}

/// Lookups in progress, by module and name: an import may lead back to itself.
type Pending = Vec<(usize, String)>;

/// Follows a path from a module; `None` if it leads out of the crate.
fn resolve(krate: &Crate, from: usize, path: &[String], pending: &mut Pending) -> Option<Target> {
    let mut at = Target::Module(from);
    for (index, segment) in path.iter().enumerate() {
        let Target::Module(module) = at else {
            // A variant, a constant or a function of the item.
            return Some(at);
        };
        let last = index + 1 == path.len();
        at = match segment.as_str() {
            "crate" => Target::Module(0),
            "self" => at,
            "super" => Target::Module(krate.modules[module].parent?),
            name if index == 0 => member(krate, module, name, last, pending)?,
            name => member(krate, module, name, last, pending).unwrap_or(Target::Item(module)),
        };
    }
    Some(at)
}

/// What a name means in a module. A module and a function may share a name: at the end of a path it is the function.
fn member(krate: &Crate, module: usize, name: &str, last: bool, pending: &mut Pending) -> Option<Target> {
    let here: &Module = &krate.modules[module];
    let child = here.children.get(name).map(|&child| Target::Module(child));
    let item = here.items.contains(name).then_some(Target::Item(module));
    let found = if last { item.or(child) } else { child.or(item) };
    if found.is_some() {
        return found;
    }
    let looked_up = (module, name.to_owned());
    if pending.contains(&looked_up) {
        return None;
    }
    pending.push(looked_up);
    let named = here.imports.iter().filter(|import| import.name.as_deref() == Some(name));
    let found = named.into_iter().find_map(|import| resolve(krate, module, &import.path.segments, pending));
    let found =
        found.or_else(|| here.imports.iter().find_map(|import| through_glob(krate, module, import, name, pending)));
    pending.pop();
    found
}

fn through_glob(krate: &Crate, module: usize, import: &Import, name: &str, pending: &mut Pending) -> Option<Target> {
    if import.name.is_some() {
        return None;
    }
    match resolve(krate, module, &import.path.segments, pending)? {
        Target::Module(all_of) if all_of != module => member(krate, all_of, name, true, pending),
        _ => None,
    }
}
