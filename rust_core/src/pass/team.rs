//! What the threads of one pass share: a barrier, and counters by which work is dealt out.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

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
    places: AtomicUsize,
    arrived: AtomicUsize,
    generation: AtomicUsize,
    stopped: AtomicBool,
    /// For each sharing and thread, how much is taken of its part: from the front in the lower
    /// half, from the back in the upper half.
    taken: Vec<AtomicU64>,
}

impl Rendezvous {
    /// For `size` threads that share out work at most `shares` times.
    #[must_use]
    pub fn new(size: usize, shares: usize) -> Self {
        Self {
            size,
            places: AtomicUsize::new(0),
            arrived: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            taken: std::iter::repeat_with(|| AtomicU64::new(0)).take(shares * size).collect(),
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
    place: usize,
    shares: Cell<usize>,
}

impl<'a> Team<'a> {
    /// The next free place.
    #[must_use]
    pub fn new(rendezvous: &'a Rendezvous) -> Self {
        let place = rendezvous.places.fetch_add(1, Ordering::Relaxed);
        debug_assert!(place < rendezvous.size, "more threads than the team has places");
        Self { rendezvous, place, shares: Cell::new(0) }
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

    /// Deals out `items` in ranges that are multiples of `grain`. Each thread works through a part
    /// of its own from the front, so that it reads on where it stopped, and then takes from the
    /// back of what others have left. Does not wait for the others.
    pub fn share(&self, items: usize, grain: usize, mut work: impl FnMut(Range<usize>)) {
        let (size, turn) = (self.rendezvous.size, self.shares.get());
        self.shares.set(turn + 1);
        if size == 1 {
            return work(0..items);
        }
        let grains = items.div_ceil(grain);
        for step in 0..size {
            let owner = (self.place + step) % size;
            let part = owner * grains / size..(owner + 1) * grains / size;
            let taken = &self.rendezvous.taken[turn * size + owner];
            while let Some(own) = take(taken, part.len(), step > 0) {
                let (from, to) = (part.start + own.start, part.start + own.end);
                work(from * grain..(to * grain).min(items));
            }
        }
    }

    /// How many threads there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.rendezvous.size
    }
}

/// Takes half of what is left of a part, at its front or its back; `None` if nothing is left.
fn take(taken: &AtomicU64, len: usize, back: bool) -> Option<Range<usize>> {
    let mut found = taken.load(Ordering::Relaxed);
    loop {
        let (front, behind) = (found & u64::from(u32::MAX), found >> 32);
        let left = len as u64 - front - behind;
        if left == 0 {
            return None;
        }
        let some = left.div_ceil(2);
        let next = if back { found + (some << 32) } else { found + some };
        match taken.compare_exchange_weak(found, next, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => {
                let start = if back { len as u64 - behind - some } else { front };
                return Some(start as usize..(start + some) as usize);
            }
            Err(now) => found = now,
        }
    }
}
