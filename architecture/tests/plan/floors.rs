//! The plan of the house: which package may depend on which, and what none of them may link.
//!
//! The table lists the packages from the ground up, and each may see only some of those listed before it. The
//! dependencies of tests are free: a test may look at a crate from any floor. Every other dependency counts, optional
//! ones included.

use crate::workspace::{packages, resolved};
use cargo_metadata::{DependencyKind, Metadata, Package, PackageId};
use std::collections::BTreeMap;

/// One package of the plan.
pub(crate) struct Room {
    pub(crate) name: &'static str,
    /// The packages of the workspace that it may name in its manifest.
    sees: &'static [&'static str],
    /// What it may link beyond those.
    others: Others,
}

/// What a package may link, directly or through others. A name that ends in `*` stands for all that begin like it.
enum Others {
    /// Of third-party crates only these. What the guest links must run without an operating system, and these do.
    Only(&'static [&'static str]),
    /// Anything but these, which belong to a higher floor; packages of the workspace may be named too.
    Not(&'static [&'static str]),
}

use Others::{Not, Only};

/// What only the command line needs.
const COMMAND_LINE: &[&str] = &["clap*", "env_logger"];

/// What turns a tenant into a virtual machine, and the command line.
const MACHINE: &[&str] =
    &["kvm-*", "virtio-*", "vm-superio", "linux-loader", "acpi_tables", "images", "clap*", "env_logger"];

/// The house from the ground up.
pub(crate) const PLAN: &[Room] = &[
    // Bytes and words that host and guest share.
    Room { name: "shared-layout", sees: &[], others: Only(&["zerocopy"]) },
    Room { name: "guest-abi", sees: &["shared-layout"], others: Only(&["zerocopy"]) },
    Room { name: "agent-abi", sees: &["shared-layout", "guest-abi"], others: Only(&["zerocopy"]) },
    // The allocator, for those who write Rust and for those who do not.
    Room { name: "llfree", sees: &["shared-layout"], others: Only(&["zerocopy"]) },
    Room { name: "llfree-c", sees: &["shared-layout", "llfree"], others: Only(&["zerocopy"]) },
    // The allocator's sources with the atomics of a checker; only its tests.
    Room { name: "llfree-loom", sees: &["shared-layout"], others: Not(MACHINE) },
    Room { name: "llfree-shuttle", sees: &["shared-layout"], others: Not(MACHINE) },
    Room { name: "llfree-crash", sees: &["shared-layout"], others: Not(MACHINE) },
    Room { name: "llfree-lines", sees: &["shared-layout"], others: Not(MACHINE) },
    // What runs inside a guest.
    Room { name: "llfree-agent-core", sees: &["shared-layout", "guest-abi", "agent-abi"], others: Only(&["zerocopy"]) },
    Room {
        name: "guest-shim",
        sees: &["shared-layout", "guest-abi", "agent-abi", "llfree", "llfree-agent-core"],
        others: Only(&["spin", "zerocopy"]),
    },
    Room {
        name: "llfree-agent",
        sees: &["shared-layout", "guest-abi", "agent-abi", "llfree-agent-core"],
        others: Not(MACHINE),
    },
    // The kernel's side of the table, over a model of its page allocator; only its tests.
    Room { name: "llfree-kernel-model", sees: &[], others: Only(&["cc", "shlex", "find-msvc-tools"]) },
    Room { name: "images", sees: &[], others: Only(&[]) },
    // The host: what all of it needs, one tenant's memory, the control plane, the machine.
    Room { name: "llfree-base", sees: &["shared-layout"], others: Not(MACHINE) },
    Room { name: "llfree-harden", sees: &["llfree-base"], others: Not(MACHINE) },
    Room { name: "llfree-monitor", sees: &["shared-layout", "llfree", "llfree-base"], others: Not(MACHINE) },
    Room {
        name: "llfree-area",
        sees: &["shared-layout", "llfree", "llfree-base", "llfree-monitor"],
        others: Not(MACHINE),
    },
    Room { name: "llfree-area-c", sees: &["llfree-area"], others: Not(MACHINE) },
    Room { name: "llfree-preload", sees: &["llfree-area"], others: Not(MACHINE) },
    Room { name: "llfree-control", sees: &["shared-layout", "agent-abi", "llfree-base"], others: Not(MACHINE) },
    Room { name: "llfree-metrics", sees: &["llfree-base", "llfree-control"], others: Not(MACHINE) },
    Room {
        name: "llfree-keeper",
        sees: &["shared-layout", "llfree-base", "llfree-monitor", "llfree-area", "llfree-control"],
        others: Not(MACHINE),
    },
    // The kernel module's header against the table; in a machine that has it, what it promises, also beside a keeper.
    Room {
        name: "llfree-module-check",
        sees: &["llfree-area", "llfree-control", "llfree-keeper"],
        others: Not(MACHINE),
    },
    Room {
        name: "vmm",
        sees: &[
            "shared-layout",
            "guest-abi",
            "agent-abi",
            "llfree",
            "images",
            "llfree-base",
            "llfree-monitor",
            "llfree-control",
        ],
        others: Not(COMMAND_LINE),
    },
    // What people see.
    Room {
        name: COMMAND_LINE_PACKAGE,
        sees: &[
            "shared-layout",
            "guest-abi",
            "agent-abi",
            "llfree-base",
            "llfree-harden",
            "llfree-monitor",
            "llfree-control",
            "llfree-metrics",
            "llfree-keeper",
            "vmm",
        ],
        others: Not(&[]),
    },
    // The host of a User Mode Linux, and what such a kernel promises: a program of its own.
    Room {
        name: "llfree-um",
        sees: &["shared-layout", "guest-abi", "llfree-base", "llfree-monitor"],
        others: Not(MACHINE),
    },
    Room {
        name: "attack",
        sees: &[
            "shared-layout",
            "guest-abi",
            "llfree-base",
            "llfree-monitor",
            "llfree-control",
            "llfree",
            "agent-abi",
            "images",
            "vmm",
        ],
        others: Not(&[]),
    },
    Room {
        name: "benches",
        sees: &[
            "shared-layout",
            "guest-abi",
            "agent-abi",
            "llfree",
            "llfree-base",
            "llfree-monitor",
            "llfree-area",
            "llfree-control",
            "vmm",
            "llfree-vmm",
        ],
        others: Not(&[]),
    },
    // What only tests link.
    Room { name: "test-support", sees: &[], others: Only(&["libc"]) },
    Room {
        name: "test-machine",
        sees: &["shared-layout", "guest-abi", "llfree-base", "llfree-monitor", "llfree-control", "vmm", "test-support"],
        others: Not(COMMAND_LINE),
    },
    Room { name: "architecture", sees: &[], others: Not(MACHINE) },
];

/// The package of the binary `llfree-vmm`.
const COMMAND_LINE_PACKAGE: &str = "llfree-vmm";

/// Whether a package must not speak of the command line.
pub(crate) fn is_below_the_command_line(package: &str) -> bool {
    PLAN.iter().take_while(|room| room.name != COMMAND_LINE_PACKAGE).any(|room| room.name == package)
}

/// Whether a name equals the pattern, or begins like one that ends in `*`.
fn fits(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start))
}

/// Where the plan stands.
const PLACE: &str = "architecture/tests/plan/floors.rs";

const MEND: &str = "\
Move what is needed from up there into a package that both see, or let the upper one pass it down as a value or a \
closure. If the plan is what should change: PLAN in architecture/tests/plan/floors.rs";

fn room(package: &str) -> Option<&'static Room> {
    PLAN.iter().find(|room| room.name == package)
}

#[test]
fn every_package_has_its_place_in_the_plan() {
    let workspace: Vec<_> = packages().iter().map(|package| package.name.as_str()).collect();
    let unplaced = workspace.iter().filter(|name| room(name).is_none());
    let unplaced = unplaced
        .map(|name| format!("{name}: no line in PLAN ({PLACE}); add one between what it sees and what may see it"));
    let empty = PLAN.iter().filter(|room| !workspace.contains(&room.name));
    let empty = empty.map(|room| format!("{}: no such package; take its line out of PLAN ({PLACE})", room.name));
    assert_none("packages and plan differ", unplaced.chain(empty));
}

#[test]
fn the_plan_itself_points_down() {
    let mut up = Vec::new();
    for (floor, room) in PLAN.iter().enumerate() {
        let below = |name: &str| PLAN[..floor].iter().any(|room| room.name == name);
        for name in room.sees.iter().filter(|name| !below(name)) {
            up.push(format!("{} may see {name}, which is not listed before it in PLAN ({PLACE})", room.name));
        }
    }
    assert_none("the plan itself points up", up);
}

#[test]
fn arrows_point_down() {
    let all = packages();
    let mut wrong = Vec::new();
    for (package, room) in all.iter().filter_map(|package| Some((package, room(&package.name)?))) {
        let ours = dependencies(package).filter(|name| all.iter().any(|package| package.name == name));
        for name in ours.filter(|name| !room.sees.contains(name)) {
            wrong.push(format!("{}: {} depends on {name}", package.manifest_path, package.name));
        }
    }
    assert_none(&format!("dependencies that the plan does not have. {MEND}"), wrong);
}

#[test]
fn no_package_links_what_belongs_to_a_higher_floor() {
    let graph = resolved();
    let ours = graph.workspace_packages();
    let mut wrong = Vec::new();
    for (package, room) in ours.iter().filter_map(|package| Some((package, room(&package.name)?))) {
        for (name, chain) in linked(&graph, &package.id) {
            let is_ours = ours.iter().any(|package| package.name == name);
            let forbidden = match room.others {
                Only(patterns) => !is_ours && !patterns.iter().any(|pattern| fits(pattern, &name)),
                Not(patterns) => patterns.iter().any(|pattern| fits(pattern, &name)),
            };
            if forbidden {
                wrong.push(format!("{} must not link {name}: {chain}", package.name));
            }
        }
    }
    assert_none(&format!("crates that belong to a higher floor. {MEND}"), wrong);
}

/// What a manifest names, except for tests.
fn dependencies(package: &Package) -> impl Iterator<Item = &str> {
    let product = package.dependencies.iter().filter(|dependency| dependency.kind != DependencyKind::Development);
    product.map(|dependency| dependency.name.as_str())
}

/// Everything that a package links, each with the chain that leads to it. Procedural macros run in the compiler and are
/// linked nowhere.
fn linked(graph: &Metadata, root: &PackageId) -> BTreeMap<String, String> {
    let nodes = &graph.resolve.as_ref().expect("Cargo was asked for the graph").nodes;
    let mut chains = BTreeMap::new();
    let mut front = vec![(root, graph[root].name.to_string())];
    while let Some((id, chain)) = front.pop() {
        let node = nodes.iter().find(|node| node.id == *id).expect("every package has a node");
        for dependency in &node.deps {
            let package = &graph[&dependency.pkg];
            let is_macro = package.targets.iter().any(|target| target.is_proc_macro());
            let is_linked = dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal);
            if is_linked && !is_macro && !chains.contains_key(package.name.as_str()) {
                let chain = format!("{chain} -> {}", package.name);
                chains.insert(package.name.to_string(), chain.clone());
                front.push((&dependency.pkg, chain));
            }
        }
    }
    chains
}

#[track_caller]
fn assert_none(what: &str, lines: impl IntoIterator<Item = String>) {
    let lines: Vec<_> = lines.into_iter().collect();
    assert!(lines.is_empty(), "{what}:\n{}", lines.join("\n"));
}

#[test]
fn a_star_stands_for_any_ending() {
    assert!(fits("kvm-*", "kvm-ioctls") && fits("clap*", "clap") && fits("clap", "clap"));
    assert!(!fits("kvm-*", "akvm-x") && !fits("clap", "clap_lex"));
}
