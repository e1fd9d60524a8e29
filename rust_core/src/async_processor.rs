//! A worker thread behind a bounded queue.
//!
//! Who submits never waits for the worker: a full queue refuses what it is given and counts it. What
//! was processed is handed back to the submitting side to be dropped there, so that the worker never
//! touches what belongs to an interpreter. A forked child, which has none of its parent's threads,
//! gets a queue, a worker and a sink of its own at its first use.

use std::collections::VecDeque;
use std::mem;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{CoreError, Result};

/// What the worker feeds.
pub trait Sink: Clone + Send + 'static {
    /// One submission.
    type Item: Send + 'static;

    /// How many events an item stands for.
    fn weight(item: &Self::Item) -> u64;

    /// Takes an item in.
    fn take(&mut self, item: &Self::Item);
}

/// What became of the events of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Events submitted; those below add up to it.
    pub sent: u64,
    /// Events that the sink has.
    pub taken: u64,
    /// Events that a full or closed queue refused.
    pub dropped: u64,
    /// Events on their way.
    pub waiting: u64,
}

/// Feeds a sink from a thread of its own.
pub struct AsyncBatchProcessor<S: Sink> {
    prototype: S,
    capacity: usize,
    linger: Duration,
    running: AtomicPtr<Running<S>>,
}

/// Queue, sink and worker of one process.
struct Running<S: Sink> {
    process: u32,
    shared: Arc<Shared<S>>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

struct Shared<S: Sink> {
    capacity: usize,
    linger: Duration,
    queue: Mutex<Queue<S::Item>>,
    /// Tells the worker of items.
    arrived: Condvar,
    /// Tells who waits in `flush`.
    done: Condvar,
    sink: Mutex<S>,
}

struct Queue<T> {
    items: VecDeque<T>,
    /// What was processed and is to be dropped by who submits next.
    spent: VecDeque<T>,
    counts: Counts,
    hurry: bool,
    closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Sink> AsyncBatchProcessor<S> {
    /// Starts the worker.
    ///
    /// `capacity` items may wait; after an item has come the worker waits for more during `linger`,
    /// unless the queue fills up or somebody asks for a flush.
    ///
    /// # Errors
    /// [`CoreError::Value`] if nothing may wait, [`CoreError::Thread`] if no thread can be had.
    pub fn new(prototype: S, capacity: usize, linger: Duration) -> Result<Self> {
        if capacity == 0 {
            return Err(CoreError::value("capacity", "at least 1", 0.0));
        }
        let first = Running::start(&prototype, capacity, linger);
        if let Err(reason) = &first.1 {
            return Err(CoreError::Thread { reason: reason.to_string() });
        }
        let running = AtomicPtr::new(Box::into_raw(Box::new(first.0)));
        Ok(Self { prototype, capacity, linger, running })
    }

    /// Hands an item over; false if the queue was full or closed, which is counted.
    pub fn submit(&self, item: S::Item) -> bool {
        let shared = &self.running().shared;
        let weight = S::weight(&item);
        let mut queue = lock(&shared.queue);
        queue.counts.sent += weight;
        let refused = queue.closed || queue.items.len() >= shared.capacity;
        let mut held = Some(item);
        if refused {
            queue.counts.dropped += weight;
        } else {
            queue.counts.waiting += weight;
            queue.items.extend(held.take());
            let waiting = queue.items.len();
            if waiting == 1 || waiting == shared.hurry_at() {
                shared.arrived.notify_one();
            }
        }
        let spent = mem::take(&mut queue.spent);
        drop(queue);
        // Destructors run here, without the lock and on a thread that may run them.
        drop((spent, held));
        !refused
    }

    /// Waits until the sink has everything that was submitted before; false if that took too long.
    pub fn flush(&self, timeout: Duration) -> bool {
        let shared = &self.running().shared;
        let begun = Instant::now();
        let mut queue = lock(&shared.queue);
        let Counts { taken, waiting, .. } = queue.counts;
        while queue.counts.taken < taken + waiting {
            let left = timeout.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return false;
            }
            queue.hurry = true;
            shared.arrived.notify_one();
            let waited = shared.done.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Drops what was processed; for the thread that may run the items' destructors.
    pub fn sweep(&self) {
        let spent = mem::take(&mut lock(&self.running().shared.queue).spent);
        drop(spent);
    }

    /// Lets the worker finish what waits and end; from now on everything is dropped and counted.
    pub fn close(&self) {
        let running = self.running();
        running.stop();
        let worker = lock(&running.worker).take();
        if let Some(worker) = worker {
            // A worker that panicked has nothing more to say: what it left counts as waiting.
            let _ = worker.join();
        }
    }

    /// What became of the events so far.
    pub fn counts(&self) -> Counts {
        lock(&self.running().shared.queue).counts
    }

    /// Items that may wait.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Looks into the sink.
    pub fn read<R>(&self, look: impl FnOnce(&S) -> R) -> R {
        look(&lock(&self.running().shared.sink))
    }

    /// What belongs to this process; the parent's is left as it is, for it may have been in use.
    fn running(&self) -> &Running<S> {
        let process = std::process::id();
        loop {
            let found = self.running.load(Ordering::Acquire);
            // SAFETY: never null, and freed by `drop` alone.
            let running = unsafe { &*found };
            if running.process == process {
                return running;
            }
            // Without a thread the queue fills up, and what it drops is counted.
            let (fresh, _) = Running::start(&self.prototype, self.capacity, self.linger);
            let fresh = Box::into_raw(Box::new(fresh));
            let (set, keep) = (Ordering::AcqRel, Ordering::Acquire);
            if self.running.compare_exchange(found, fresh, set, keep).is_err() {
                // SAFETY: nobody else has seen it.
                drop(unsafe { Box::from_raw(fresh) });
            }
        }
    }
}

impl<S: Sink> Drop for AsyncBatchProcessor<S> {
    fn drop(&mut self) {
        let found = *self.running.get_mut();
        // SAFETY: never null, and nobody else can reach it any more.
        let running = unsafe { &*found };
        if running.process == std::process::id() {
            // The worker finishes by itself; nobody waits for it.
            running.stop();
            // SAFETY: as above.
            drop(unsafe { Box::from_raw(found) });
        }
    }
}

impl<S: Sink> Running<S> {
    fn start(prototype: &S, capacity: usize, linger: Duration) -> (Self, std::io::Result<()>) {
        let shared = Arc::new(Shared {
            capacity,
            linger,
            queue: Mutex::new(Queue {
                items: VecDeque::new(),
                spent: VecDeque::new(),
                counts: Counts::default(),
                hurry: false,
                closed: false,
            }),
            arrived: Condvar::new(),
            done: Condvar::new(),
            sink: Mutex::new(prototype.clone()),
        });
        let own = Arc::clone(&shared);
        let spawned =
            thread::Builder::new().name("sedac-metrics".into()).spawn(move || own.serve());
        let (worker, outcome) = match spawned {
            Ok(worker) => (Some(worker), Ok(())),
            Err(error) => (None, Err(error)),
        };
        let process = std::process::id();
        (Self { process, shared, worker: Mutex::new(worker) }, outcome)
    }

    fn stop(&self) {
        lock(&self.shared.queue).closed = true;
        self.shared.arrived.notify_one();
    }
}

impl<S: Sink> Shared<S> {
    /// Items from which the worker waits for no more.
    fn hurry_at(&self) -> usize {
        self.capacity.div_ceil(2)
    }

    fn serve(&self) {
        loop {
            let queue = lock(&self.queue);
            let idle = |queue: &mut Queue<S::Item>| queue.items.is_empty() && !queue.closed;
            let queue =
                self.arrived.wait_while(queue, idle).unwrap_or_else(PoisonError::into_inner);
            if queue.items.is_empty() {
                return;
            }
            let lingers = |queue: &mut Queue<S::Item>| {
                !queue.hurry && !queue.closed && queue.items.len() < self.hurry_at()
            };
            let waited = self.arrived.wait_timeout_while(queue, self.linger, lingers);
            let mut queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            queue.hurry = false;
            let items = mem::take(&mut queue.items);
            drop(queue);
            let mut weight = 0;
            let mut sink = lock(&self.sink);
            for item in &items {
                sink.take(item);
                weight += S::weight(item);
            }
            drop(sink);
            let mut queue = lock(&self.queue);
            queue.counts.taken += weight;
            queue.counts.waiting -= weight;
            queue.spent.extend(items);
            drop(queue);
            self.done.notify_all();
        }
    }
}

#[cfg(test)]
#[path = "async_processor_tests.rs"]
mod tests;
