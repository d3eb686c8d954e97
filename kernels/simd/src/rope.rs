//! Rotary position embedding (Su et al. 2021) in both pairings.

/// Cosines and sines per position and pair.
pub struct RopeTable {
    /// Pairs per row.
    pairs: usize,
    /// `[positions, pairs]` of (cos, sin).
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// Angles `position * theta^(-2i / dims)` for positions below `positions`, pairs i below `dims / 2`; an odd last
    /// dimension is not rotated. Worked out in f64.
    pub fn new(positions: usize, dims: usize, theta: f32) -> Self {
        let pairs = dims / 2;
        let rates: Vec<f64> = (0..pairs)
            .map(|i| f64::from(theta).powf(-2.0 * i as f64 / dims as f64))
            .collect();
        let turns = (0..positions)
            .flat_map(|position| {
                rates.iter().map(move |rate| {
                    let (sin, cos) = (position as f64 * rate).sin_cos();
                    (cos as f32, sin as f32)
                })
            })
            .collect();
        Self { pairs, turns }
    }

    /// Rotates pairs (2i, 2i+1) of the first `dims` elements of each row `[rows, head_dim]`, all at `position`.
    ///
    /// # Panics
    /// If `position` is beyond the table, `head_dim` below `dims`, or `x` not whole rows.
    pub fn rotate_interleaved(&self, x: &mut [f32], head_dim: usize, position: usize) {
        let turns = self.turns(x.len(), head_dim, position);
        for row in x.chunks_exact_mut(head_dim) {
            for (pair, (cos, sin)) in row.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                *pair = turn(pair[0], pair[1], *cos, *sin);
            }
        }
    }

    /// Rotates pairs (i, i + dims/2).
    ///
    /// # Panics
    /// If `position` is beyond the table, `head_dim` below `dims`, or `x` not whole rows.
    pub fn rotate_halves(&self, x: &mut [f32], head_dim: usize, position: usize) {
        let turns = self.turns(x.len(), head_dim, position);
        for row in x.chunks_exact_mut(head_dim) {
            let (low, high) = row.split_at_mut(self.pairs);
            for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(turns) {
                [*a, *b] = turn(*a, *b, *cos, *sin);
            }
        }
    }

    fn turns(&self, len: usize, head_dim: usize, position: usize) -> &[(f32, f32)] {
        assert!(
            head_dim >= 2 * self.pairs,
            "rope: head_dim {head_dim} is below the {} rotated",
            2 * self.pairs
        );
        assert!(
            head_dim > 0 && len.is_multiple_of(head_dim),
            "rope: x is rows of head_dim {head_dim}"
        );
        &self.turns[position * self.pairs..(position + 1) * self.pairs]
    }
}

#[inline(always)]
fn turn(a: f32, b: f32, cos: f32, sin: f32) -> [f32; 2] {
    [a * cos - b * sin, a * sin + b * cos]
}

#[cfg(test)]
mod tests {
    use kvasir_reference as reference;

    use super::*;
    use crate::testing::{error, values};

    #[test]
    fn truth_in_both_pairings() {
        for (head_dim, dims, theta) in [(64, 64, 100_000.0), (64, 32, 10_000.0), (6, 4, 500.0), (5, 0, 10.0)] {
            let table = RopeTable::new(2048, dims, theta);
            for position in [0, 1, 77, 2047] {
                let x = values(position as u64, 3 * head_dim);
                let (mut pairs, mut halves) = (x.clone(), x.clone());
                table.rotate_interleaved(&mut pairs, head_dim, position);
                table.rotate_halves(&mut halves, head_dim, position);
                let truth = |interleaved| -> Vec<f64> {
                    let turn = |x| reference::rope(x, dims, f64::from(theta), position, interleaved);
                    x.chunks(head_dim).flat_map(turn).collect()
                };
                assert!(error(&pairs, &truth(true)) < 5e-7 && error(&halves, &truth(false)) < 5e-7);
            }
        }
    }
}
