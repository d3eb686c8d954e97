//! How values go with coordinates of keys, over a whole column.
//!
//! What a query attends to lies far out on the directions that it asks for, and so do the keys that it attends to a little less.
//! Their values are not those of their run's average key: they differ from it about in proportion to the score, by the covariance
//! of values and score over the column. The covariance with every direction is kept, so that of any query's score is a product.

use half::f16;
use kvasir_simd::{GROUP, RUN_GROUPS, weigh_dense};

use super::format::finite;

/// Keys of a run.
const RUN: usize = GROUP * RUN_GROUPS;

/// Sums over the keys of a column.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Slopes {
    keys: usize,
    /// Of coordinates, less their run's mean, times values: `[directions, head_dim]`.
    sums: Vec<f32>,
}

impl Slopes {
    /// As new, with the room that was made.
    pub(super) fn clear(&mut self) {
        self.keys = 0;
        self.sums.clear();
    }

    /// Nothing was learnt.
    pub(super) fn is_empty(&self) -> bool {
        self.keys == 0
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.sums.len() * 4
    }

    /// Adds a block: coordinates `z`, per group `[directions][key]`, and `values[n, head_dim]`. Runs with an element that is not
    /// finite are left out.
    pub(super) fn learn(&mut self, z: &[[f32; GROUP]], directions: usize, values: &[f16], head_dim: usize) {
        self.sums.resize(directions * head_dim, 0.0);
        let mut own = Vec::with_capacity(directions * RUN);
        for (z, values) in z.chunks(directions * RUN_GROUPS).zip(values.chunks(RUN * head_dim)) {
            let n = values.len() / head_dim;
            own.clear();
            own.resize(directions * n, 0.0);
            for (direction, own) in own.chunks_exact_mut(n).enumerate() {
                for (own, z) in own.chunks_mut(GROUP).zip(z.iter().skip(direction).step_by(directions)) {
                    own.copy_from_slice(&z[..own.len()]);
                }
                let mean = own.iter().sum::<f32>() / n as f32;
                own.iter_mut().for_each(|z| *z -= mean);
            }
            if own.iter().all(|z| z.is_finite()) && values.chunks(head_dim).all(finite) {
                weigh_dense(&own, values, head_dim, &mut self.sums);
                self.keys += n;
            }
        }
    }

    /// Adds to `o[head_dim]` `amount` times the covariance of values with the score that has `along` per direction.
    pub(super) fn lean(&self, along: &[f32], amount: f32, o: &mut [f32]) {
        let share = amount / self.keys.max(1) as f32;
        for (sums, along) in self.sums.chunks_exact(o.len()).zip(along) {
            let weight = along * share;
            o.iter_mut().zip(sums).for_each(|(o, sum)| *o += weight * sum);
        }
    }
}
