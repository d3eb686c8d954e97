//! Threads for parallel loops.

/// A fixed set of threads for parallel loops; the calling thread takes part. Results never depend on scheduling.
pub struct Pool {
    threads: usize,
}

impl Pool {
    /// A pool in which `threads` threads work on a loop, the caller included; 0 counts as 1.
    pub fn new(threads: usize) -> Self {
        Self {
            threads: threads.max(1),
        }
    }

    /// Threads that work on a loop, the caller included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `task(0..tasks)`, each index once, and returns when all are done.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        for index in 0..tasks {
            task(index);
        }
    }
}
