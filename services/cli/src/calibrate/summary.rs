//! What a calibration found, layer by layer.

use kvasir_index::Basis;

use super::gather::Gathered;
use crate::output::print;

/// Per layer: the share of the queries' energy that the directions keep, and the mass that lies outside sink and window.
pub(super) fn show(basis: &Basis, kept: &[f64], gathered: &Gathered) {
    print(format_args!(
        "{:>5}  {:>8} {:>8}   {:>8} {:>8}   {:>9}",
        "layer", "kept p10", "p50", "far p50", "p99", "streaming"
    ));
    for layer in 0..basis.layers {
        let heads = layer * basis.kv_heads..(layer + 1) * basis.kv_heads;
        let outside = &gathered.heads[heads.clone()];
        let over_heads = |share: f32| {
            let mut masses: Vec<f64> = outside
                .iter()
                .map(|head| f64::from(head.outside.quantile(share)))
                .collect();
            quantile(&mut masses, 0.5)
        };
        let mut kept = kept[heads.clone()].to_vec();
        // Where a layer sees a window only, nothing was looked at.
        let far = |share| match outside.iter().all(|head| head.outside.queries() == 0) {
            true => "-".to_owned(),
            false => format!("{:.4}", over_heads(share)),
        };
        print(format_args!(
            "{layer:>5}  {:>8.4} {:>8.4}   {:>8} {:>8}   {:>9}",
            quantile(&mut kept, 0.1),
            quantile(&mut kept, 0.5),
            far(0.5),
            far(0.99),
            basis.heads[heads].iter().filter(|head| head.streaming).count()
        ));
    }
    let mut kept = kept.to_vec();
    print(format_args!(
        "kept: share of E[(q . (k - mean))^2] in {} of {} directions, over all heads p10 {:.4}, p50 {:.4}",
        basis.rank,
        basis.head_dim,
        quantile(&mut kept, 0.1),
        quantile(&mut kept, 0.5)
    ));
    let policy = &gathered.policy;
    print(format_args!(
        "far: softmax mass outside the first {} and last {} tokens, median head; {} of {} heads streaming (p99 below {}, \
         largest below {})",
        policy.sink,
        policy.window,
        basis.streaming_heads(),
        basis.heads.len(),
        policy.mass_p99_max,
        policy.mass_max
    ));
}

/// The value that `share` of `values` do not exceed; 0 of none.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (share * values.len() as f64).ceil() as usize;
    values.get(at.max(1) - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_rank() {
        let mut values = [3.0, 1.0, 2.0];
        for (share, expected) in [(0.1, 1.0), (0.5, 2.0), (1.0, 3.0)] {
            assert_eq!(quantile(&mut values, share), expected);
        }
        assert_eq!(quantile(&mut [], 0.5), 0.0);
    }
}
