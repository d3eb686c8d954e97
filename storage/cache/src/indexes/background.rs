//! Work that nobody waits for: a bounded queue, a thread of the lowest priority, and a way to step aside.
//!
//! What is queued is worth doing but never needed: whoever wants its result makes it himself if it is not there. So a full queue
//! drops, a stop drops, and while the owner says that callers wait ([`Busy`]) nothing is begun.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::{Condvar, Mutex, RwLock};

use crate::cache::Shared;

/// How long the thread steps aside before it asks again.
const ASIDE: Duration = Duration::from_millis(5);

/// How often, and how long each time, the thread looks for more by itself before it sleeps: whoever queues something in a burst does
/// not pay for waking it.
const LOOKS: u32 = 20;
const LINGER: Duration = Duration::from_millis(5);

/// Answers whether callers wait for threads.
pub(crate) type BusyProbe = Arc<dyn Fn() -> bool + Send + Sync>;

/// Whether work that callers wait for is waiting itself, as far as the owner of the cache can tell.
#[derive(Default)]
pub(crate) struct Busy(RwLock<Option<BusyProbe>>);

impl Busy {
    pub(crate) fn set(&self, probe: BusyProbe) {
        *self.0.write() = Some(probe);
    }

    fn now(&self) -> bool {
        let probe = self.0.read().clone();
        probe.is_some_and(|probe| probe())
    }
}

/// Items that wait for the thread, oldest first.
#[derive(Debug)]
pub(crate) struct Background<T> {
    name: &'static str,
    queue_max: usize,
    queue: Mutex<Queue<T>>,
    wake: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What a thread has to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Items at work: one or none.
    pub(crate) running: u64,
    /// Items that wait.
    pub(crate) waiting: u64,
    /// Times that the thread stepped aside.
    pub(crate) aside: u64,
}

#[derive(Debug)]
struct Queue<T> {
    items: VecDeque<T>,
    /// Whether the thread is at one that it took.
    running: bool,
    /// Whether it must be woken.
    asleep: bool,
    /// Times that it stepped aside.
    aside: u64,
    stop: bool,
}

impl<T: Send + 'static> Background<T> {
    pub(crate) fn new(name: &'static str, queue_max: usize) -> Self {
        let queue = Queue {
            items: VecDeque::new(),
            running: false,
            asleep: false,
            aside: 0,
            stop: false,
        };
        Self {
            name,
            queue_max,
            queue: Mutex::new(queue),
            wake: Condvar::new(),
            thread: Mutex::default(),
        }
    }

    /// Starts the thread, which does `work` on one item after another; once.
    pub(crate) fn start(
        self: &Arc<Self>,
        shared: Weak<Shared>,
        work: impl Fn(&Arc<Shared>, T) + Send + 'static,
    ) -> std::io::Result<()> {
        let this = Arc::clone(self);
        let thread = std::thread::Builder::new().name(self.name.to_owned()).spawn(move || {
            if let Err(error) = kvasir_device::thread::lower_priority() {
                tracing::warn!(thread = this.name, %error, "cannot lower the priority of a background thread");
            }
            while let Some(item) = this.next() {
                let Some(shared) = shared.upgrade() else { return };
                work(&shared, item);
            }
        })?;
        *self.thread.lock() = Some(thread);
        Ok(())
    }

    /// Ends the thread after what it is at; what is queued is dropped.
    pub(crate) fn stop(&self) {
        self.queue.lock().stop = true;
        self.wake.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            // The last holder of the cache may be the thread itself.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!(thread = self.name, "a background thread panicked");
            }
        }
    }

    /// Queues an item; false if the queue is full.
    pub(crate) fn push(&self, item: T) -> bool {
        let mut queue = self.queue.lock();
        if queue.items.len() >= self.queue_max || queue.stop {
            return false;
        }
        queue.items.push_back(item);
        if queue.asleep {
            self.wake.notify_all();
        }
        true
    }

    /// Waits while callers wait for threads; false when the work should be given up.
    pub(crate) fn step_aside(&self, busy: &Busy) -> bool {
        let mut queue = self.queue.lock();
        let mut stepped = false;
        while !queue.stop {
            // The probe may take locks of its own.
            let wait = parking_lot::MutexGuard::unlocked(&mut queue, || busy.now());
            if !wait {
                break;
            }
            queue.aside += u64::from(!stepped);
            stepped = true;
            self.wake.wait_for(&mut queue, ASIDE);
        }
        !queue.stop
    }

    /// Waits for `time`, or less where the work should be given up: then false.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        let mut queue = self.queue.lock();
        if !queue.stop {
            self.wake.wait_for(&mut queue, time);
        }
        !queue.stop
    }

    pub(crate) fn load(&self) -> Load {
        let queue = self.queue.lock();
        Load {
            running: u64::from(queue.running),
            waiting: queue.items.len() as u64,
            aside: queue.aside,
        }
    }

    fn next(&self) -> Option<T> {
        let mut queue = self.queue.lock();
        queue.running = false;
        let mut looks = 0;
        loop {
            if queue.stop {
                return None;
            }
            if let Some(item) = queue.items.pop_front() {
                queue.running = true;
                return Some(item);
            }
            if looks < LOOKS {
                looks += 1;
                self.wake.wait_for(&mut queue, LINGER);
            } else {
                queue.asleep = true;
                self.wake.wait(&mut queue);
                (queue.asleep, looks) = (false, 0);
            }
        }
    }
}
