//! The choice, kept for the whole process.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use parking_lot::RwLock;

use super::Bug;

/// No bug.
const NONE: u8 = u8::MAX;

static CHOSEN: AtomicU8 = AtomicU8::new(NONE);

type Hook = Arc<dyn Fn(&'static str) + Send + Sync>;

static HOOK: RwLock<Option<Hook>> = RwLock::new(None);

/// Whether this process has `bug`.
pub fn planted(bug: Bug) -> bool {
    CHOSEN.load(Ordering::Relaxed) == bug as u8
}

/// A planted bug; dropping it takes the bug out again.
#[derive(Debug)]
#[must_use = "the bug is taken out when this is dropped"]
pub struct Planted(());

/// Chooses `bug` for the whole process.
pub fn plant(bug: Bug) -> Planted {
    CHOSEN.store(bug as u8, Ordering::Relaxed);
    Planted(())
}

impl Drop for Planted {
    fn drop(&mut self) {
        CHOSEN.store(NONE, Ordering::Relaxed);
    }
}

/// Says that the moment `name` is reached: whoever watches is called, on this thread.
pub fn point(name: &'static str) {
    let hook = HOOK.read().clone();
    if let Some(hook) = hook {
        hook(name);
    }
}

/// Someone who watches the points; dropping it ends that.
#[must_use = "the watching ends when this is dropped"]
pub struct Watching(());

impl std::fmt::Debug for Watching {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watching")
    }
}

/// Calls `hook` at every point, on the thread that reaches it, in place of whoever watched before.
pub fn watch_points(hook: impl Fn(&'static str) + Send + Sync + 'static) -> Watching {
    *HOOK.write() = Some(Arc::new(hook));
    Watching(())
}

impl Drop for Watching {
    fn drop(&mut self) {
        *HOOK.write() = None;
    }
}

/// Ends the process, as SIGKILL would, when the point `name` is reached for the `nth` time, counted from 1.
pub fn abort_at(name: String, nth: u64) -> Watching {
    let left = std::sync::atomic::AtomicU64::new(nth);
    watch_points(move |reached| {
        if reached == name && left.fetch_sub(1, Ordering::Relaxed) == 1 {
            std::process::abort();
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_is_there_while_its_guard_lives() {
        assert!(!planted(Bug::TenantDropped));
        let guard = plant(Bug::TenantDropped);
        assert!(planted(Bug::TenantDropped) && !planted(Bug::LayerIgnored));
        drop(guard);
        assert!(!planted(Bug::TenantDropped));
    }

    #[test]
    fn points_are_seen_while_someone_watches() {
        let seen = Arc::new(RwLock::new(Vec::new()));
        let watching = watch_points({
            let seen = Arc::clone(&seen);
            move |name| seen.write().push(name)
        });
        point("one");
        point("two");
        drop(watching);
        point("three");
        assert_eq!(*seen.read(), ["one", "two"]);
    }
}
