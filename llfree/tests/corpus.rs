//! The fuzz targets as a plain test: over the corpus that fuzzing found worth keeping, and over
//! random inputs whose seeds are fixed.

use crate::{bytes, hostile};
use std::path::Path;

/// Runs `target` over its corpus; says which input failed.
fn over_corpus(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let Ok(files) = std::fs::read_dir(&folder) else {
        eprintln!("SKIPPED: {} is not part of the package", folder.display());
        return;
    };
    let mut count = 0;
    for file in files {
        let path = file.expect("readable").path();
        println!("{}", path.display());
        target(&std::fs::read(&path).expect("readable"));
        count += 1;
    }
    assert!(count >= 10, "the corpus of {name} has only {count} inputs");
}

fn over_random_inputs(count: u64, longest: usize, target: fn(&[u8])) {
    for seed in 0..count {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut input = vec![0; rng.usize(..longest)];
        rng.fill(&mut input);
        target(&input);
    }
}

#[test]
fn the_corpus_of_operations_agrees_with_the_model() {
    over_corpus("ops", bytes::run);
}

#[test]
fn random_operations_agree_with_the_model() {
    over_random_inputs(150, 4000, bytes::run);
}

#[test]
fn the_corpus_of_hostile_words_moves_the_host_nowhere() {
    over_corpus("hostile_host", hostile::run_bytes);
}

#[test]
fn random_hostile_words_move_the_host_nowhere() {
    over_random_inputs(600, 2000, hostile::run_bytes);
}
