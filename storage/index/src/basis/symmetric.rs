//! Eigenvalues and eigenvectors of symmetric matrices: Jacobi's method, in f64.
//!
//! Chosen over faster ones because it is short, finds small eigenvalues as exactly as large ones, and is needed a few hundred
//! times per calibration on matrices of at most a few hundred rows.

/// Sweeps after which we stop; six to ten are what it takes.
const SWEEPS_MAX: usize = 40;

/// Eigenvalues, falling, and the unit eigenvectors in the same order as the rows of a `[n, n]` matrix.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Eigen {
    pub(super) values: Vec<f64>,
    pub(super) vectors: Vec<f64>,
}

/// Decomposes the symmetric matrix `a[n, n]`, of finite elements.
pub(super) fn eigen(mut a: Vec<f64>, n: usize) -> Eigen {
    assert_eq!(a.len(), n * n, "eigen: a square matrix of {n} rows");
    let mut vectors = vec![0.0; n * n];
    (0..n).for_each(|i| vectors[i * n + i] = 1.0);
    let size = a.iter().map(|x| x * x).sum::<f64>().sqrt();
    // Below this an element cannot move any eigenvalue by a part in 10^15 of the largest.
    let negligible = size * 1e-16;
    for _ in 0..SWEEPS_MAX {
        let mut rotated = false;
        for p in 0..n {
            for q in p + 1..n {
                if a[p * n + q].abs() > negligible {
                    rotate(&mut a, &mut vectors, n, p, q);
                    rotated = true;
                }
            }
        }
        if !rotated {
            break;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j * n + j].total_cmp(&a[i * n + i]));
    Eigen {
        values: order.iter().map(|&i| a[i * n + i]).collect(),
        vectors: order
            .iter()
            .flat_map(|&i| vectors[i * n..(i + 1) * n].iter().copied())
            .collect(),
    }
}

/// Turns rows and columns `p` and `q` so that `a[p, q]` becomes 0.
fn rotate(a: &mut [f64], vectors: &mut [f64], n: usize, p: usize, q: usize) {
    let off = a[p * n + q];
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * off);
    // The smaller of the two angles; for a huge theta the square would overflow, and 1 / (2 theta) is exact enough. Square
    // roots rather than `hypot`, which libraries round in ways of their own: a basis has the same bytes everywhere.
    let t = if theta.abs() > 1e150 {
        0.5 / theta
    } else {
        theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt())
    };
    let c = 1.0 / (t * t + 1.0).sqrt();
    let s = t * c;
    a[p * n + p] -= t * off;
    a[q * n + q] += t * off;
    a[p * n + q] = 0.0;
    a[q * n + p] = 0.0;
    for k in (0..n).filter(|&k| k != p && k != q) {
        let (at_p, at_q) = (a[p * n + k], a[q * n + k]);
        let (at_p, at_q) = (c * at_p - s * at_q, s * at_p + c * at_q);
        a[p * n + k] = at_p;
        a[q * n + k] = at_q;
        a[k * n + p] = at_p;
        a[k * n + q] = at_q;
    }
    let (head, tail) = vectors.split_at_mut(q * n);
    for (at_p, at_q) in head[p * n..(p + 1) * n].iter_mut().zip(&mut tail[..n]) {
        (*at_p, *at_q) = (c * *at_p - s * *at_q, s * *at_p + c * *at_q);
    }
}

impl Eigen {
    /// The symmetric matrix with the same vectors and `f` of each value: `f` of the matrix.
    pub(super) fn map(&self, f: impl Fn(f64) -> f64) -> Vec<f64> {
        let n = self.values.len();
        let mut out = vec![0.0; n * n];
        for (value, vector) in self.values.iter().zip(self.vectors.chunks_exact(n.max(1))) {
            let value = f(*value);
            for (row, &x) in out.chunks_exact_mut(n).zip(vector) {
                row.iter_mut().zip(vector).for_each(|(out, &y)| *out += value * x * y);
            }
        }
        out
    }
}

/// `a[n, n] . b[n, n]`
pub(super) fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for (row, out) in a.chunks_exact(n.max(1)).zip(out.chunks_exact_mut(n.max(1))) {
        for (&x, b) in row.iter().zip(b.chunks_exact(n)) {
            out.iter_mut().zip(b).for_each(|(out, &y)| *out += x * y);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn known_values() {
        // [[2, 1], [1, 2]] has 3 along (1, 1) and 1 along (1, -1).
        let eigen = eigen(vec![2.0, 1.0, 1.0, 2.0], 2);
        assert!((eigen.values[0] - 3.0).abs() < 1e-14 && (eigen.values[1] - 1.0).abs() < 1e-14);
        assert!((eigen.vectors[0] - eigen.vectors[1]).abs() < 1e-14);
        // The second difference of n points: 2 - 2 cos(k pi / (n + 1)).
        for n in [1, 2, 7, 40] {
            let mut a = vec![0.0; n * n];
            for i in 0..n {
                a[i * n + i] = 2.0;
                if i + 1 < n {
                    a[i * n + i + 1] = -1.0;
                    a[(i + 1) * n + i] = -1.0;
                }
            }
            let values = super::eigen(a, n).values;
            for (at, value) in values.iter().enumerate() {
                let k = (n - at) as f64;
                let expected = 2.0 - 2.0 * (k * std::f64::consts::PI / (n as f64 + 1.0)).cos();
                assert!(
                    (value - expected).abs() < 1e-13,
                    "n {n}, value {at}: {value}, not {expected}"
                );
            }
        }
    }

    #[test]
    fn random_matrices_come_back_from_their_parts() {
        let mut rng = StdRng::seed_from_u64(3);
        for n in [0, 1, 2, 3, 16, 65] {
            for scale in [1e-12, 1.0, 1e12] {
                let mut a = vec![0.0; n * n];
                for i in 0..n {
                    for j in 0..=i {
                        let value = scale * rng.random_range(-1.0..1.0) / (1.0 + i as f64).powi(3);
                        a[i * n + j] = value;
                        a[j * n + i] = value;
                    }
                }
                let size = a.iter().map(|x| x * x).sum::<f64>().sqrt();
                let eigen = eigen(a.clone(), n);
                assert!(eigen.values.is_sorted_by(|x, y| x >= y));
                let again = eigen.map(|value| value);
                let worst = a.iter().zip(&again).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                assert!(worst <= 1e-13 * size, "n {n}, scale {scale}: off by {worst}");
                for i in 0..n {
                    for j in 0..n {
                        let dot: f64 = (0..n)
                            .map(|k| eigen.vectors[i * n + k] * eigen.vectors[j * n + k])
                            .sum();
                        assert!(
                            (dot - f64::from(u8::from(i == j))).abs() < 1e-12,
                            "vectors {i}, {j}: {dot}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn functions_of_a_matrix_multiply_as_numbers_do() {
        let a = vec![5.0, 2.0, 0.5, 2.0, 4.0, 1.0, 0.5, 1.0, 3.0];
        let eigen = eigen(a.clone(), 3);
        let root = eigen.map(f64::sqrt);
        let inverse = eigen.map(f64::recip);
        for (found, expected) in product(&root, &root, 3).iter().zip(&a) {
            assert!((found - expected).abs() < 1e-13);
        }
        for (at, found) in product(&inverse, &a, 3).iter().enumerate() {
            assert!((found - f64::from(u8::from(at % 4 == 0))).abs() < 1e-13);
        }
    }
}
