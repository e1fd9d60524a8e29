//! What the threads of one pass share: a barrier, and counters by which work is dealt out.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Another thread of the team failed, so that no barrier will be passed any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped;

/// Looks at a flag that another core is about to change, before the processor is offered to others.
const SPINS: usize = 2_000;

/// Waits until `done`, spinning for a while and then yielding.
pub(super) fn spin_until(mut done: impl FnMut() -> bool) {
    let mut spins = 0;
    while !done() {
        if spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// The state of one pass.
#[derive(Debug)]
pub struct Rendezvous {
    size: usize,
    arrived: AtomicUsize,
    generation: AtomicUsize,
    stopped: AtomicBool,
    counters: Vec<AtomicUsize>,
}

impl Rendezvous {
    /// For `size` threads that share out work at most `shares` times.
    #[must_use]
    pub fn new(size: usize, shares: usize) -> Self {
        Self {
            size,
            arrived: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            counters: std::iter::repeat_with(|| AtomicUsize::new(0)).take(shares).collect(),
        }
    }

    /// Lets everybody who waits, now or later, go with [`Stopped`].
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }
}

/// One thread's place in the team. All threads make the same calls in the same order.
#[derive(Debug)]
pub struct Team<'a> {
    rendezvous: &'a Rendezvous,
    shares: Cell<usize>,
}

impl<'a> Team<'a> {
    /// A place.
    #[must_use]
    pub fn new(rendezvous: &'a Rendezvous) -> Self {
        Self { rendezvous, shares: Cell::new(0) }
    }

    /// Waits for all; what they wrote before is seen after.
    ///
    /// # Errors
    /// [`Stopped`] if a thread failed.
    pub fn wait(&self) -> Result<(), Stopped> {
        let all = self.rendezvous;
        if all.size == 1 {
            return Ok(());
        }
        let generation = all.generation.load(Ordering::Acquire);
        if all.arrived.fetch_add(1, Ordering::AcqRel) + 1 == all.size {
            all.arrived.store(0, Ordering::Relaxed);
            all.generation.store(generation.wrapping_add(1), Ordering::Release);
        } else {
            spin_until(|| {
                all.generation.load(Ordering::Acquire) != generation
                    || all.stopped.load(Ordering::Acquire)
            });
        }
        if all.stopped.load(Ordering::Acquire) { Err(Stopped) } else { Ok(()) }
    }

    /// Deals out `items` in ranges that are multiples of `grain`, large ones first, to whoever
    /// comes. Does not wait for the others.
    pub fn share(&self, items: usize, grain: usize, mut work: impl FnMut(Range<usize>)) {
        let all = self.rendezvous;
        let turn = self.shares.replace(self.shares.get() + 1);
        if all.size == 1 {
            return work(0..items);
        }
        let counter = &all.counters[turn];
        loop {
            let taken = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |start| {
                (start < items).then(|| start + self.portion(items - start, grain))
            });
            let Ok(start) = taken else { return };
            work(start..(start + self.portion(items - start, grain)).min(items));
        }
    }

    /// What one thread takes when `left` items are left: less and less, so that all end together.
    fn portion(&self, left: usize, grain: usize) -> usize {
        (left / (2 * self.rendezvous.size) / grain).max(1) * grain
    }

    /// How many threads there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.rendezvous.size
    }
}
