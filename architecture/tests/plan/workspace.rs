//! The packages of the workspace as Cargo sees them: where their crates begin, and what they depend on.
//!
//! Cargo answers two questions here, both without the network: what the manifests say, which always works, and what
//! the resolved graph with all third-party crates is, for which those must have been downloaded.

use crate::source::Crate;
use cargo_metadata::camino::Utf8Path;
use cargo_metadata::{Metadata, MetadataCommand, Package, Target, TargetKind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The only platform that the host side runs on. Crates for other platforms are left out of the graph: a build never
/// downloads them.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// The packages of the workspace, as their manifests describe them.
pub(crate) fn packages() -> Vec<&'static Package> {
    static WRITTEN: OnceLock<Metadata> = OnceLock::new();
    let written = WRITTEN.get_or_init(|| ask(command().no_deps().other_options(["--offline".to_owned()])));
    written.workspace_packages()
}

/// The graph of all packages, third-party ones included.
pub(crate) fn resolved() -> Metadata {
    let options = ["--frozen", "--filter-platform", PLATFORM].map(str::to_owned);
    ask(command().other_options(options))
}

fn command() -> MetadataCommand {
    let mut command = MetadataCommand::new();
    command.manifest_path(top().join("Cargo.toml"));
    command
}

fn ask(command: &MetadataCommand) -> Metadata {
    let hint = "`cargo metadata` failed; it must not use the network here: if a package is missing, run `cargo fetch`";
    command.exec().unwrap_or_else(|error| panic!("{hint}: {error}"))
}

/// The directory that all paths in failures are relative to.
pub(crate) fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this package lies in the workspace")
}

/// All files of the workspace whose names end so, but not what builds leave behind, nor anything in a hidden
/// directory.
pub(crate) fn files(ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    collect(top(), ending, &mut found);
    found
}

fn collect(directory: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).expect("a directory of the workspace is readable") {
        let path = entry.expect("a directory of the workspace is readable").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || name == "target" || path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            collect(&path, ending, found);
        } else if name.ends_with(ending) {
            found.push(path);
        }
    }
}

/// A library or a binary of the product, and its source.
pub(crate) struct Product {
    pub(crate) package: &'static str,
    pub(crate) krate: Crate,
}

impl Product {
    /// Its name in a failure: the package, and the root file, since a package may have a library and binaries.
    pub(crate) fn name(&self) -> String {
        format!("{} ({})", self.package, self.krate.files[0].path)
    }
}

/// Every library and binary of the product; no tests, benches, examples or build scripts.
pub(crate) fn products() -> &'static [Product] {
    static PRODUCTS: OnceLock<Vec<Product>> = OnceLock::new();
    PRODUCTS.get_or_init(|| {
        let roots = packages().into_iter().flat_map(|package| package.targets.iter().map(move |root| (package, root)));
        let products = roots.filter(|(_, root)| is_product(root));
        products.map(|(package, root)| Product { package: &package.name, krate: read(&root.src_path) }).collect()
    })
}

fn read(root: &Utf8Path) -> Crate {
    Crate::read(root.as_std_path(), top())
}

fn is_product(root: &Target) -> bool {
    let others = [TargetKind::Test, TargetKind::Bench, TargetKind::Example, TargetKind::CustomBuild];
    !root.kind.iter().any(|kind| others.contains(kind))
}
