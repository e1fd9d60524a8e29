//! Trees against what holds of every tree, lookups and plans against plain words of what they do.

use super::lookup::{Hit, find_continuation};
use super::plan::Plan;
use super::tree::{DraftTree, Origin};

/// Numbers below a bound, the same for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn chance(&mut self) -> f64 {
        self.below(1 << 20) as f64 / f64::from(1 << 20)
    }

    fn chances(&mut self, count: usize) -> Vec<f64> {
        let mut found: Vec<f64> = (0..count).map(|_| self.chance()).collect();
        found.sort_by(|a, b| b.total_cmp(a));
        found
    }

    fn tokens(&mut self, count: usize) -> Vec<i64> {
        (0..count).map(|_| self.below(6) as i64).collect()
    }
}

/// What holds of every tree.
fn check(tree: &DraftTree, limit: usize, chain: bool) {
    let nodes = tree.nodes();
    assert_eq!((nodes[0].parent, nodes[0].depth, nodes[0].origin), (None, 0, Origin::Root));
    for (index, node) in nodes.iter().enumerate().skip(1) {
        let parent = node.parent.unwrap();
        assert!(parent < index, "a parent stands before its children");
        assert_eq!(node.depth, nodes[parent].depth + 1);
        let line = tree.line(index);
        assert_eq!((line[0], *line.last().unwrap(), line.len()), (0, index, node.depth + 1));
        assert!(line.windows(2).all(|pair| nodes[pair[1]].parent == Some(pair[0])));
        if node.origin == Origin::Blank {
            assert_eq!(node.score, 0.0);
            assert_ne!(tree.child(parent, node.token), Some(index), "no token reaches a blank");
            continue;
        }
        assert_eq!(tree.child(parent, node.token), Some(index), "each child has its own token");
        assert!(node.depth <= limit && node.score > 0.0 && node.score.is_finite());
        assert!(!chain || parent + 1 == index, "each node follows the one before");
    }
}

#[test]
fn trees_hold_together_whatever_is_put_up() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let (limit, chain) = (random.below(5), seed % 4 == 3);
        let mut tree = DraftTree::new(7, limit, chain);
        for _ in 0..12 {
            let count = random.below(5);
            let size = tree.nodes().len();
            match random.below(6) {
                0 | 1 => {
                    let (tokens, mut chances) = (random.tokens(count), random.chances(count));
                    if let (true, Some(first)) = (seed % 5 == 0, chances.first_mut()) {
                        *first = [f64::NAN, f64::INFINITY, 0.0][random.below(3)];
                    }
                    tree.offer(random.below(size), &tokens, &chances).unwrap();
                }
                2 => {
                    let (tokens, scores) = (random.tokens(count), random.chances(count));
                    let scores: Vec<f64> = scores.iter().map(|score| score + 1e-6).collect();
                    tree.offer_path(&tokens, &scores, 2).unwrap();
                }
                3 => tree.pad(size + random.below(2)),
                4 => tree.cut(size - random.below(2)),
                _ => {
                    let known = (random.below(2) == 0).then_some(size);
                    let least = random.chance() / 4.0;
                    let best = tree.next_scores(usize::MAX);
                    assert!(best.windows(2).all(|pair| pair[0] >= pair[1]));
                    let taken = tree.take(count, least, known);
                    assert!(taken.len() <= count);
                    assert!(taken.iter().copied().eq(size..tree.nodes().len()));
                    assert!(taken.iter().all(|&node| tree.nodes()[node].score >= least));
                }
            }
            check(&tree, limit, chain);
        }
    }
}

#[test]
fn candidates_put_up_together_are_taken_by_their_probability() {
    for seed in 0..50 {
        let mut random = Random::new(seed);
        let mut tree = DraftTree::new(7, 4, false);
        let chances = random.chances(5);
        tree.offer(0, &[0, 1, 2, 3, 4], &chances).unwrap();
        tree.take(2, 0.0, None);
        for node in 1..tree.nodes().len() {
            let (tokens, chances) = (random.tokens(4), random.chances(4));
            tree.offer(node, &tokens, &chances).unwrap();
        }
        let new = tree.take(9, 0.0, None);
        let scores: Vec<f64> = new.iter().map(|&node| tree.nodes()[node].score).collect();
        assert!(scores.windows(2).all(|pair| pair[0] >= pair[1]), "{scores:?}");
    }
}

#[test]
fn blanks_that_are_given_up_take_no_child_with_them() {
    let mut tree = DraftTree::new(7, 4, false);
    tree.offer(0, &[7], &[0.5]).unwrap();
    tree.take(1, 0.0, None);
    tree.pad(3);
    tree.cut(2);
    assert_eq!(tree.child(0, 7), Some(1), "it has the token that blanks have");
}

#[test]
fn what_is_wrong_is_refused() {
    let mut tree = DraftTree::new(7, 4, false);
    assert!(tree.offer(1, &[1], &[0.5]).is_err());
    assert!(tree.offer(0, &[1, 2], &[0.5]).is_err());
    assert!(tree.offer_path(&[1], &[], 2).is_err());
}

/// Every earlier place and length, one by one.
fn found(text: &[i64], shortest: usize, longest: usize) -> Option<Hit> {
    for matched in (shortest..=longest.min(text.len())).rev() {
        let last = &text[text.len() - matched..];
        for start in (matched..text.len()).rev() {
            if &text[start - matched..start] == last {
                return Some(Hit { start, matched });
            }
        }
    }
    None
}

#[test]
fn lookups_find_the_longest_then_latest_match() {
    let mut hits = 0;
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let length = random.below(30);
        let text: Vec<i64> = (0..length).map(|_| random.below(3) as i64).collect();
        let hit = find_continuation(&text, 2, 4);
        assert_eq!(hit, found(&text, 2, 4), "{text:?}");
        hits += usize::from(hit.is_some());
    }
    assert!(hits > 100);
}

fn plan() -> Plan {
    Plan {
        most_nodes: 8,
        most_levels: 2,
        width: 2,
        trust: vec![1.0, 1.5, 0.5],
        covered: vec![0.5, 0.8, 0.2],
        found: vec![vec![0.5, 0.5, 0.4], vec![0.5, 0.9, 1.2]],
        levels: vec![0.1, 0.1],
        full: vec![1.0, 1.0, 5.0],
        tail: None,
        rate: 1.0,
        share: 1.0,
    }
}

#[test]
fn tables_serve_beyond_their_end_with_the_last_entry() {
    let plan = plan();
    assert_eq!((plan.trust(1), plan.trust(2), plan.trust(9)), (1.0, 0.5, 0.5));
    assert_eq!(plan.found_scores(1, 3), [0.5, 0.2, 0.08000000000000002]);
    assert_eq!(plan.found_scores(7, 2), [0.9, 0.9], "a share is at most 1");
}

#[test]
fn a_first_level_is_worth_its_time_or_not() {
    let mut plan = plan();
    assert!(plan.worth_asking(0.2));
    assert!(!plan.worth_asking(0.1), "0.1 * 0.8 is less than the level takes");
    plan.most_levels = 0;
    assert!(!plan.worth_asking(1.0), "no more levels than there may be");
}

#[test]
fn a_further_level_must_bring_more_than_what_it_drives_out() {
    let mut plan = plan();
    plan.full = vec![1.0, 1.0, 1.0, 5.0];
    plan.covered = vec![0.5, 0.5, 0.8];
    let worth = |plan: &Plan, level, scores: &[f64]| {
        plan.worth_a_level(level, &[scores.to_vec()], &[scores[1..].to_vec()])
    };
    assert!(worth(&plan, 1, &[1.0, 0.6]), "0.6 * 0.8 * 0.55 in a place that costs nothing");
    assert!(!worth(&plan, 1, &[1.0, 0.6, 0.3]), "it would drive out nearly as much");
    assert!(!worth(&plan, 1, &[1.0, 0.2]), "too little");
    assert!(!worth(&plan, 2, &[1.0, 0.6]), "no more levels than there may be");
    plan.width = 1;
    assert!(worth(&plan, 1, &[1.0, 0.2]), "0.2 * 0.8, of which a chain gets all");
}

#[test]
fn nodes_that_cost_more_than_they_bring_are_not_verified() {
    let plan = plan();
    assert_eq!(plan.best_size(&[vec![1.0, 0.4, 0.3]], 1, false), 2);
    assert_eq!(plan.best_size(&[vec![1.0, 0.4, 0.3]], 3, false), 3, "as many as must be");
    assert_eq!(plan.best_size(&[], 1, false), 1);
    let short = Plan { levels: vec![], ..plan };
    assert!(short.check().is_err());
}
