//! A pool of threads of our own: woken for a pass, spinning for a moment after it, then parked.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::team::{Rendezvous, Stopped, Team, spin_until};
use crate::error::{CoreError, Result};

/// What every thread of a pass runs.
type Program<'a> = dyn Fn(&Team<'_>) -> std::result::Result<(), Stopped> + Sync + 'a;

/// Looks for new work before a thread parks, some tens of microseconds.
const SPINS: usize = 1_000;

/// A program and the team it is run by, as a worker is given it.
#[derive(Clone, Copy)]
struct Job {
    program: *const Program<'static>,
    rendezvous: *const Rendezvous,
}

/// What the pool and one of its threads share.
struct Slot {
    job: Mutex<Option<Job>>,
    given: AtomicUsize,
    done: AtomicUsize,
    failure: Mutex<Option<String>>,
}

// SAFETY: the pointers of a job are used only between `given` and `done`, while `Pool::run`, which
// owns what they point to, waits.
unsafe impl Send for Slot {}
// SAFETY: as above.
unsafe impl Sync for Slot {}

struct Worker {
    slot: Arc<Slot>,
    handle: JoinHandle<()>,
}

/// The threads of one process.
struct Pool {
    process: u32,
    busy: AtomicBool,
    workers: Mutex<Vec<Worker>>,
}

static POOL: AtomicPtr<Pool> = AtomicPtr::new(std::ptr::null_mut());

/// The pool of this process. A forked child has none of its parent's threads, so it gets its own;
/// the parent's is left as it is, for it may have been in use.
fn pool() -> &'static Pool {
    let process = std::process::id();
    loop {
        let found = POOL.load(Ordering::Acquire);
        // SAFETY: pools are never freed.
        if let Some(pool) = unsafe { found.as_ref() }
            && pool.process == process
        {
            return pool;
        }
        let fresh = Box::into_raw(Box::new(Pool {
            process,
            busy: AtomicBool::new(false),
            workers: Mutex::new(Vec::new()),
        }));
        if POOL.compare_exchange(found, fresh, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: nobody else has seen it.
            drop(unsafe { Box::from_raw(fresh) });
        }
    }
}

/// Runs `program` on up to `threads` threads at once, this one among them. When the pool is at work
/// for somebody else, this thread does it all: results do not depend on it.
///
/// # Errors
/// [`CoreError::Thread`] if the program panicked.
pub fn run(threads: usize, shares: usize, program: &Program<'_>) -> Result<()> {
    let pool = pool();
    let alone = threads <= 1
        || pool.busy.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err();
    if alone {
        let rendezvous = Rendezvous::new(1, shares);
        return guarded(&rendezvous, program).map_err(|reason| CoreError::Thread { reason });
    }
    let outcome = pool.run(threads, shares, program);
    pool.busy.store(false, Ordering::Release);
    outcome
}

impl Pool {
    fn run(&self, threads: usize, shares: usize, program: &Program<'_>) -> Result<()> {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        while workers.len() + 1 < threads {
            match Worker::spawn() {
                Ok(worker) => workers.push(worker),
                // Fewer threads than asked for: slower, not wrong.
                Err(_) => break,
            }
        }
        let helpers = &workers[..workers.len().min(threads - 1)];
        let rendezvous = Rendezvous::new(helpers.len() + 1, shares);
        // SAFETY: only the lifetime changes; nobody uses the job once `finish` has returned.
        let program_ptr =
            unsafe { std::mem::transmute::<*const Program<'_>, *const Program<'static>>(program) };
        let job = Job { program: program_ptr, rendezvous: &raw const rendezvous };
        for helper in helpers {
            helper.give(job);
        }
        let mut failure = guarded(&rendezvous, program).err();
        for helper in helpers {
            failure = failure.or(helper.finish());
        }
        failure.map_or(Ok(()), |reason| Err(CoreError::Thread { reason }))
    }
}

impl Worker {
    fn spawn() -> std::io::Result<Self> {
        let slot = Arc::new(Slot {
            job: Mutex::new(None),
            given: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            failure: Mutex::new(None),
        });
        let own = Arc::clone(&slot);
        let handle = thread::Builder::new().name("sedac-pass".into()).spawn(move || own.serve())?;
        Ok(Self { slot, handle })
    }

    fn give(&self, job: Job) {
        *self.slot.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        self.slot.given.fetch_add(1, Ordering::Release);
        self.handle.thread().unpark();
    }

    /// Waits until the job is done; says what went wrong.
    fn finish(&self) -> Option<String> {
        let given = self.slot.given.load(Ordering::Relaxed);
        spin_until(|| self.slot.done.load(Ordering::Acquire) == given);
        self.slot.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Slot {
    fn serve(&self) {
        let mut served = 0;
        loop {
            let mut spins = 0;
            while self.given.load(Ordering::Acquire) == served {
                if spins < SPINS {
                    spins += 1;
                    std::hint::spin_loop();
                } else {
                    thread::park();
                }
            }
            served += 1;
            let job = self.job.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(job) = job {
                // SAFETY: `Pool::run` keeps both alive until `done` says that we are through.
                let (rendezvous, program) = unsafe { (&*job.rendezvous, &*job.program) };
                if let Err(reason) = guarded(rendezvous, program) {
                    *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                }
            }
            self.done.store(served, Ordering::Release);
        }
    }
}

/// Runs the program; a panic stops the team and is handed on as words.
fn guarded(rendezvous: &Rendezvous, program: &Program<'_>) -> std::result::Result<(), String> {
    match catch_unwind(AssertUnwindSafe(|| program(&Team::new(rendezvous)))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Stopped)) => Err("another thread failed".to_owned()),
        Err(panic) => {
            rendezvous.stop();
            Err(words(panic.as_ref()))
        }
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into())
}
