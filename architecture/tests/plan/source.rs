//! One crate as a tree of modules, read the way the compiler does: from its root along the `mod` declarations and
//! their `#[path]`. What only tests contain is left out.
//!
//! This sees imports, paths in the code, and paths spelled out in the arguments of macros and attributes. It does not
//! see what takes a compiler: what a macro or a derive expands to, paths inside the strings of attributes, and methods
//! of a value whose type the file never names.

use crate::item::{attributes, attributes_in_impl, is_for_tests, names, path_attribute};
use proc_macro2::{Group, Literal, Spacing, TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use syn::ext::IdentExt;
use syn::visit::{self, Visit};
use syn::{
    Attribute, Block, Ident, ImplItem, Item, ItemFn, ItemMod, ItemUse, LitByteStr, LitCStr, LitStr, Meta, Signature,
    UseTree, Visibility,
};

/// A crate: its files, the root first, and its modules, the root first.
#[derive(Default)]
pub(crate) struct Crate {
    pub(crate) files: Vec<File>,
    pub(crate) modules: Vec<Module>,
}

/// A source file: a module, together with its inline modules.
pub(crate) struct File {
    /// Relative to the top of the workspace.
    pub(crate) path: String,
    /// The name of its module.
    pub(crate) name: String,
    /// The file with the `mod` declaration that leads here; `None` for the root.
    pub(crate) parent: Option<usize>,
    pub(crate) strings: Vec<Text>,
    pub(crate) functions: Vec<Function>,
}

/// A literal string, byte string or C string as written, with quotes and escapes.
pub(crate) struct Text {
    pub(crate) line: usize,
    pub(crate) source: String,
}

/// A function with a body.
pub(crate) struct Function {
    pub(crate) name: String,
    /// The line with the word `fn`.
    pub(crate) first: usize,
    /// The line with the closing brace.
    pub(crate) last: usize,
}

/// A module, inline or in a file of its own.
#[derive(Default)]
pub(crate) struct Module {
    /// Its path from the root of the crate, as in `crate::monitor::violation`.
    pub(crate) name: String,
    pub(crate) file: usize,
    pub(crate) parent: Option<usize>,
    pub(crate) children: BTreeMap<String, usize>,
    /// The names that are defined right here.
    pub(crate) items: BTreeSet<String>,
    pub(crate) imports: Vec<Import>,
    /// Paths in the code.
    pub(crate) paths: Vec<Written>,
}

/// One name that a `use` brings in, or a glob.
pub(crate) struct Import {
    pub(crate) path: Written,
    /// What it is called here; `None` for a glob.
    pub(crate) name: Option<String>,
    /// Whether the `use` has any visibility of its own, such as `pub(super)`.
    pub(crate) exported: bool,
}

/// A path as written, but raw identifiers without their `r#`.
pub(crate) struct Written {
    pub(crate) line: usize,
    pub(crate) segments: Vec<String>,
}

impl Crate {
    /// Reads the crate whose root is the given file.
    pub(crate) fn read(root: &Path, top: &Path) -> Self {
        let mut reader = Reader { top, krate: Self::default(), module: 0, place: Place::of_directory(root) };
        reader.file(root, None, "crate".to_owned());
        reader.krate
    }
}

/// Where to find the files of the modules that a module declares.
#[derive(Clone)]
struct Place {
    /// The directory of the file, or that of an inline module.
    directory: PathBuf,
    /// The directory below that, if the file is neither a root nor `mod.rs`.
    below: Option<String>,
}

impl Place {
    /// For a root, a `mod.rs`, or a file that `#[path]` names.
    fn of_directory(file: &Path) -> Self {
        Self { directory: file.parent().unwrap_or(Path::new("")).to_owned(), below: None }
    }

    fn children(&self) -> PathBuf {
        self.directory.join(self.below.as_deref().unwrap_or(""))
    }

    /// The file of a module that is declared here, and where to find those that it declares.
    fn find(&self, name: &str, path: Option<String>) -> (PathBuf, Self) {
        if let Some(path) = path {
            let file = self.directory.join(path);
            let place = Self::of_directory(&file);
            return (file, place);
        }
        let children = self.children();
        let nested = children.join(name).join("mod.rs");
        if nested.exists() {
            let place = Self::of_directory(&nested);
            return (nested, place);
        }
        (children.join(format!("{name}.rs")), Self { directory: children, below: Some(name.to_owned()) })
    }
}

/// The crate as read so far, and the module that is being read.
struct Reader<'a> {
    top: &'a Path,
    krate: Crate,
    module: usize,
    place: Place,
}

impl Reader<'_> {
    fn here(&mut self) -> &mut Module {
        &mut self.krate.modules[self.module]
    }

    fn this_file(&mut self) -> &mut File {
        let file = self.here().file;
        &mut self.krate.files[file]
    }

    /// Reads a file as a module of `parent`; `None` if an attribute at its top keeps it for tests.
    fn file(&mut self, path: &Path, parent: Option<usize>, name: String) -> Option<usize> {
        let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let source = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if is_for_tests(&source.attrs) {
            return None;
        }
        let path = path.strip_prefix(self.top).unwrap_or(path).display().to_string();
        let parent_file = parent.map(|module| self.krate.modules[module].file);
        let file = self.krate.files.len();
        self.krate.files.push(File {
            path,
            name: name.clone(),
            parent: parent_file,
            strings: Vec::new(),
            functions: Vec::new(),
        });
        Some(self.module(file, parent, name, &source.items))
    }

    /// Reads the items of a module.
    fn module(&mut self, file: usize, parent: Option<usize>, name: String, items: &[Item]) -> usize {
        let module = self.krate.modules.len();
        self.krate.modules.push(Module { name, file, parent, ..Module::default() });
        let outer = std::mem::replace(&mut self.module, module);
        for item in items.iter().filter(|item| !is_for_tests(attributes(item))) {
            self.here().items.extend(names(item).into_iter().map(plain));
            self.visit_item(item);
        }
        self.module = outer;
        module
    }

    fn function(&mut self, signature: &Signature, body: &Block) {
        let first = signature.fn_token.span.start().line;
        let last = body.brace_token.span.close().end().line;
        let name = plain(&signature.ident);
        self.this_file().functions.push(Function { name, first, last });
    }

    /// Finds the paths and strings in what only a macro understands: these look the same everywhere.
    fn tokens(&mut self, tokens: &TokenStream) {
        let tokens: Vec<_> = tokens.clone().into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Ident(_) => {
                    let (length, segments) = path_at(&tokens[at..]);
                    let continues = is_dot(tokens[..at].last()) || at >= 2 && is_colons(&tokens[at - 2..]);
                    if !continues {
                        self.path(tokens[at].span().start().line, segments);
                    }
                    at += length - 1;
                }
                TokenTree::Group(group) if is_documentation(group) => {}
                TokenTree::Group(group) => self.tokens(&group.stream()),
                TokenTree::Literal(literal) => self.text(literal),
                TokenTree::Punct(_) => {}
            }
            at += 1;
        }
    }

    fn text(&mut self, literal: &Literal) {
        let (line, source) = (literal.span().start().line, literal.to_string());
        if source.ends_with(['"', '#']) {
            self.this_file().strings.push(Text { line, source });
        }
    }

    fn path(&mut self, line: usize, segments: Vec<String>) {
        self.here().paths.push(Written { line, segments });
    }

    fn import(&mut self, tree: &UseTree, path: &mut Vec<String>, exported: bool) {
        match tree {
            UseTree::Path(step) => {
                path.push(plain(&step.ident));
                self.import(&step.tree, path, exported);
                path.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(tree, path, exported)),
            UseTree::Name(name) => self.import_one(&name.ident, path, None, exported),
            UseTree::Rename(name) => self.import_one(&name.ident, path, Some(&name.rename), exported),
            UseTree::Glob(glob) => {
                let line = glob.star_token.spans[0].start().line;
                let path = Written { line, segments: path.clone() };
                self.here().imports.push(Import { path, name: None, exported });
            }
        }
    }

    /// Imports a name of the module `above`, or with `self` that module.
    fn import_one(&mut self, ident: &Ident, above: &[String], renamed: Option<&Ident>, exported: bool) {
        let mut segments = above.to_vec();
        if above.is_empty() || ident != "self" {
            segments.push(plain(ident));
        }
        let name = renamed.map(plain).or_else(|| segments.last().cloned());
        let path = Written { line: ident.span().start().line, segments };
        self.here().imports.push(Import { path, name, exported });
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_for_tests(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        if !is_for_tests(attributes_in_impl(item)) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        item.attrs.iter().for_each(|attribute| self.visit_attribute(attribute));
        let name = plain(&item.ident);
        let parent = self.module;
        let full = format!("{}::{name}", self.here().name);
        let outer = self.place.clone();
        let child = if let Some((_, items)) = &item.content {
            self.place = Place { directory: outer.children().join(&name), below: None };
            let file = self.here().file;
            Some(self.module(file, Some(parent), full, items))
        } else {
            let (file, place) = outer.find(&name, path_attribute(&item.attrs));
            self.place = place;
            self.file(&file, Some(parent), full)
        };
        self.place = outer;
        if let Some(child) = child {
            self.here().children.insert(name, child);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        // A leading `::` names another crate.
        if item.leading_colon.is_none() {
            let exported = !matches!(item.vis, Visibility::Inherited);
            self.import(&item.tree, &mut Vec::new(), exported);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        self.function(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.function(&item.sig, body);
        }
        visit::visit_trait_item_fn(self, item);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let line = path.segments[0].ident.span().start().line;
            self.path(line, path.segments.iter().map(|segment| plain(&segment.ident)).collect());
        }
        visit::visit_path(self, path);
    }

    /// `pub(super)` and its like use nothing from the module that they name.
    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.visit_path(&call.path);
        self.tokens(&call.tokens);
    }

    /// Attributes hold code too, as in `#[error("{}", bytes(*size))]`. Documentation is none.
    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        match &attribute.meta {
            Meta::NameValue(pair) if !pair.path.is_ident("doc") => self.visit_expr(&pair.value),
            Meta::List(list) => self.tokens(&list.tokens),
            _ => {}
        }
    }

    fn visit_lit_str(&mut self, literal: &'ast LitStr) {
        self.text(&literal.token());
    }

    fn visit_lit_byte_str(&mut self, literal: &'ast LitByteStr) {
        self.text(&literal.token());
    }

    fn visit_lit_cstr(&mut self, literal: &'ast LitCStr) {
        self.text(&literal.token());
    }
}

/// An identifier without its `r#`.
fn plain(ident: &Ident) -> String {
    ident.unraw().to_string()
}

/// The path that begins with the first of these tokens, and how many of them it is.
fn path_at(tokens: &[TokenTree]) -> (usize, Vec<String>) {
    let mut segments = Vec::new();
    let mut length = 0;
    while let Some(TokenTree::Ident(ident)) = tokens.get(length) {
        segments.push(plain(ident));
        length += 1;
        match tokens.get(length + 2) {
            Some(TokenTree::Ident(_)) if is_colons(&tokens[length..]) => length += 2,
            _ => break,
        }
    }
    (length, segments)
}

fn is_colons(tokens: &[TokenTree]) -> bool {
    let colon = |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ':');
    let joined = matches!(&tokens[0], TokenTree::Punct(punct) if punct.spacing() == Spacing::Joint);
    joined && tokens.iter().take(2).filter(|token| colon(token)).count() == 2
}

/// Whether what follows is a field or a method and so no path.
fn is_dot(token: Option<&TokenTree>) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == '.')
}

/// Whether this is `[doc = "..."]`, which is what a doc comment among a macro's arguments becomes.
fn is_documentation(group: &Group) -> bool {
    let mut tokens = group.stream().into_iter();
    let is_doc = matches!(tokens.next(), Some(TokenTree::Ident(ident)) if ident == "doc");
    is_doc && matches!(tokens.next(), Some(TokenTree::Punct(punct)) if punct.as_char() == '=')
}
