use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::float::Float;
use super::super::kernel::Kernel;
use super::super::team::Team;
use super::super::threads;
use super::stacks::{Model, bits, chain};

#[test]
fn every_item_is_dealt_out_once_and_barriers_hold() {
    for size in [1, 2, 5] {
        let seen: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        let program = |team: &Team<'_>| {
            for turn in 1..=3 {
                team.share(1000, 7, |items| {
                    for item in items {
                        seen[item].fetch_add(1, Ordering::Relaxed);
                    }
                });
                team.wait()?;
                assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == turn));
                team.wait()?;
            }
            Ok(())
        };
        threads::run(size, 3, &program).unwrap();
    }
}

#[test]
fn a_panic_in_one_thread_is_an_error_and_the_pool_goes_on() {
    for size in [1, 3] {
        let program = |team: &Team<'_>| {
            team.share(1, 1, |_| assert_eq!(team.size(), 0, "a fault on purpose"));
            team.wait()
        };
        let failed = threads::run(size, 1, &program).map_err(|error| error.to_string());
        let reason = failed.unwrap_err();
        assert!(reason.contains("on purpose") || reason.contains("another thread"), "{reason}");
        threads::run(size, 1, &|team: &Team<'_>| team.wait()).unwrap();
    }
}

#[test]
fn sixteen_callers_at_once_all_get_the_right_bits() {
    let model = Model::new(*Kernel::available().last().unwrap(), Float::Bf16, None);
    let positions: Vec<usize> = (0..12).collect();
    let run = |seed: u64, threads: usize| {
        let mut cache = model.stack.cache(1);
        let tokens: Vec<u64> = (seed..seed + 12).collect();
        bits(&model.run(&mut cache, &chain(0, 0, 12), &tokens, &positions, threads))
    };
    let expected: Vec<_> = (0..16).map(|seed| run(seed, 1)).collect();
    std::thread::scope(|scope| {
        for (seed, expected) in expected.iter().enumerate() {
            scope.spawn(move || {
                for _ in 0..5 {
                    assert_eq!(&run(seed as u64, 3), expected);
                }
            });
        }
    });
}
