//! Nothing is too long to read in one go: a long function has steps without names, a long file has two subjects.

use crate::fixtures::read;
use crate::workspace::{files, products};
use std::collections::BTreeSet;
use std::path::Path;

/// From the line with `fn` to the closing brace, in product code.
const FUNCTION_LINES: usize = 80;

/// In any source file, tests included.
const FILE_LINES: usize = 600;

#[test]
fn no_function_is_long() {
    let files = products().iter().flat_map(|product| &product.krate.files);
    let functions = files.flat_map(|file| file.functions.iter().map(move |function| (file, function)));
    let long = functions.filter(|(_, function)| function.last - function.first > FUNCTION_LINES);
    let long: BTreeSet<_> = long
        .map(|(file, function)| {
            let lines = function.last - function.first;
            format!("{}:{}: `{}` has {lines} lines", file.path, function.first, function.name)
        })
        .collect();
    let long = Vec::from_iter(long).join("\n");
    assert!(long.is_empty(), "above {FUNCTION_LINES} lines; turn its steps into functions with names:\n{long}");
}

#[test]
fn no_file_is_long() {
    let files = files(".rs");
    assert!(files.len() > 100, "only {} files were found", files.len());
    let lines = |file: &Path| std::fs::read_to_string(file).expect("a source file is readable").lines().count();
    let lengths = files.iter().map(|file| (file, lines(file)));
    let long = lengths.filter(|(_, lines)| *lines > FILE_LINES);
    let long: Vec<_> = long.map(|(file, lines)| format!("{}: {lines}", file.display())).collect();
    let long = long.join("\n");
    assert!(long.is_empty(), "above {FILE_LINES} lines; split it by subject:\n{long}");
}

#[test]
fn functions_are_measured_from_their_first_word_to_their_closing_brace() {
    let text = "\
/// Documented.
#[inline]
pub fn f() {
}
trait T { fn none(); fn g() {

} }
impl T for () {
    fn h() {}
}
";
    let krate = read(&[("lib.rs", text)]);
    let measured = krate.files[0].functions.iter().map(|f| (f.name.as_str(), f.first, f.last));
    assert_eq!(Vec::from_iter(measured), [("f", 3, 4), ("g", 5, 7), ("h", 9, 9)]);
}
