//! Partial attention results and how they join.

use crate::numeric::{exp2, log2};

/// Partial attention of `n` query rows: `o[n, head_dim]` normalised, `lse[n]` base 2 (-inf where nothing was seen).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Partial {
    /// The softmax-weighted mean of the values seen, `[n, head_dim]`; 0 where nothing was seen.
    pub o: Vec<f32>,
    /// log2 of the sum of exp2 of the base-2 scores seen, `[n]`; -inf where nothing was seen.
    pub lse: Vec<f32>,
}

/// Joins `other` into `into` by log-sum-exp: what attention over both sets of keys would have given, if the sets are
/// disjoint. A row that saw nothing leaves its twin's bits unchanged.
///
/// # Panics
/// If the shapes differ.
pub fn merge(into: &mut Partial, other: &Partial, head_dim: usize) {
    assert_eq!(into.lse.len(), other.lse.len(), "merge: partials of the same rows");
    assert_eq!(
        into.o.len(),
        into.lse.len() * head_dim,
        "merge: into.o is [n, head_dim]"
    );
    assert_eq!(
        other.o.len(),
        other.lse.len() * head_dim,
        "merge: other.o is [n, head_dim]"
    );
    for (row, (a, &b)) in into.lse.iter_mut().zip(&other.lse).enumerate() {
        if b == f32::NEG_INFINITY {
            continue;
        }
        let span = row * head_dim..(row + 1) * head_dim;
        let (o, from) = (&mut into.o[span.clone()], &other.o[span]);
        if *a == f32::NEG_INFINITY {
            o.copy_from_slice(from);
            *a = b;
            continue;
        }
        let high = a.max(b);
        let (weight_a, weight_b) = (exp2(*a - high), exp2(b - high));
        let sum = weight_a + weight_b;
        for (o, from) in o.iter_mut().zip(from) {
            *o = from.mul_add(weight_b, *o * weight_a) / sum;
        }
        *a = high + log2(sum);
    }
}

#[cfg(test)]
mod tests {
    use kvasir_reference as reference;

    use super::*;
    use crate::testing::{error, values};

    const NONE: f32 = f32::NEG_INFINITY;

    #[test]
    fn truth_and_rows_that_saw_nothing() {
        for (a, b) in [
            (1.0, 2.0),
            (-300.0, 5.0),
            (5.0, -300.0),
            (NONE, 1.5),
            (1.5, NONE),
            (NONE, NONE),
            (0.0, 0.0),
        ] {
            let mut into = Partial {
                o: values(1, 8),
                lse: vec![a],
            };
            let other = Partial {
                o: values(2, 8),
                lse: vec![b],
            };
            let (o, lse) = reference::merge((&into.o, a), (&other.o, b));
            merge(&mut into, &other, 8);
            assert!(error(&into.o, &o) < 5e-7, "{a} {b}");
            assert!(
                f64::from(into.lse[0]) == lse || (f64::from(into.lse[0]) - lse).abs() < 1e-5,
                "{a} {b}"
            );
        }
    }
}
