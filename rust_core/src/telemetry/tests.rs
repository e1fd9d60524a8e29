use super::*;
use crate::buffer::{Element, TensorBuffer};
use crate::histogram::bounds;

fn buffer<T: Send + Sync + 'static>(values: Vec<T>, element: Element) -> Arc<TensorBuffer> {
    let (address, shape) = (values.as_ptr() as usize, vec![values.len()]);
    // SAFETY: the vector owns the memory and is not touched any more.
    Arc::new(unsafe { TensorBuffer::from_address(address, shape, element, values).unwrap() })
}

fn ints(values: &[i64]) -> Values<i64> {
    Values::of(buffer(values.to_vec(), Element::I64), "v", values.len(), "").unwrap()
}

fn floats(values: &[f32]) -> Values<f32> {
    Values::of(buffer(values.to_vec(), Element::F32), "v", values.len(), "").unwrap()
}

fn flags(values: &[u8]) -> Values<u8> {
    Values::of(buffer(values.to_vec(), Element::U8), "v", values.len(), "").unwrap()
}

fn statistics(log_size: usize) -> Statistics {
    let bounds = Bounds {
        risk: bounds(&[0.5, 1.0], "risk").unwrap(),
        confidence: bounds(&[0.5, 1.0], "confidence").unwrap(),
        token: bounds(&[0.01, 0.1], "token").unwrap(),
        call: bounds(&[1.0], "call").unwrap(),
    };
    Statistics::new(&[4, 9], 2, &bounds, log_size).unwrap()
}

const NAN: f32 = f32::NAN;

/// Three tokens: one left at the first checkpoint, one went through both, one does not count.
fn step() -> Step {
    Step {
        mode: 1,
        depth: 12,
        first: false,
        tokens: ints(&[70, 71, 72]),
        seconds: floats(&[0.05, 0.05, 0.05]),
        counts: Some(flags(&[1, 1, 0])),
        sources: None,
        checkpoints: Some(Checkpoints {
            layers: ints(&[4, 9]),
            thresholds: floats(&[1.0, 2.0]),
            left: ints(&[0, -1, 0]),
            risks: floats(&[0.25, NAN, 0.75, 0.8, 0.0, NAN]),
            confidences: floats(&[0.75, NAN, 0.25, 0.5, 1.0, NAN]),
            tries: flags(&[1, 0, 0, 1, 1, 0]),
            skipped: None,
        }),
        passes: 0,
        drafts: 0,
    }
}

#[test]
fn a_step_counts_each_token_once_and_each_decision_once() {
    let mut found = statistics(10);
    let report = Report::Step(step());
    assert_eq!(Statistics::weight(&report), 2);
    found.take(&report);
    assert_eq!((found.tokens.clone(), found.full), (vec![0, 2], 1));
    let (first, second) = (&found.layers[0], &found.layers[1]);
    assert_eq!((first.decisions, first.tries, first.exits), (2, 1, 1));
    assert_eq!((second.decisions, second.tries, second.exits), (1, 1, 0));
    assert_eq!((first.threshold, second.threshold), (1.0, 2.0));
    assert_eq!((&first.risk.counts[..], first.risk.sum), (&[1, 1, 0][..], 1.0));
    assert_eq!(first.seconds.counts, [0, 1, 0]);
    assert_eq!(found.full_seconds.counts, [0, 1, 0]);
    let exits: u64 = found.layers.iter().map(|layer| layer.exits).sum();
    assert_eq!(exits + found.full, found.tokens.iter().sum::<u64>());
    let log: Vec<_> = found.log.iter().map(|one| (one.token, one.layer, one.exits)).collect();
    assert_eq!(log, [(70, 4, true), (71, 4, false), (71, 9, false)]);
}

#[test]
fn a_risk_that_is_not_finite_is_counted_apart() {
    let mut found = statistics(10);
    let mut one = step();
    if let Some(said) = &mut one.checkpoints {
        said.risks = floats(&[f32::INFINITY, NAN, 0.75, 0.8, 0.0, NAN]);
    }
    found.take(&Report::Step(one));
    assert_eq!((found.layers[0].risk.not_finite, found.layers[0].risk.sum), (1, 0.75));
    assert!(found.layers[0].risk.squares.is_finite());
}

#[test]
fn first_tokens_have_a_time_of_their_own() {
    let mut found = statistics(10);
    let one = Step { first: true, checkpoints: None, counts: None, ..step() };
    found.take(&Report::Step(one));
    assert_eq!((found.full, found.first_seconds.counts.clone()), (3, vec![3, 0]));
    assert_eq!(found.full_seconds.counts, [0, 0, 0]);
    assert!(found.log.iter().all(|one| one.layer == 12 && one.risk.is_nan() && !one.exits));
}

#[test]
fn drafts_are_told_apart_by_source() {
    let mut found = statistics(0);
    let sources = Some(flags(&[0, 2, 250]));
    let one = Step { sources, passes: 1, drafts: 6, checkpoints: None, counts: None, ..step() };
    found.take(&Report::Step(one));
    assert_eq!((found.sources, found.passes, found.drafts), ([1, 0, 2], 1, 6));
    assert!(found.log.is_empty());
}

#[test]
fn the_log_keeps_the_last_decisions() {
    let mut found = statistics(3);
    for token in 0..8 {
        let decision = Decision {
            token,
            layer: 9,
            risk: 0.5,
            threshold: 1.0,
            confidence: 0.5,
            exits: token % 2 == 0,
            skipped: 0.75,
            seconds: 0.02,
        };
        found.take(&Report::Decision(decision));
    }
    assert_eq!(found.log.iter().map(|one| one.token).collect::<Vec<_>>(), [5, 6, 7]);
    let layer = &found.layers[1];
    assert_eq!((layer.decisions, layer.exits, layer.skipped), (8, 4, 3.0));
    assert!(found.without_log().log.is_empty());
    assert_eq!(found.without_log().layers[1].decisions, 8);
}

#[test]
fn occurrences_beyond_the_bound_are_counted_together() {
    let mut found = statistics(0);
    for at in 0..MOST_OCCURRENCES + 5 {
        found.take(&Report::Occurrence(format!("kind {at}")));
    }
    found.take(&Report::Occurrence("kind 0".into()));
    assert_eq!(found.occurrences["kind 0"], 2);
    assert_eq!(found.occurrences[OTHERS], 5);
    assert_eq!(found.occurrences.len(), MOST_OCCURRENCES + 1);
}

#[test]
fn a_layer_is_watched_once() {
    let empty = Bounds {
        risk: bounds(&[], "").unwrap(),
        confidence: bounds(&[], "").unwrap(),
        token: bounds(&[], "").unwrap(),
        call: bounds(&[], "").unwrap(),
    };
    assert!(Statistics::new(&[4, 9, 4], 1, &empty, 0).is_err());
    assert!(Statistics::new(&[], 1, &empty, 0).is_ok());
}
