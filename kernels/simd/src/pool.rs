//! Threads for parallel loops.
//!
//! A decode step of a small model has a few hundred loops of some tens of microseconds, so waking a thread by the kernel
//! for each would cost more than the work. Workers therefore watch for the next loop for [`WATCH`] before they park.
//!
//! A loop is published in `Shared::state`: a generation, an open bit, and the number of workers inside. A worker joins by
//! adding itself while the loop is open; the caller works too, closes the loop when no index is left, and returns when
//! nobody is inside. A worker that wakes late finds the loop closed and never sees its closure.

use std::{
    any::Any,
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long an idle worker watches for work before it parks.
const WATCH: Duration = Duration::from_micros(200);
/// Looks at the state between two looks at the clock.
const LOOKS: usize = 64;
/// Most threads of a pool.
const THREADS_MAX: usize = 256;

const INSIDE: u64 = 0xffff;
const OPEN: u64 = 1 << 16;
const GENERATION: u64 = 1 << 32;

/// A fixed set of threads for parallel loops; the calling thread takes part. Results never depend on scheduling.
///
/// Dropping it joins the threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

type Task = dyn Fn(usize) + Sync;
type Panic = Box<dyn Any + Send>;

/// What caller and workers share.
struct Shared {
    /// Generation in the upper half, [`OPEN`], workers inside in the lowest 16 bits.
    state: AtomicU64,
    /// The next index to take.
    next: AtomicUsize,
    /// The open loop. Written by the caller that holds `busy` while nobody is inside; read by workers inside.
    job: UnsafeCell<Option<Job>>,
    /// The first panic of the open loop. Written by whoever turned `panicked` true.
    panic: UnsafeCell<Option<Panic>>,
    panicked: AtomicBool,
    /// A loop is running: a second one runs on its own caller alone.
    busy: AtomicBool,
    stop: AtomicBool,
    /// Per worker: it is about to park, or has.
    parked: Vec<AtomicBool>,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const Task,
    tasks: usize,
}

// SAFETY: the cells follow the protocol on their fields: `job` is written only while nobody is inside and read only
// inside; `panic` is written by the one thread that turned `panicked` true and read after everyone has left. The atomics
// order those accesses, and the task behind the pointer is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as for `Sync`; a panic's payload is `Send`, and a task is `Sync`, so calling it from another thread is allowed.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool in which `threads` threads work on a loop, the caller included; 0 counts as 1, and at most 256. If the
    /// system gives fewer threads, the pool has fewer: see [`Pool::threads`].
    pub fn new(threads: usize) -> Self {
        let helpers = threads.clamp(1, THREADS_MAX) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut workers = Vec::with_capacity(helpers);
        for index in 0..helpers {
            let shared = Arc::clone(&shared);
            match thread::Builder::new()
                .name(format!("kernel-{}", index + 1))
                .spawn(move || shared.work(index))
            {
                Ok(worker) => workers.push(worker),
                Err(_) => break,
            }
        }
        Self { shared, workers }
    }

    /// Threads that work on a loop, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0..tasks)`, each index once, and returns when all are done. A loop started while another runs (by
    /// another thread, or from inside a task) is run by its caller alone.
    ///
    /// # Panics
    /// With the first panic of a task; the indices not yet started are then skipped.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let alone = self.workers.is_empty() || tasks < 2;
        if alone || self.shared.busy.swap(true, Ordering::Acquire) {
            (0..tasks).for_each(task);
            return;
        }
        self.open(tasks, task);
        self.shared.take(task, tasks);
        let panic = self.close();
        self.shared.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Runs `task(index, chunk)` over the chunks of `len` elements of `data`, the last perhaps shorter.
    ///
    /// # Panics
    /// If `len` is 0, or with the first panic of a task.
    pub fn run_chunks<T: Send>(&self, data: &mut [T], len: usize, task: &(dyn Fn(usize, &mut [T]) + Sync)) {
        let all = Disjoint::new(data);
        self.run(all.len.div_ceil(len), &|index| {
            let start = index * len;
            // SAFETY: each index runs once, chunks of different indices do not overlap, and `data` is borrowed mutably
            // until `run` returns.
            task(index, unsafe { all.slice(start, len.min(all.len - start)) });
        });
    }

    fn open(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: the lifetime is erased, not the type; `run` does not return before everyone has left the loop, and
        // workers use the pointer only inside.
        let task = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(task) };
        // SAFETY: this thread holds `busy`, and the last loop was closed and left: nobody else reads the cell.
        unsafe { *shared.job.get() = Some(Job { task, tasks }) };
        shared.next.store(0, Ordering::Relaxed);
        // One addition opens the loop and begins a generation; it also publishes the writes above.
        shared.state.fetch_add(GENERATION | OPEN, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.workers).take(tasks - 1) {
            if parked.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    fn close(&self) -> Option<Panic> {
        let shared = &*self.shared;
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0_usize;
        while shared.state.load(Ordering::Acquire) & INSIDE != 0 {
            looks += 1;
            // A worker may have lost its core to another process.
            if looks.is_multiple_of(4096) {
                thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
        if !shared.panicked.swap(false, Ordering::Acquire) {
            return None;
        }
        // SAFETY: the loop is closed and nobody is inside, so the writer of the cell has left.
        unsafe { (*shared.panic.get()).take() }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of tasks; there is nothing to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Takes indices until none is left.
    fn take(&self, task: &(dyn Fn(usize) + Sync), tasks: usize) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= tasks {
                    break;
                }
                task(index);
            }
        }));
        if let Err(panic) = outcome {
            self.next.store(tasks, Ordering::Relaxed);
            if !self.panicked.swap(true, Ordering::AcqRel) {
                // SAFETY: only the thread that turned `panicked` true writes, and the caller reads after all have left.
                unsafe { *self.panic.get() = Some(panic) };
            }
        }
    }

    /// A worker's life.
    fn work(&self, index: usize) {
        let mut seen = 0;
        while let Some(generation) = self.wait(index, seen) {
            seen = generation;
            if !self.enter(generation) {
                continue;
            }
            // SAFETY: inside: the caller keeps the cell and the task until this worker has left.
            let job = unsafe { *self.job.get() };
            if let Some(Job { task, tasks }) = job {
                // SAFETY: as above; the pointer came from a reference.
                self.take(unsafe { &*task }, tasks);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Adds this worker to those inside, unless the loop of `generation` is closed by now.
    fn enter(&self, generation: u64) -> bool {
        let join = |state: u64| (state >> 32 == generation && state & OPEN != 0).then_some(state + 1);
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, join)
            .is_ok()
    }

    /// The generation after `seen`, once it has begun; `None` when the pool ends.
    fn wait(&self, index: usize, seen: u64) -> Option<u64> {
        let mut begun = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let generation = self.state.load(Ordering::SeqCst) >> 32;
                if self.stop.load(Ordering::Relaxed) {
                    return None;
                }
                if generation != seen {
                    return Some(generation);
                }
                std::hint::spin_loop();
            }
            if begun.elapsed() < WATCH {
                continue;
            }
            // Announce, look once more, park: an opener that missed the announcement is seen by the look.
            self.parked[index].store(true, Ordering::SeqCst);
            if self.state.load(Ordering::SeqCst) >> 32 == seen && !self.stop.load(Ordering::SeqCst) {
                thread::park();
            }
            self.parked[index].store(false, Ordering::SeqCst);
            begun = Instant::now();
        }
    }
}

/// A slice that tasks write at places of their own.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out disjoint parts (the contract of `slice`), like `split_at_mut`, to threads that may own a `T`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self {
            start: data.as_mut_ptr(),
            len: data.len(),
            borrow: std::marker::PhantomData,
        }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// While the result lives, no other overlapping part may be asked for.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part within the slice");
        // SAFETY: within the borrowed slice as just asserted, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn each_index_runs_once() {
        for threads in [0, 1, 2, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 3, 100] {
                for _ in 0..50 {
                    let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                    pool.run(tasks, &|index| {
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(
                        counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                        "{threads} {tasks}"
                    );
                }
            }
        }
    }

    #[test]
    fn parked_workers_come_back() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            thread::sleep(WATCH * 3);
            let mut data = [0_usize; 10];
            pool.run_chunks(&mut data, 3, &|index, part| part.fill(index));
            assert_eq!(data, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for bad in [0, 7, 63] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|index| assert!(index != bad, "task {bad}"));
            }));
            let message = caught.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(*message, format!("task {bad}"));
            let sum = AtomicUsize::new(0);
            pool.run(10, &|index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn loops_inside_and_beside_a_loop_run_too() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(4, &|_| {
                            pool.run(5, &|index| {
                                sum.fetch_add(index, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 100 * 4 * 10);
    }
}
