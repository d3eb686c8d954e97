//! What searches of a KV head were like of late: what those with their own queries covered, by which those that begin with a forecast are
//! judged, and how often forecasts served, by which the heads are ordered that are searched ahead.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// Per layer and KV head of a context: the least share of the mass that any query head of its group got from the last search that
/// began with its own queries. A guess and no more, so threads may write over each other.
#[derive(Debug)]
pub(super) struct Usual {
    kv_heads: usize,
    /// Bits of an `f32`; 0 before the first.
    least: Box<[AtomicU32]>,
    /// Whether each of the last eight forecasts served, the last one lowest: 1 where it did not.
    failed: Box<[AtomicU8]>,
}

impl Usual {
    pub(super) fn new(layers: usize, kv_heads: usize) -> Self {
        Self {
            kv_heads,
            least: (0..layers * kv_heads).map(|_| AtomicU32::new(0)).collect(),
            failed: (0..layers * kv_heads).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    /// 0 where nothing is known.
    pub(super) fn of(&self, layer: u16, kv_head: usize) -> f32 {
        let least = self.at(layer, kv_head);
        least.map_or(0.0, |least| f32::from_bits(least.load(Ordering::Relaxed)))
    }

    /// Notes what a search with its own queries `covered`, per query head.
    pub(super) fn note(&self, layer: u16, kv_head: usize, covered: &[f32]) {
        let found = covered.iter().copied().reduce(f32::min);
        if let (Some(least), Some(found)) = (self.at(layer, kv_head), found) {
            least.store(found.to_bits(), Ordering::Relaxed);
        }
    }

    /// Notes whether a forecast served.
    pub(super) fn note_forecast(&self, layer: u16, kv_head: usize, served: bool) {
        let at = usize::from(layer) * self.kv_heads + kv_head;
        if let Some(failed) = self.failed.get(at) {
            failed.store(
                failed.load(Ordering::Relaxed) << 1 | u8::from(!served),
                Ordering::Relaxed,
            );
        }
    }

    /// The KV heads of a layer, those first whose forecasts served: a search ahead may have no time for all.
    pub(super) fn by_forecasts(&self, layer: u16) -> Vec<usize> {
        let failures = |kv_head: &usize| {
            let failed = self.failed.get(usize::from(layer) * self.kv_heads + kv_head);
            failed.map_or(0, |failed| failed.load(Ordering::Relaxed).count_ones())
        };
        let mut heads: Vec<usize> = (0..self.kv_heads).collect();
        heads.sort_by_key(failures);
        heads
    }

    fn at(&self, layer: u16, kv_head: usize) -> Option<&AtomicU32> {
        self.least.get(usize::from(layer) * self.kv_heads + kv_head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_whose_forecasts_serve_come_first() {
        let usual = Usual::new(2, 3);
        assert_eq!(usual.by_forecasts(1), [0, 1, 2]);
        usual.note_forecast(1, 0, false);
        usual.note_forecast(0, 2, false);
        assert_eq!(usual.by_forecasts(1), [1, 2, 0]);
        usual.note_forecast(1, 1, false);
        usual.note_forecast(1, 1, false);
        assert_eq!(usual.by_forecasts(1), [2, 0, 1]);
        // What was long ago is forgotten.
        (0..8).for_each(|_| usual.note_forecast(1, 1, true));
        assert_eq!(usual.by_forecasts(1), [1, 2, 0]);
        // There are no others.
        usual.note_forecast(2, 0, false);
        assert_eq!(usual.by_forecasts(7), [0, 1, 2]);
    }

    #[test]
    fn the_least_of_the_last_search_is_kept_for_each_head() {
        let usual = Usual::new(2, 3);
        assert_eq!(usual.of(1, 2), 0.0);
        usual.note(1, 2, &[0.9, 0.7, 0.8]);
        usual.note(0, 2, &[0.5]);
        usual.note(1, 2, &[]);
        assert_eq!((usual.of(1, 2), usual.of(0, 2), usual.of(1, 1)), (0.7, 0.5, 0.0));
        usual.note(1, 2, &[0.95]);
        assert_eq!(usual.of(1, 2), 0.95);
        // There are no others.
        usual.note(2, 0, &[0.1]);
        assert_eq!(usual.of(2, 0), 0.0);
    }
}
