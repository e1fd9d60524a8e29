use super::*;

const LONG: Duration = Duration::from_secs(30);

/// Adds numbers up; waits at a gate while there is one.
#[derive(Clone, Default)]
struct Sum {
    total: u64,
    gate: Arc<Mutex<()>>,
}

impl Sink for Sum {
    type Item = (u64, Arc<()>);

    fn weight(_: &Self::Item) -> u64 {
        1
    }

    fn take(&mut self, item: &Self::Item) {
        drop(lock(&self.gate));
        self.total += item.0;
    }
}

fn started(capacity: usize, linger: Duration) -> (AsyncBatchProcessor<Sum>, Arc<Mutex<()>>) {
    let sum = Sum::default();
    let gate = Arc::clone(&sum.gate);
    (AsyncBatchProcessor::new(sum, capacity, linger).unwrap(), gate)
}

#[test]
fn everything_arrives_and_is_handed_back() {
    let (processor, _) = started(64, LONG);
    let mark = Arc::new(());
    for value in 1..=10 {
        assert!(processor.submit((value, Arc::clone(&mark))));
    }
    // A flush does not wait for the worker's linger to end.
    assert!(processor.flush(LONG));
    assert_eq!(processor.read(|sum| sum.total), 55);
    processor.sweep();
    assert_eq!(Arc::strong_count(&mark), 1);
    let counts = processor.counts();
    assert_eq!(counts, Counts { sent: 10, taken: 10, dropped: 0, waiting: 0 });
}

#[test]
fn a_full_queue_refuses_and_counts_and_never_waits() {
    let (processor, gate) = started(4, Duration::ZERO);
    let shut = lock(&gate);
    let accepted = (0..100).filter(|_| processor.submit((1, Arc::new(())))).count() as u64;
    // Four wait, and some may already be with the worker.
    assert!((4..=8).contains(&accepted), "{accepted}");
    assert!(!processor.flush(Duration::from_millis(20)));
    drop(shut);
    assert!(processor.flush(LONG));
    let counts = processor.counts();
    assert_eq!((counts.sent, counts.taken), (100, accepted));
    assert_eq!(counts.taken + counts.dropped, counts.sent);
    assert_eq!(processor.read(|sum| sum.total), accepted);
}

#[test]
fn nothing_is_lost_between_threads() {
    let (processor, _) = started(8, Duration::from_millis(1));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2_000 {
                    let _ = processor.submit((1, Arc::new(())));
                }
            });
        }
    });
    assert!(processor.flush(LONG));
    let counts = processor.counts();
    assert_eq!(counts.sent, 8_000);
    assert_eq!(counts.taken + counts.dropped, counts.sent);
    assert_eq!(processor.read(|sum| sum.total), counts.taken);
}

#[test]
fn closing_finishes_what_waits_and_refuses_the_rest() {
    let (processor, _) = started(8, LONG);
    assert!(processor.submit((7, Arc::new(()))));
    processor.close();
    assert_eq!(processor.read(|sum| sum.total), 7);
    assert!(!processor.submit((1, Arc::new(()))));
    assert!(processor.flush(LONG));
    processor.close();
    assert_eq!(processor.counts(), Counts { sent: 2, taken: 1, dropped: 1, waiting: 0 });
}

#[test]
fn a_queue_that_nothing_fits_into_is_refused() {
    assert!(AsyncBatchProcessor::new(Sum::default(), 0, LONG).is_err());
}
