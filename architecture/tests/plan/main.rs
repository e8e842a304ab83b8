//! The house plan, kept by reading the source: arrows point down, between crates and between the modules of a crate.
//!
//! | file | what it holds |
//! |---|---|
//! | [`workspace`] | the packages, their crates and what they depend on, from Cargo |
//! | [`item`] | what an item is called, and whether only tests have it |
//! | [`source`] | one crate as a tree of modules with their imports, strings and functions |
//! | [`resolve`] | from a path as written to the file that defines what it names |
//! | [`cycles`] | no cycle of modules, tried on the small crates of [`fixtures`] |
//! | [`floors`] | no arrow between crates that is not in the plan |
//! | [`words`] | no word of the command line in a library |
//! | [`lengths`] | no function or file that is too long to read in one go |
//! | [`examples`] | no test or example that nobody runs |
//! | [`links`] | no page of documentation that leads nowhere |
//! | [`specification`] | no promise that nobody holds |
//!
//! A failure names the file, the line and the import, and says how to mend it. Nothing here runs the code it reads,
//! reaches the network or writes outside a scratch directory.

mod cycles;
mod examples;
mod fixtures;
mod floors;
mod item;
mod lengths;
mod links;
mod resolve;
mod source;
mod specification;
mod words;
mod workspace;
