//! What an item is called, and whether only tests have it.

use syn::{Attribute, Expr, ForeignItem, Ident, ImplItem, Item, Lit, Meta, Token, punctuated::Punctuated};

/// The attributes of an item; none for what `syn` does not parse.
pub(crate) fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::TraitAlias(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// The attributes of an item in an `impl` block.
pub(crate) fn attributes_in_impl(item: &ImplItem) -> &[Attribute] {
    match item {
        ImplItem::Const(item) => &item.attrs,
        ImplItem::Fn(item) => &item.attrs,
        ImplItem::Type(item) => &item.attrs,
        ImplItem::Macro(item) => &item.attrs,
        _ => &[],
    }
}

/// The names that an item defines in its module. Modules and imports are recorded elsewhere.
pub(crate) fn names(item: &Item) -> Vec<&Ident> {
    match item {
        Item::Const(item) => vec![&item.ident],
        Item::Enum(item) => vec![&item.ident],
        Item::Fn(item) => vec![&item.sig.ident],
        Item::ForeignMod(item) => item.items.iter().filter_map(foreign_name).collect(),
        Item::Macro(item) => item.ident.iter().collect(),
        Item::Static(item) => vec![&item.ident],
        Item::Struct(item) => vec![&item.ident],
        Item::Trait(item) => vec![&item.ident],
        Item::TraitAlias(item) => vec![&item.ident],
        Item::Type(item) => vec![&item.ident],
        Item::Union(item) => vec![&item.ident],
        _ => Vec::new(),
    }
}

fn foreign_name(item: &ForeignItem) -> Option<&Ident> {
    match item {
        ForeignItem::Fn(item) => Some(&item.sig.ident),
        ForeignItem::Static(item) => Some(&item.ident),
        ForeignItem::Type(item) => Some(&item.ident),
        _ => None,
    }
}

/// Whether a `#[cfg]` keeps this for tests alone. Any predicate but `test` may hold or not.
pub(crate) fn is_for_tests(attributes: &[Attribute]) -> bool {
    let mut conditions = attributes.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    conditions.any(|cfg| cfg.parse_args().is_ok_and(|condition| without_tests(&condition) == Some(false)))
}

/// What a condition is in a build that runs no tests; `None` if that depends on more.
fn without_tests(condition: &Meta) -> Option<bool> {
    let Meta::List(list) = condition else {
        return condition.path().is_ident("test").then_some(false);
    };
    let parts = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated).ok()?;
    let parts: Vec<_> = parts.iter().map(without_tests).collect();
    let decided_by = list.path.is_ident("any");
    if list.path.is_ident("not") {
        parts.first()?.map(|part| !part)
    } else if parts.contains(&Some(decided_by)) {
        Some(decided_by)
    } else if parts.contains(&None) {
        None
    } else {
        Some(!decided_by)
    }
}

/// The file that `#[path = "..."]` names.
pub(crate) fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            Expr::Lit(value) => match &value.lit {
                Lit::Str(path) => Some(path.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    })
}

fn for_tests(attribute: &str) -> bool {
    let item: Item = syn::parse_str(&format!("{attribute} struct Thing;")).expect("this is an item");
    is_for_tests(attributes(&item))
}

#[test]
fn only_what_no_product_build_has_is_for_tests() {
    for yes in ["#[cfg(test)]", "#[cfg(all(test, loom))]", "#[cfg(not(not(test)))]", "#[cfg(any(test, test))]"] {
        assert!(for_tests(yes), "{yes}");
    }
    for no in ["", "#[cfg(not(test))]", "#[cfg(loom)]", "#[cfg(any(test, loom))]", "#[cfg(not(all(test, loom)))]"] {
        assert!(!for_tests(no), "{no}");
    }
}
