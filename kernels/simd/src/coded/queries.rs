//! What is asked of coded keys: queries in whole numbers, and what their products with keys mean.

/// A query's weights may sum up to this in magnitude: times 15 it stays below 2^15.
const MAGNITUDE_MAX: f32 = 2133.0;
/// Level of the average key, whose product is `middle`: 60 powers of two below weight 1, less the centre of the error.
pub(super) const AVERAGE: i32 = (127 - 60) * 128 - 7;
/// Levels are at most this: 127 powers of two above the average key. A product that leaves 16 bits is above it.
pub(super) const HIGHEST: i16 = (127 - 60 + 127) * 128;
/// Levels are at least this (a weight of 2^-126) where a key is searched, and 0 where it is not.
pub(super) const LOWEST: i16 = 128;
/// A product is doubled up to so many times.
pub(super) const DOUBLED_MAX: i32 = 5;
/// No level of a product that is at most so much before the average's is added can lie beyond an end of the scale: the lower end
/// is the nearer one. Rounding takes less than two.
pub(super) const REACH_MAX: i32 = AVERAGE - LOWEST as i32 - 4;
/// Added to a number far below 2^22 it rounds that to nearest.
pub(super) const ROUNDS: f32 = 12_582_912.0;

/// A score as the scan writes it: `128 * (score - average) + c`, where `average` is that of a key whose coordinates are all 0;
/// 0 for a key that is not searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(pub u16);

impl Level {
    /// Base-2 score above the average key's.
    pub fn above_average(self) -> f32 {
        (i32::from(self.0) - AVERAGE) as f32 / 128.0
    }

    /// Of a key that is searched, the lowest.
    pub const LOWEST: Self = Self(LOWEST as u16);

    /// Of a key that is searched, the highest; its score may be any above.
    pub const HIGHEST: Self = Self(HIGHEST as u16);

    /// The lowest level whose score is `above` or higher, and searched at all.
    pub fn at_least(above: f32) -> Self {
        let level = (above.clamp(-1000.0, 1000.0) * 128.0).ceil() as i32 + AVERAGE;
        Self(level.clamp(i32::from(LOWEST), i32::from(HIGHEST)) as u16)
    }

    /// About `2^(score - average)`, times [`Level::UNIT`].
    pub fn weight(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    /// Base-2 logarithm of the weight of the average key.
    pub const UNIT: f32 = -60.0;
}

/// Queries as the scan wants them.
#[derive(Clone, Debug, Default)]
pub struct CodedQueries {
    pub(super) nibbles: usize,
    /// Four weights, eight times over, `[heads, nibbles / 4]`: low halves of line 0, high halves of line 0, and so on.
    pub(super) lanes: Vec<Lane>,
    pub(super) heads: Vec<Weights>,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub(super) struct Lane(pub(super) [i8; 32]);

#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    /// Powers of two (times 128) that one unit of the product is worth where the step is 1.
    pub(super) unit: f32,
    /// The product of the average key is half of 15 times the sum of the weights: less the whole part of that, sums begin here.
    pub(super) start: i32,
    /// A product is at most this in magnitude, whatever the digits.
    pub(super) reach: i32,
    /// The other part, 0 or a half.
    pub(super) rest: f32,
}

impl CodedQueries {
    /// Starts anew for keys of `nibbles` digits, or for the leading lines of keys of more.
    ///
    /// # Panics
    /// If `nibbles` is not 8, 16, 32 or 64.
    pub fn begin(&mut self, nibbles: usize) {
        assert!(matches!(nibbles, 8 | 16 | 32 | 64), "coded: 8 to 64 digits a query");
        self.nibbles = nibbles;
        self.lanes.clear();
        self.heads.clear();
    }

    /// Adds a query: a digit `c` of a key stands for `(c - 7.5) * step`, and what is sought is the sum of `weights[i]` times
    /// that, a base-2 score. Weights that are not finite count as 0.
    ///
    /// # Panics
    /// If there are not as many weights as digits.
    pub fn push(&mut self, weights: &[f32]) {
        assert_eq!(weights.len(), self.nibbles, "coded: as many weights as digits");
        let finite = |weight: f32| if weight.is_finite() { weight } else { 0.0 };
        let highest = weights.iter().fold(0.0, |high: f32, w| high.max(finite(*w).abs()));
        let magnitude: f32 = weights.iter().map(|w| finite(*w).abs()).sum();
        // Rounding adds at most half per weight.
        let room = MAGNITUDE_MAX - self.nibbles as f32 / 2.0;
        let unit = (highest / 127.0).max(magnitude / room);
        let usable = unit.is_normal();
        let whole = |weight: f32| {
            if usable {
                (finite(weight) / unit).round_ties_even() as i8
            } else {
                0
            }
        };
        let sum: i32 = weights.iter().map(|w| i32::from(whole(*w))).sum();
        let magnitude: i32 = weights.iter().map(|w| i32::from(whole(*w).unsigned_abs())).sum();
        for line in 0..self.nibbles / 8 {
            for first in [4 * line, self.nibbles / 2 + 4 * line] {
                self.lanes
                    .push(Lane(std::array::from_fn(|i| whole(weights[first + i % 4]))));
            }
        }
        self.heads.push(Weights {
            unit: if usable { unit * 128.0 } else { 0.0 },
            start: -((15 * sum) >> 1),
            reach: 15 * magnitude / 2 + 1,
            rest: if sum % 2 == 0 { 0.0 } else { 0.5 },
        });
    }

    /// Queries added.
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// No queries.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Whether levels of keys with this step are right: a digit moves a score by up to some 30 powers of two. Such scores may still
    /// lie beyond [`Level::HIGHEST`].
    pub fn fits(&self, head: usize, step: f32) -> bool {
        self.heads[head].unit * step < (1 << DOUBLED_MAX) as f32
    }
}

/// What turns a product into a level: it is doubled, multiplied by a share of 2^15, and moved.
#[derive(Clone, Copy, Default)]
pub(super) struct Map {
    pub(super) doubled: i32,
    pub(super) factor: i16,
    pub(super) offset: i16,
}

impl Map {
    #[inline(always)]
    pub(super) fn new(weights: Weights, step: f32) -> Self {
        // Without a call.
        let round = |x: f32| (x + ROUNDS).to_bits() as i32 - ROUNDS.to_bits() as i32;
        let unit = weights.unit * step;
        // By the exponent: a share of at least a half wherever it is doubled at all.
        let doubled = ((unit.to_bits() >> 23) as i32 - 126).clamp(0, DOUBLED_MAX);
        let power = |exponent: i32| f32::from_bits(((127 + exponent) as u32) << 23);
        let factor = (unit * power(15 - doubled)).min(32767.0);
        Self {
            doubled,
            factor: round(factor) as i16,
            offset: (AVERAGE - round(weights.rest * factor * power(doubled - 15))) as i16,
        }
    }
}
