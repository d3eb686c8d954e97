//! How a disk's writer is doing.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// So many segments that failed within [`FAILURES_WITHIN`], and the disk is left alone for a while.
const FAILURES_MAX: usize = 3;
const FAILURES_WITHIN: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct Health {
    /// Its thread runs.
    pub(crate) running: bool,
    /// Why it takes nothing at the moment.
    pub(crate) degraded: Option<String>,
    /// Failed attempts to write.
    pub(crate) failures: u64,
    /// Someone waits: try now, not in a second.
    pub(crate) hurry: bool,
    /// Bytes that its current segment may still take.
    pub(crate) room: u64,
    /// Takes nothing until then.
    rests_until: Option<Instant>,
    failed_segments: VecDeque<Instant>,
}

impl Health {
    /// Whether it is left alone at the moment.
    pub(crate) fn rests(&self, now: Instant) -> bool {
        self.rests_until.is_some_and(|until| now < until)
    }

    pub(crate) fn rests_until(&self) -> Option<Instant> {
        self.rests_until
    }

    /// A segment failed; true if the disk is now left alone for `rest`.
    pub(crate) fn segment_failed(&mut self, now: Instant, rest: Duration) -> bool {
        self.failed_segments.push_back(now);
        while let Some(&first) = self.failed_segments.front()
            && (now.duration_since(first) > FAILURES_WITHIN || self.failed_segments.len() > FAILURES_MAX)
        {
            self.failed_segments.pop_front();
        }
        let many = self.failed_segments.len() >= FAILURES_MAX;
        if many {
            self.rests_until = Some(now + rest);
        }
        many
    }

    /// A batch was written.
    pub(crate) fn works(&mut self) -> Option<String> {
        self.rests_until = None;
        self.failed_segments.clear();
        self.degraded.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_failed_segments_within_a_minute_are_too_many() {
        let rest = Duration::from_secs(30);
        // Seconds at which segments fail, and whether the last of them is one too many.
        let cases: [(&[u64], bool); 5] = [
            (&[0], false),
            (&[0, 1], false),
            (&[0, 1, 2], true),
            (&[0, 1, 70], false),
            (&[0, 50, 70, 80], true),
        ];
        for (seconds, many) in cases {
            let start = Instant::now();
            let mut health = Health::default();
            let at = |second: u64| start + Duration::from_secs(second);
            let last = seconds
                .iter()
                .map(|&second| health.segment_failed(at(second), rest))
                .last();
            assert_eq!(last, Some(many), "{seconds:?}");
            let end = *seconds.last().unwrap();
            assert_eq!(
                (health.rests(at(end + 29)), health.rests(at(end + 30))),
                (many, false),
                "{seconds:?}"
            );
            health.works();
            assert!(
                !health.rests(at(end)) && !health.segment_failed(at(end + 1), rest),
                "{seconds:?}"
            );
        }
    }
}
