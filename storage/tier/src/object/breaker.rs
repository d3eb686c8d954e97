//! Stops asking a bucket that does not answer, and finds out when it answers again.
//!
//! A pure state machine over instants that the caller passes in. *Closed*: requests go out, failures are remembered for
//! a window. *Open*: none go out until a pause has passed. *Half-open*: one request goes out as a probe; what becomes of
//! it decides. A probe that is never reported (its caller was cut off) is given up after another pause.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// When the breaker opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerConfig {
    /// Failures within [`Self::window`] that open it, if there were not more successes than failures. At least 1.
    pub failures: u32,
    /// How long a failure counts.
    pub window: Duration,
    /// How long it stays open before one request may try.
    pub pause: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            failures: 5,
            window: Duration::from_secs(10),
            pause: Duration::from_secs(5),
        }
    }
}

/// Whether requests go out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BreakerState {
    /// They do.
    #[default]
    Closed,
    /// They do not: reads answer "unavailable" at once, uploads wait.
    Open,
    /// One does, to see.
    HalfOpen,
}

/// Most outcomes that are remembered; a window with more of them is judged by the newest.
const OUTCOMES_MAX: usize = 1024;

#[derive(Debug)]
enum Phase {
    Closed,
    Open { until: Instant },
    Probing { until: Instant },
}

#[derive(Debug)]
pub(super) struct Breaker {
    config: BreakerConfig,
    phase: Phase,
    /// When, and whether it went well; oldest first.
    outcomes: VecDeque<(Instant, bool)>,
    opened: u64,
}

impl Breaker {
    pub(super) fn new(config: BreakerConfig) -> Self {
        Self {
            config,
            phase: Phase::Closed,
            outcomes: VecDeque::new(),
            opened: 0,
        }
    }

    /// Whether a request may go out now. After a yes, report [`Self::succeeded`] or [`Self::failed`].
    pub(super) fn admits(&mut self, now: Instant) -> bool {
        match self.phase {
            Phase::Closed => true,
            Phase::Open { until } | Phase::Probing { until } if now < until => false,
            Phase::Open { .. } | Phase::Probing { .. } => {
                self.phase = Phase::Probing {
                    until: now + self.config.pause,
                };
                true
            }
        }
    }

    /// The bucket answered as it should (a missing object included).
    pub(super) fn succeeded(&mut self, now: Instant) {
        match self.phase {
            Phase::Closed => self.remember(now, true),
            // A straggler from before it opened proves nothing.
            Phase::Open { .. } => {}
            Phase::Probing { .. } => {
                self.phase = Phase::Closed;
                self.outcomes.clear();
            }
        }
    }

    /// The bucket did not answer, too late, or wrongly.
    pub(super) fn failed(&mut self, now: Instant) {
        match self.phase {
            Phase::Closed => {
                self.remember(now, false);
                let failures = self.outcomes.iter().filter(|(_, well)| !well).count();
                if failures >= self.config.failures as usize && failures * 2 >= self.outcomes.len() {
                    self.open(now);
                }
            }
            Phase::Open { .. } => {}
            Phase::Probing { .. } => self.open(now),
        }
    }

    pub(super) fn state(&self, now: Instant) -> BreakerState {
        match self.phase {
            Phase::Closed => BreakerState::Closed,
            Phase::Open { until } if now < until => BreakerState::Open,
            Phase::Open { .. } | Phase::Probing { .. } => BreakerState::HalfOpen,
        }
    }

    /// How often it opened.
    pub(super) fn opened(&self) -> u64 {
        self.opened
    }

    fn open(&mut self, now: Instant) {
        self.phase = Phase::Open {
            until: now + self.config.pause,
        };
        self.outcomes.clear();
        self.opened += 1;
    }

    fn remember(&mut self, now: Instant, well: bool) {
        let window = self.config.window;
        while self
            .outcomes
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > window)
            || self.outcomes.len() >= OUTCOMES_MAX
        {
            self.outcomes.pop_front();
        }
        self.outcomes.push_back((now, well));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: BreakerConfig = BreakerConfig {
        failures: 3,
        window: Duration::from_secs(10),
        pause: Duration::from_secs(5),
    };

    /// Plays a script: at each second `f`ail, `s`ucceed, or ask (`y`es or `n`o expected). Answers with the last state.
    fn play(script: &[(u64, char)]) -> BreakerState {
        let start = Instant::now();
        let mut breaker = Breaker::new(CONFIG);
        let mut last = start;
        for (second, step) in script {
            last = start + Duration::from_secs(*second);
            match step {
                'f' => breaker.failed(last),
                's' => breaker.succeeded(last),
                'y' => assert!(breaker.admits(last), "second {second}"),
                'n' => assert!(!breaker.admits(last), "second {second}"),
                other => panic!("{other} is no step"),
            }
        }
        breaker.state(last)
    }

    #[test]
    fn opens_and_closes() {
        use BreakerState::{Closed, HalfOpen, Open};
        let opened = [(0, 'f'), (1, 'f'), (2, 'f')];
        let table: [(&[(u64, char)], BreakerState); 9] = [
            (&[], Closed),
            (&[(0, 'f'), (1, 'f')], Closed),
            (&[(0, 'f'), (1, 'f'), (2, 'f')], Open),
            // The first failure has left the window.
            (&[(0, 'f'), (11, 'f'), (12, 'f'), (13, 'y')], Closed),
            // More successes than failures.
            (
                &[(0, 's'), (0, 's'), (0, 's'), (0, 's'), (1, 'f'), (1, 'f'), (1, 'f')],
                Closed,
            ),
            (&[(2, 'n'), (6, 'n'), (7, 'y')], HalfOpen),
            // One probe at a time; a straggler's success does not close it, the probe's does.
            (&[(3, 's'), (3, 'n'), (7, 'y'), (8, 'n'), (9, 's'), (9, 'y')], Closed),
            (&[(7, 'y'), (8, 'f'), (12, 'n')], Open),
            // The probe was never reported.
            (&[(7, 'y'), (11, 'n'), (12, 'y'), (13, 's')], Closed),
        ];
        for (i, (script, state)) in table.into_iter().enumerate() {
            let script = if i < 5 {
                script.to_vec()
            } else {
                [&opened, script].concat()
            };
            assert_eq!(play(&script), state, "row {i}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut breaker = Breaker::new(CONFIG);
        let now = Instant::now();
        for _ in 0..10 * OUTCOMES_MAX {
            breaker.succeeded(now);
        }
        assert!(breaker.outcomes.len() <= OUTCOMES_MAX);
    }
}
