//! The fuzz target of virtio devices as a plain test, over random inputs whose seeds are fixed.

#[path = "common/hostile_driver.rs"]
mod driver;

#[test]
fn no_bytes_of_a_driver_make_a_device_panic_or_hang() {
    for seed in 0..3000 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut input = vec![0; 1 + 8 * rng.usize(..200)];
        rng.fill(&mut input);
        driver::run_bytes(&input);
    }
}
