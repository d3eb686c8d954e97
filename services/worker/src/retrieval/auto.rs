//! `auto`: rows or attend, whichever takes less time per layer as measured.
//!
//! A layer's reply takes `search + round trip + bytes / bandwidth`, beside what the store needs. *Attend* brings one output
//! row and a number per query head, whatever was searched; *rows* brings the found keys and values, hundreds of times as many bytes,
//! and leaves the attention over them, and the reading of values, to the worker. So over a slow wire attend wins, and where the
//! store is the bottleneck (many workers, few cores) and the wire is not, rows do. Each reply of either form tells about the
//! search of that form and about the wire; a form that was never used is taken to search as the other does, and to bring
//! the bytes that it must.
//!
//! Attend is chosen if
//!
//! ```text
//! search(attend) + bytes(attend) / bandwidth  <=  search(rows) + bytes(rows) / bandwidth
//! ```
//!
//! where the round trip stands on both sides and falls out. A request is decided once, when it begins.

use std::time::Duration;

use parking_lot::Mutex;

use crate::config::AttentionMode;

/// Weight of the newest sample. A request has hundreds, so what is known is mostly the last request's.
const NEWEST: f64 = 1.0 / 256.0;
/// Bandwidth taken for granted until replies of unlike sizes have shown it: 10 Gbit/s.
const BYTES_PER_SECOND: f64 = 1.25e9;

/// What one reply showed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) form: Form,
    /// Bytes of the reply.
    pub(crate) bytes: usize,
    /// From the query to the reply.
    pub(crate) whole: Duration,
    /// What the store needed of that: searching, and waiting for its turn.
    pub(crate) store: Duration,
}

/// The two forms that retrieval has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Rows,
    Attend,
}

/// Sizes that replies follow from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReplyShape {
    pub(crate) q_heads: usize,
    pub(crate) head_dim: usize,
    /// Keys per query head of rows.
    pub(crate) k: usize,
}

/// What is known of the wire to the store and of its searches. Shared by all sequences.
#[derive(Debug, Default)]
pub(crate) struct Experience(Mutex<Known>);

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    wire: Line,
    rows: FormMeans,
    attend: FormMeans,
}

/// Means of one form.
#[derive(Clone, Copy, Debug, Default)]
struct FormMeans {
    search: Mean,
    bytes: Mean,
}

/// An exponentially weighted mean; the first samples count alike.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    value: f64,
    samples: u32,
}

impl Mean {
    fn add(&mut self, sample: f64) {
        self.samples = self.samples.saturating_add(1);
        self.value += (sample - self.value) * NEWEST.max(1.0 / f64::from(self.samples));
    }

    fn get(&self) -> Option<f64> {
        (self.samples > 0).then_some(self.value)
    }
}

/// Seconds as a line over bytes, fitted by weighted least squares.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    bytes: Mean,
    seconds: Mean,
    bytes_squared: Mean,
    product: Mean,
}

impl Line {
    fn add(&mut self, bytes: f64, seconds: f64) {
        self.bytes.add(bytes);
        self.seconds.add(seconds);
        self.bytes_squared.add(bytes * bytes);
        self.product.add(bytes * seconds);
    }

    /// Seconds per byte. Replies that are all of about one size say nothing about it.
    fn slope(&self) -> f64 {
        let variance = self.bytes_squared.value - self.bytes.value * self.bytes.value;
        let spread = variance.max(0.0).sqrt();
        if spread <= 0.1 * self.bytes.value || self.bytes.samples < 2 {
            return 1.0 / BYTES_PER_SECOND;
        }
        let covariance = self.product.value - self.bytes.value * self.seconds.value;
        (covariance / variance).max(0.0)
    }
}

impl Experience {
    /// Learns from a reply.
    pub(crate) fn add(&self, sample: Sample) {
        let bytes = sample.bytes as f64;
        let wire = sample.whole.saturating_sub(sample.store).as_secs_f64();
        let mut known = self.0.lock();
        known.wire.add(bytes, wire);
        let form = match sample.form {
            Form::Rows => &mut known.rows,
            Form::Attend => &mut known.attend,
        };
        form.search.add(sample.store.as_secs_f64());
        form.bytes.add(bytes);
    }

    /// What a request that leaves the choice gets.
    pub(crate) fn choose(&self, shape: ReplyShape) -> AttentionMode {
        let known = *self.0.lock();
        let row_bytes = shape.q_heads * shape.head_dim;
        // An output row of f32 and a log-sum-exp per query head.
        let attend_bytes = known
            .attend
            .bytes
            .get()
            .unwrap_or((4 * (row_bytes + shape.q_heads)) as f64);
        // Keys and values of f16, if query heads had nothing in common and nothing were kept: the most it can be.
        let rows_bytes = known.rows.bytes.get().unwrap_or((4 * row_bytes * shape.k) as f64);
        let search = |own: Mean, other: Mean| own.get().or(other.get()).unwrap_or(0.0);
        let slope = known.wire.slope();
        let attend = search(known.attend.search, known.rows.search) + attend_bytes * slope;
        let rows = search(known.rows.search, known.attend.search) + rows_bytes * slope;
        if attend <= rows {
            AttentionMode::Attend
        } else {
            AttentionMode::Rows
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ReplyShape = ReplyShape {
        q_heads: 9,
        head_dim: 64,
        k: 100,
    };

    /// Replies of both forms over a wire of so many bytes per second with 100 us of round trip.
    fn learnt(bandwidth: f64, rows: (usize, f64), attend: (usize, f64)) -> Experience {
        let experience = Experience::default();
        for _ in 0..500 {
            for (form, (bytes, search)) in [(Form::Rows, rows), (Form::Attend, attend)] {
                let store = Duration::from_secs_f64(search);
                let wire = Duration::from_secs_f64(100e-6 + bytes as f64 / bandwidth);
                experience.add(Sample {
                    form,
                    bytes,
                    whole: wire + store,
                    store,
                });
            }
        }
        experience
    }

    #[test]
    fn the_faster_form_is_chosen() {
        use AttentionMode::{Attend, Rows};
        // Bytes per second; bytes and seconds of search of rows and of attend.
        let table = [
            ("a slow wire", 1e8, (60_000, 200e-6), (2_400, 300e-6), Attend),
            (
                "a fast wire and a busy store",
                1e10,
                (60_000, 200e-6),
                (2_400, 900e-6),
                Rows,
            ),
            (
                "rows that are nearly all kept",
                1e8,
                (3_000, 200e-6),
                (2_400, 300e-6),
                Rows,
            ),
            ("searches alike", 1e10, (60_000, 200e-6), (2_400, 200e-6), Attend),
        ];
        for (name, bandwidth, rows, attend, expected) in table {
            assert_eq!(learnt(bandwidth, rows, attend).choose(SHAPE), expected, "{name}");
        }
    }

    #[test]
    fn bandwidth_is_found() {
        for bandwidth in [1e8, 1e9] {
            let known = *learnt(bandwidth, (60_000, 1e-4), (2_400, 3e-4)).0.lock();
            let found = 1.0 / known.wire.slope();
            assert!((found / bandwidth - 1.0).abs() < 0.05, "{found} is not {bandwidth}");
        }
    }

    #[test]
    fn without_experience_the_query_travels() {
        assert_eq!(Experience::default().choose(SHAPE), AttentionMode::Attend);
        // One form alone says nothing about the bandwidth: the bytes decide.
        let experience = Experience::default();
        let sample = Sample {
            form: Form::Rows,
            bytes: 60_000,
            whole: Duration::from_micros(700),
            store: Duration::from_micros(400),
        };
        (0..10).for_each(|_| experience.add(sample));
        assert_eq!(experience.choose(SHAPE), AttentionMode::Attend);
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let experience = learnt(1e10, (60_000, 200e-6), (2_400, 900e-6));
        assert_eq!(experience.choose(SHAPE), AttentionMode::Rows);
        let sample = Sample {
            form: Form::Attend,
            bytes: 2_400,
            whole: Duration::from_micros(250),
            store: Duration::from_micros(150),
        };
        (0..2000).for_each(|_| experience.add(sample));
        assert_eq!(experience.choose(SHAPE), AttentionMode::Attend);
    }
}
