//! What retrieval did for one request, in bounded memory.

use std::time::Duration;

use kvasir_client::{Opened, Reply, Report};

/// Sums over all replies; covered mass, bounds and times on the wire as histograms.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tally {
    /// Index that served, empty without a context.
    pub(crate) index: String,
    /// Why not a better one.
    pub(crate) index_reason: String,
    pub(crate) keys_scanned: u64,
    pub(crate) keys_total: u64,
    pub(crate) keys_attended: u64,
    pub(crate) bytes: u64,
    pub(crate) round_trips: u64,
    /// Replies whose bound was too large at first.
    pub(crate) escalations: u64,
    /// Replies whose search had begun with a hint.
    pub(crate) hinted: u64,
    /// Searching at the store.
    pub(crate) search: Duration,
    /// Waiting at the store for a turn.
    pub(crate) store_queued: Duration,
    /// The compute thread waiting for replies.
    pub(crate) waited: Duration,
    /// Rows that replies were made of, over KV heads.
    pub(crate) rows: u64,
    /// Those of them that were kept here.
    pub(crate) rows_kept: u64,
    /// Searching that the compute thread did not wait for.
    hidden: Duration,
    /// Missed mass, `1 - covered`.
    missed: Shares,
    bound: Shares,
    /// Seconds from query to reply, less what the store needed.
    wire: Shares,
}

/// Times of one reply, as the compute thread saw them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waits {
    /// From the query to the reply.
    pub(crate) whole: Duration,
    /// Of that: waiting, with nothing else left to do.
    pub(crate) waited: Duration,
}

impl Tally {
    pub(crate) fn new(opened: &Opened) -> Self {
        Self {
            index: opened.index.clone(),
            index_reason: opened.index_reason.clone(),
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, reply: &Reply, waits: Waits) {
        let Report {
            keys_scanned,
            keys_total,
            keys_attended,
            mass_covered,
            missed_mass_bound,
            search,
            hidden,
            queued,
            ..
        } = &reply.report;
        if !reply.report.index_reason.is_empty() {
            // Another than the context was opened with: what served last is told.
            self.index.clone_from(&reply.report.index);
            self.index_reason.clone_from(&reply.report.index_reason);
        }
        self.keys_scanned += keys_scanned;
        self.keys_total += keys_total;
        self.keys_attended += keys_attended;
        self.bytes += reply.wire_bytes as u64;
        self.round_trips += 1;
        self.escalations += u64::from(reply.report.escalated);
        self.hinted += u64::from(reply.report.hinted);
        self.search += *search;
        self.store_queued += *queued;
        self.waited += waits.waited;
        // What was done after the query came is hidden as far as the compute thread had work of its own meanwhile.
        self.hidden += *search - search.saturating_sub(*hidden).min(waits.waited);
        self.wire.add(on_the_wire(reply, waits.whole).as_secs_f64());
        for mass in mass_covered {
            let mass = if mass.is_finite() { mass.clamp(0.0, 1.0) } else { 0.0 };
            self.missed.add(1.0 - f64::from(mass));
        }
        for bound in missed_mass_bound {
            self.bound.add(if bound.is_finite() { f64::from(*bound) } else { 1.0 });
        }
    }

    /// Median of the covered mass over steps, layers and heads, to within 1 % of the missed mass; 0 without replies.
    pub(crate) fn mass_p50(&self) -> f32 {
        self.missed.median().map_or(0.0, |missed| (1.0 - missed) as f32)
    }

    /// Lowest covered mass; 0 without replies.
    pub(crate) fn mass_min(&self) -> f32 {
        self.missed.largest().map_or(0.0, |missed| (1.0 - missed) as f32)
    }

    /// Median of the bound of the missed mass; 0 without a certificate.
    pub(crate) fn bound_p50(&self) -> f32 {
        self.bound.median().unwrap_or(0.0) as f32
    }

    /// Largest bound of the missed mass; 0 without a certificate.
    pub(crate) fn bound_max(&self) -> f32 {
        self.bound.largest().unwrap_or(0.0) as f32
    }

    /// Median microseconds from a query to its reply, less what the store needed; 0 without replies.
    pub(crate) fn wire_us_p50(&self) -> f32 {
        self.wire.median().map_or(0.0, |seconds| (seconds * 1e6) as f32)
    }

    /// Share of the searching that the compute thread did not wait for, 0 to 1.
    pub(crate) fn search_hidden(&self) -> f32 {
        let search = self.search.as_secs_f32();
        if search > 0.0 {
            self.hidden.as_secs_f32() / search
        } else {
            0.0
        }
    }
}

/// What of a reply's time is not the store's.
pub(crate) fn on_the_wire(reply: &Reply, whole: Duration) -> Duration {
    whole.saturating_sub(in_the_store(reply))
}

/// What the store needed of the time from a query to its reply.
pub(crate) fn in_the_store(reply: &Reply) -> Duration {
    let Report {
        search, hidden, queued, ..
    } = reply.report;
    search.saturating_sub(hidden) + queued
}

/// Buckets, each 2 % narrower than the one before; the last takes all below 1e-6.
const BUCKETS: usize = 698;
const NARROWING: f64 = 0.98;

/// A histogram of numbers from 0 to 1 on a logarithmic scale: a missed mass of 0.001 is ten times one of 0.0001, and a
/// millisecond ten times a tenth. Most requests have none and it is 2.8 KiB, so it is allocated with the first value.
#[derive(Clone, Debug, Default, PartialEq)]
struct Shares {
    counts: Vec<u32>,
    total: u64,
    largest: f64,
}

impl Shares {
    fn add(&mut self, share: f64) {
        if self.counts.is_empty() {
            self.counts = vec![0; BUCKETS];
        }
        let share = share.clamp(0.0, 1.0);
        let bucket = (share.max(1e-9).ln() / NARROWING.ln()) as usize;
        let count = &mut self.counts[bucket.min(BUCKETS - 1)];
        *count = count.saturating_add(1);
        self.total += 1;
        self.largest = self.largest.max(share);
    }

    /// To within 1 %; `None` without values.
    fn median(&self) -> Option<f64> {
        let mut seen = 0;
        // From the last bucket, that of the smallest.
        for (bucket, count) in self.counts.iter().enumerate().rev() {
            seen += u64::from(*count);
            if 2 * seen >= self.total && seen > 0 {
                let middle = NARROWING.powf(bucket as f64 + 0.5);
                return Some(if bucket == BUCKETS - 1 { 0.0 } else { middle });
            }
        }
        None
    }

    fn largest(&self) -> Option<f64> {
        (self.total > 0).then_some(self.largest)
    }
}

#[cfg(test)]
mod tests {
    use kvasir_client::Found;

    use super::*;

    fn reply(mass_covered: &[f32], report: Report) -> Reply {
        Reply {
            sequence: 1,
            layer: 0,
            found: Found::Rows(Vec::new()),
            report: Report {
                mass_covered: mass_covered.to_vec(),
                ..report
            },
            wire_bytes: 10,
        }
    }

    fn check(masses: &[f32], median: f32, lowest: f32) {
        let mut tally = Tally::default();
        for mass in masses {
            tally.add(&reply(&[*mass], Report::default()), Waits::default());
        }
        let (found, missed) = (tally.mass_p50(), 1.0 - median);
        assert!(
            (found - median).abs() <= 0.012 * missed + 2e-6,
            "{masses:?}: {found} is not {median}"
        );
        assert!((tally.mass_min() - lowest).abs() < 1e-6, "{masses:?}");
    }

    #[test]
    fn the_median_is_good_to_a_percent_of_what_is_missed() {
        check(&[], 0.0, 0.0);
        check(&[0.9], 0.9, 0.9);
        check(&[0.5, 0.99, 0.999], 0.99, 0.5);
        check(&[0.999, 0.9999, 0.99, 0.9995, 0.2], 0.999, 0.2);
        check(&[1.0, 1.0, 0.3], 1.0, 0.3);
        check(&[0.0, 0.0, 1.0], 0.0, 0.0);
        check(&[f32::NAN, 2.0, 2.0], 1.0, 0.0);
        let spread: Vec<f32> = (0..1001).map(|i| 0.9 + i as f32 * 0.0001 * 0.999).collect();
        check(&spread, spread[500], 0.9);
    }

    #[test]
    fn searching_is_hidden_as_far_as_it_is_not_waited_for() {
        let us = Duration::from_micros;
        // Per reply: searched, of that before the query came, queued, from query to reply, waited; then the share hidden and the
        // wire's median.
        type Case = (&'static [(u64, u64, u64, u64, u64)], f32, f32);
        let table: [Case; 7] = [
            (&[], 0.0, 0.0),
            (&[(300, 0, 0, 400, 400)], 0.0, 100.0),
            (&[(300, 0, 50, 400, 75)], 0.75, 50.0),
            (&[(300, 0, 0, 400, 0), (100, 0, 0, 400, 100)], 0.75, 100.0),
            // Begun with a hint: what is left of the search is waited for, or the wire alone.
            (&[(900, 800, 0, 150, 150)], 0.8889, 50.0),
            (&[(900, 800, 10, 210, 40)], 0.9556, 100.0),
            (&[(900, 900, 0, 100, 100)], 1.0, 100.0),
        ];
        for (replies, hidden, wire) in table {
            let mut tally = Tally::default();
            for (search, before, queued, whole, waited) in replies {
                let report = Report {
                    search: us(*search),
                    hidden: us(*before),
                    queued: us(*queued),
                    ..Report::default()
                };
                let (whole, waited) = (us(*whole), us(*waited));
                tally.add(&reply(&[], report), Waits { whole, waited });
            }
            assert!(
                (tally.search_hidden() - hidden).abs() < 1e-3,
                "{replies:?}: {}",
                tally.search_hidden()
            );
            let found = tally.wire_us_p50();
            assert!(
                (found - wire).abs() <= 0.012 * wire,
                "{replies:?}: {found} is not {wire}"
            );
        }
    }

    #[test]
    fn the_index_that_served_last_is_told() {
        let mut tally = Tally::new(&Opened {
            index: "flat".to_owned(),
            index_reason: "none is built".to_owned(),
            ..Opened::default()
        });
        let told = |tally: &Tally| (tally.index.clone(), tally.index_reason.clone());
        let as_opened = Report {
            index: "flat".to_owned(),
            ..Report::default()
        };
        tally.add(&reply(&[], as_opened), Waits::default());
        assert_eq!(told(&tally), ("flat".to_owned(), "none is built".to_owned()));
        let later = Report {
            index: "roar".to_owned(),
            index_reason: "it was built later".to_owned(),
            ..Report::default()
        };
        tally.add(&reply(&[], later), Waits::default());
        assert_eq!(told(&tally), ("roar".to_owned(), "it was built later".to_owned()));
    }

    #[test]
    fn bounds_are_summed_up() {
        let mut tally = Tally::default();
        assert_eq!((tally.bound_p50(), tally.bound_max()), (0.0, 0.0));
        for bounds in [[0.01, 0.02], [0.03, f32::INFINITY]] {
            let report = Report {
                missed_mass_bound: bounds.to_vec(),
                escalated: bounds[1] > 1.0,
                ..Report::default()
            };
            tally.add(&reply(&[], report), Waits::default());
        }
        assert!((tally.bound_p50() - 0.02).abs() < 0.001, "{}", tally.bound_p50());
        assert_eq!((tally.bound_max(), tally.escalations), (1.0, 1));
    }
}
