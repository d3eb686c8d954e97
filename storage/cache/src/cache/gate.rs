//! [`ReadGate`]: how many reads of a slower tier run and wait, and how long a newcomer would have to wait.
//!
//! First come, first served, in batches. Knows nothing of what is read: counts, bytes and time.
//!
//! The estimate is the time the bytes inside need at the pace of late: `elapsed / bytes inside` of each finished batch, averaged.
//! With nothing read it halves every second, so that one bad second does not turn readers away for ever.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// Weight of a new sample in the pace.
const SAMPLE_WEIGHT: f64 = 0.125;
/// What the pace loses half of itself in, where nothing is read.
const HALF_LIFE: Duration = Duration::from_secs(1);

/// The way to a tier that is slow.
#[derive(Debug)]
pub(crate) struct ReadGate {
    reads_max: usize,
    waiting_max: usize,
    inside: Mutex<Inside>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inside {
    running: usize,
    running_bytes: u64,
    waiting: usize,
    waiting_bytes: u64,
    /// Tickets of those who wait, oldest first.
    line: VecDeque<u64>,
    next_ticket: u64,
    /// Nanoseconds per byte, all readers together.
    pace: f64,
    sampled: Option<Instant>,
}

/// How long a batch may wait and take.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Patience {
    /// The moment after which nobody wants the answer.
    pub(crate) deadline: Option<Instant>,
    /// Not worth it when waiting and reading take longer than this.
    pub(crate) worth: Option<Duration>,
}

/// Answer to a batch that wants in.
#[derive(Debug)]
pub(crate) enum Entry<'a> {
    /// Read now; the pass is given back on drop.
    In(Pass<'a>),
    /// The deadline passed while it waited.
    Late,
    /// It would have taken longer than its patience, so it did not wait at all.
    Estimated,
    /// Too many wait already.
    Full,
}

/// Leave to read a batch.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    gate: &'a ReadGate,
    reads: usize,
    bytes: u64,
    bytes_inside: u64,
    began: Instant,
}

impl ReadGate {
    /// At most `reads_max` reads at a time, and at most `waiting_max` that wait.
    pub(crate) fn new(reads_max: usize, waiting_max: usize) -> Self {
        Self {
            reads_max,
            waiting_max,
            inside: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Largest batch that may enter at once.
    pub(crate) fn reads_max(&self) -> usize {
        self.reads_max
    }

    /// Lets a batch of `reads` in, of `bytes` together, when those before it are in and there is place.
    pub(crate) fn enter(&self, reads: usize, bytes: u64, patience: Patience) -> Entry<'_> {
        let reads = reads.min(self.reads_max);
        let mut inside = self.inside.lock();
        let now = Instant::now();
        if patience.deadline.is_some_and(|deadline| now >= deadline) {
            return Entry::Late;
        }
        let estimate = inside.estimate(bytes, now);
        let too_long = |limit: Option<Duration>| limit.is_some_and(|limit| estimate > limit);
        if too_long(patience.worth) || too_long(patience.deadline.map(|deadline| deadline - now)) {
            return Entry::Estimated;
        }
        if inside.line.is_empty() && inside.running + reads <= self.reads_max {
            return Entry::In(self.pass(&mut inside, reads, bytes));
        }
        if inside.waiting + reads > self.waiting_max {
            return Entry::Full;
        }
        let ticket = inside.next_ticket;
        inside.next_ticket += 1;
        inside.line.push_back(ticket);
        inside.waiting += reads;
        inside.waiting_bytes += bytes;
        let mut late = false;
        while !late && (inside.line.front() != Some(&ticket) || inside.running + reads > self.reads_max) {
            late = match patience.deadline {
                Some(deadline) => self.changed.wait_until(&mut inside, deadline).timed_out(),
                None => {
                    self.changed.wait(&mut inside);
                    false
                }
            };
        }
        inside.line.retain(|other| *other != ticket);
        inside.waiting -= reads;
        inside.waiting_bytes -= bytes;
        // The next in line may fit beside this one, or instead of it.
        self.changed.notify_all();
        if late {
            return Entry::Late;
        }
        Entry::In(self.pass(&mut inside, reads, bytes))
    }

    /// Lets a batch in that nobody waits for: only while nobody else waits and half of the places are free. Waits for that at
    /// most `wait`.
    pub(crate) fn enter_idle(&self, reads: usize, bytes: u64, wait: Duration) -> Option<Pass<'_>> {
        let reads = reads.min(self.reads_max.div_ceil(2));
        let until = Instant::now() + wait;
        let mut inside = self.inside.lock();
        while !inside.line.is_empty() || inside.running + reads > self.reads_max.div_ceil(2) {
            if self.changed.wait_until(&mut inside, until).timed_out() {
                return None;
            }
        }
        Some(self.pass(&mut inside, reads, bytes))
    }

    /// Reads that run, and reads that wait.
    pub(crate) fn load(&self) -> (usize, usize) {
        let inside = self.inside.lock();
        (inside.running, inside.waiting)
    }

    fn pass(&self, inside: &mut Inside, reads: usize, bytes: u64) -> Pass<'_> {
        inside.running += reads;
        inside.running_bytes += bytes;
        Pass {
            gate: self,
            reads,
            bytes,
            bytes_inside: inside.running_bytes,
            began: Instant::now(),
        }
    }
}

impl Inside {
    fn estimate(&self, bytes: u64, now: Instant) -> Duration {
        let Some(sampled) = self.sampled else {
            return Duration::ZERO;
        };
        let idle = now.saturating_duration_since(sampled).as_secs_f64() / HALF_LIFE.as_secs_f64();
        let bytes = self.running_bytes + self.waiting_bytes + bytes;
        Duration::from_nanos((bytes as f64 * self.pace * 0.5f64.powf(idle)) as u64)
    }

    fn sample(&mut self, elapsed: Duration, bytes_inside: u64, now: Instant) {
        let sample = elapsed.as_nanos() as f64 / bytes_inside.max(1) as f64;
        self.pace = match self.sampled {
            Some(_) => self.pace + SAMPLE_WEIGHT * (sample - self.pace),
            None => sample,
        };
        self.sampled = Some(now);
    }
}

impl Pass<'_> {
    /// The batch was read: its time counts for estimates.
    pub(crate) fn done(self) {
        let now = Instant::now();
        self.gate
            .inside
            .lock()
            .sample(now.saturating_duration_since(self.began), self.bytes_inside, now);
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut inside = self.gate.inside.lock();
        inside.running -= self.reads;
        inside.running_bytes -= self.bytes;
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(gate: &ReadGate, reads: usize) -> Option<Pass<'_>> {
        let patience = Patience {
            deadline: Some(Instant::now() + Duration::from_millis(5)),
            worth: None,
        };
        match gate.enter(reads, 100, patience) {
            Entry::In(pass) => Some(pass),
            _ => None,
        }
    }

    #[test]
    fn places_are_counted_and_come_back() {
        let gate = ReadGate::new(4, 4);
        let (first, second) = (enter(&gate, 3), enter(&gate, 1));
        assert!(first.is_some() && second.is_some());
        assert_eq!(gate.load(), (4, 0));
        assert!(enter(&gate, 1).is_none(), "no place before its deadline");
        drop(first);
        assert!(
            enter(&gate, 9).is_none(),
            "a batch larger than the gate waits for all of it"
        );
        drop(second);
        assert!(enter(&gate, 9).is_some());
        assert_eq!(gate.load(), (0, 0));
    }

    #[test]
    fn too_many_waiting_are_turned_away_at_once() {
        let gate = ReadGate::new(1, 0);
        let _in = enter(&gate, 1);
        assert!(matches!(gate.enter(1, 100, Patience::default()), Entry::Full));
    }

    #[test]
    fn first_come_first_served_whatever_the_size() {
        let gate = ReadGate::new(2, 100);
        let order = Mutex::new(Vec::new());
        let first = enter(&gate, 1);
        std::thread::scope(|scope| {
            for (at, reads) in [(0, 2), (1, 1), (2, 1)] {
                let (gate, order) = (&gate, &order);
                scope.spawn(move || {
                    let Entry::In(pass) = gate.enter(reads, 100, Patience::default()) else {
                        panic!("no deadline")
                    };
                    order.lock().push(at);
                    drop(pass);
                });
                // The next one comes when this one stands in line: a single read does not overtake the pair before it.
                while gate.load().1 != [2, 3, 4][at] {
                    std::thread::yield_now();
                }
            }
            assert!(
                gate.enter_idle(1, 100, Duration::ZERO).is_none(),
                "prefetch stands behind everyone"
            );
            drop(first);
        });
        assert_eq!(order.lock()[0], 0);
        assert_eq!(gate.load(), (0, 0));
    }

    #[test]
    fn idle_entry_leaves_half_of_the_places() {
        let gate = ReadGate::new(4, 4);
        let ahead = gate.enter_idle(2, 100, Duration::ZERO);
        assert!(ahead.is_some());
        assert!(gate.enter_idle(1, 100, Duration::ZERO).is_none());
        assert!(
            enter(&gate, 2).is_some(),
            "a reader that someone waits for gets the other half"
        );
    }

    #[test]
    fn the_estimate_follows_the_pace_and_fades() {
        let (mut inside, now) = (Inside::default(), Instant::now());
        assert_eq!(inside.estimate(1 << 20, now), Duration::ZERO, "nothing is known yet");
        inside.sample(Duration::from_millis(10), 1 << 20, now);
        let near = |a: Duration, millis: f64| (a.as_secs_f64() * 1e3 - millis).abs() < 0.01;
        assert!(near(inside.estimate(1 << 20, now), 10.0));
        inside.running_bytes = 3 << 20;
        inside.waiting_bytes = 1 << 20;
        assert!(near(inside.estimate(1 << 20, now), 50.0), "those before come first");
        assert!(near(inside.estimate(1 << 20, now + HALF_LIFE), 25.0));
        inside.sample(Duration::from_millis(2), 1 << 20, now);
        assert!(
            near(inside.estimate(1 << 20, now), 45.0),
            "an eighth of the way to 2 ms"
        );
    }

    #[test]
    fn who_would_wait_too_long_is_told_at_once() {
        let gate = ReadGate::new(1, 10);
        gate.inside.lock().sample(Duration::from_secs(1), 100, Instant::now());
        let soon = Patience {
            deadline: Some(Instant::now() + Duration::from_millis(200)),
            worth: None,
        };
        assert!(matches!(gate.enter(1, 100, soon), Entry::Estimated));
        let cheap = Patience {
            deadline: None,
            worth: Some(Duration::from_millis(200)),
        };
        assert!(matches!(gate.enter(1, 100, cheap), Entry::Estimated));
        assert!(
            matches!(gate.enter(1, 1, cheap), Entry::In(_)),
            "a small one is worth it"
        );
        let past = Patience {
            deadline: Some(Instant::now()),
            worth: None,
        };
        assert!(matches!(gate.enter(1, 100, past), Entry::Late));
    }
}
