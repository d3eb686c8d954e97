//! The way out of the async threads for work that waits for the disk or keeps a processor busy.
//!
//! Each door has its number of threads (tokio's blocking pool, a part of it per door), so that a burst of one kind of
//! work cannot take the threads of another. Who waits before a door is bounded by the streams and calls that may be open.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A bounded pool. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    name: &'static str,
    threads: usize,
    permits: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

/// Why work did not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Lost {
    /// The door is closed: the store is stopping.
    #[error("the store is stopping: try again later, or go on without it")]
    Closed,
    /// The work panicked; the panic was logged.
    #[error("the store failed inside: its log says why")]
    Panicked,
}

impl Door {
    pub(crate) fn new(name: &'static str, threads: usize) -> Self {
        Self {
            name,
            threads: threads.min(Semaphore::MAX_PERMITS),
            permits: Arc::new(Semaphore::new(threads.min(Semaphore::MAX_PERMITS))),
            waiting: Arc::default(),
        }
    }

    /// Does `work` on a thread of this door, waiting for one as long as it takes.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Lost> {
        let permit = self.permit().await?;
        self.spawn(permit, work).await
    }

    /// Does `work`, or gives up if no thread is free within `wait`: then `None`.
    pub(crate) async fn run_within<T: Send + 'static>(
        &self,
        wait: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Option<T>, Lost> {
        match tokio::time::timeout(wait, self.permit()).await {
            Ok(permit) => self.spawn(permit?, work).await.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Starts `work` on up to `most` threads that have nothing better to do.
    pub(crate) fn start_on_idle(&self, most: usize, work: impl FnOnce() + Clone + Send + 'static) {
        for _ in 0..most {
            if !self.start_if_idle(work.clone()) {
                break;
            }
        }
    }

    /// Begins `work` on a thread that has nothing to do, and tells whether there was one. Nobody waits for it but [`Self::drain`].
    pub(crate) fn start_if_idle(&self, work: impl FnOnce() + Send + 'static) -> bool {
        let Some(permit) = self.permit_if_idle() else {
            return false;
        };
        let (span, name) = (tracing::Span::current(), self.name);
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let _in = span.enter();
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
                tracing::error!(door = name, "work panicked");
            }
        });
        true
    }

    /// The place of a thread that has nothing to do, for a thread of the caller's own that is none of the async ones. Who waits for a
    /// thread comes first: there is none then.
    pub(crate) fn permit_if_idle(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.permits).try_acquire_owned().ok()
    }

    /// Lets nobody in any more and waits until the last has left.
    pub(crate) async fn drain(&self) {
        let all = u32::try_from(self.threads).unwrap_or(u32::MAX);
        if let Ok(everyone) = self.permits.acquire_many(all).await {
            everyone.forget();
        }
        self.permits.close();
    }

    /// Its name, its threads, those at work, and those waiting for one.
    pub(crate) fn load(&self) -> (&'static str, usize, usize, usize) {
        let running = self.threads.saturating_sub(self.permits.available_permits());
        (self.name, self.threads, running, self.waiting.load(Ordering::Relaxed))
    }

    /// Whether somebody waits for a thread.
    pub(crate) fn has_queue(&self) -> bool {
        self.permits.available_permits() == 0 && self.waiting.load(Ordering::Relaxed) > 0
    }

    /// A thread of this door, waiting for it.
    pub(crate) async fn permit(&self) -> Result<OwnedSemaphorePermit, Lost> {
        let _waiting = Waiting::new(&self.waiting);
        Arc::clone(&self.permits)
            .acquire_owned()
            .await
            .map_err(|_| Lost::Closed)
    }

    /// Does `work` on the thread that `permit` stands for.
    pub(crate) async fn spawn<T: Send + 'static>(
        &self,
        permit: OwnedSemaphorePermit,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Lost> {
        let span = tracing::Span::current();
        // The permit goes along: work whose caller left still holds its thread.
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            span.in_scope(work)
        });
        task.await.map_err(|error| {
            if error.is_panic() {
                tracing::error!(door = self.name, %error, "work panicked");
                Lost::Panicked
            } else {
                Lost::Closed
            }
        })
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn bounded_sheds_drains_and_closes() {
        let door = Door::new("test", 1);
        let (go, wait) = mpsc::channel::<()>();
        let first = tokio::spawn({
            let door = door.clone();
            async move { door.run(move || wait.recv().is_ok()).await }
        });
        while door.load().2 == 0 {
            tokio::task::yield_now().await;
        }
        let short = Duration::from_millis(10);
        assert_eq!(door.run_within(short, || 1).await, Ok(None), "the only thread is taken");
        let drained = tokio::spawn({
            let door = door.clone();
            async move { door.drain().await }
        });
        tokio::time::sleep(short).await;
        assert!(!drained.is_finished(), "work is still going on");
        go.send(()).expect("a receiver");
        assert_eq!(first.await.expect("no panic"), Ok(true));
        drained.await.expect("no panic");
        assert_eq!(door.run(|| 1).await, Err(Lost::Closed));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_gives_the_thread_back() {
        let door = Door::new("test", 1);
        assert_eq!(door.run(|| panic!("on purpose")).await, Err::<(), _>(Lost::Panicked));
        assert_eq!(door.run(|| 5).await, Ok(5));
    }

    #[tokio::test]
    async fn idle_threads_help_and_busy_ones_are_left_alone() {
        let door = Door::new("test", 1);
        let (go, wait) = mpsc::channel::<()>();
        assert!(door.start_if_idle(move || assert!(wait.recv().is_ok())));
        assert!(!door.start_if_idle(|| panic!("the only thread is taken")));
        go.send(()).expect("a receiver");
        assert_eq!(door.run(|| 5).await, Ok(5), "it comes back");
        assert!(door.start_if_idle(|| panic!("on purpose")));
        door.drain().await;
        assert!(!door.start_if_idle(|| panic!("closed")));
    }
}
