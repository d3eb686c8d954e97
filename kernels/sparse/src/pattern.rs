//! What a head does during prefill: kinds and their parameters.

use serde::{Deserialize, Serialize};

use crate::TILE;

/// How the mask of a head is made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Pattern {
    /// Every key.
    Dense,
    /// The first keys and the last ones, whatever the prompt (StreamingLLM's mask).
    AShape {
        /// First keys.
        initial: u32,
        /// Keys before each query, itself included.
        local: u32,
    },
    /// Columns and diagonals that the last 64 queries of a chunk attend to (MInference).
    VerticalSlash {
        /// Columns, `k_v`; at least `sink`.
        verticals: u32,
        /// Diagonals, `k_s`; at least `near`.
        slashes: u32,
        /// First columns that are always among them.
        #[serde(default = "sink")]
        sink: u32,
        /// Nearest diagonals that are always among them.
        #[serde(default = "near")]
        near: u32,
    },
    /// The key blocks whose mean fits the mean query of a row block (MInference).
    BlockSparse {
        /// Blocks of 64 keys per row block, `k_b`.
        blocks: u32,
    },
    /// By a test on each chunk either whole columns and diagonals or the best blocks, as many as hold a share of the mass
    /// (FlexPrefill).
    FlexPrefill {
        /// Share of the mass, in (0, 1].
        gamma: f32,
        /// Below this distance of the pooled estimate from the truth its blocks are taken; 0 never takes them.
        tau: f32,
        /// Least keys per row block.
        #[serde(default = "budget_min")]
        budget_min: u32,
    },
    /// The fewest tiles with a share of the mass, told by sums along antidiagonals (XAttention).
    XAttention {
        /// Distance of antidiagonals: 8 or 16 as published; divides 64.
        stride: u32,
        /// Share of the mass, in (0, 1].
        threshold: f32,
    },
}

const fn sink() -> u32 {
    30
}

const fn near() -> u32 {
    100
}

const fn budget_min() -> u32 {
    1024
}

/// A parameter that is out of range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {parameter} is {found}: {expected}")]
pub struct BadPattern {
    /// The pattern's kind, as files name it.
    pub kind: &'static str,
    /// The parameter, likewise.
    pub parameter: &'static str,
    /// What it is.
    pub found: String,
    /// What it must be.
    pub expected: &'static str,
}

impl std::str::FromStr for Pattern {
    type Err = String;

    /// `kind:parameters`, as in `a-shape:256,1024`: those that have no default, in the order of the fields.
    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        let parameters: Vec<&str> = rest.split(',').filter(|part| !part.is_empty()).collect();
        let whole = |at: usize| parameters.get(at)?.trim().parse::<u32>().ok();
        let share = |at: usize| parameters.get(at)?.trim().parse::<f32>().ok();
        let both = |a, b| Option::zip(whole(a), whole(b));
        let found = match (kind, parameters.len()) {
            ("dense", 0) => Some(Self::Dense),
            ("a-shape", 2) => both(0, 1).map(|(initial, local)| Self::AShape { initial, local }),
            ("vertical-slash", 2) => both(0, 1).map(|(verticals, slashes)| Self::vertical_slash(verticals, slashes)),
            ("block-sparse", 1) => whole(0).map(|blocks| Self::BlockSparse { blocks }),
            ("flex-prefill", 2) => share(0)
                .zip(share(1))
                .map(|(gamma, tau)| Self::flex_prefill(gamma, tau)),
            ("x-attention", 2) => whole(0)
                .zip(share(1))
                .map(|(stride, threshold)| Self::XAttention { stride, threshold }),
            _ => None,
        };
        let pattern = found.ok_or_else(|| {
            format!(
                "{text:?} is no pattern: write dense, a-shape:INITIAL,LOCAL, vertical-slash:COLUMNS,DIAGONALS, block-sparse:BLOCKS, \
                 flex-prefill:GAMMA,TAU or x-attention:STRIDE,THRESHOLD"
            )
        })?;
        pattern.validate().map_err(|error| error.to_string())?;
        Ok(pattern)
    }
}

impl std::fmt::Display for Pattern {
    /// What [`Pattern::from_str`](std::str::FromStr::from_str) reads; other parameters than those are left out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = self.kind();
        match self {
            Self::Dense => f.write_str(kind),
            Self::AShape { initial, local } => write!(f, "{kind}:{initial},{local}"),
            Self::VerticalSlash { verticals, slashes, .. } => write!(f, "{kind}:{verticals},{slashes}"),
            Self::BlockSparse { blocks } => write!(f, "{kind}:{blocks}"),
            Self::FlexPrefill { gamma, tau, .. } => write!(f, "{kind}:{gamma},{tau}"),
            Self::XAttention { stride, threshold } => write!(f, "{kind}:{stride},{threshold}"),
        }
    }
}

/// More than any context has; bounds what a file can make a planner allocate.
const COUNT_MAX: u32 = 1 << 24;

impl Pattern {
    /// Vertical-Slash with the floors of MInference's code: at least 30 columns and 50 diagonals, of which the first 30 and the
    /// nearest 100.
    pub const fn vertical_slash(verticals: u32, slashes: u32) -> Self {
        Self::VerticalSlash {
            verticals: if verticals < 30 { 30 } else { verticals },
            slashes: if slashes < 50 { 50 } else { slashes },
            sink: sink(),
            near: near(),
        }
    }

    /// FlexPrefill with its published parameters.
    pub const fn flex_prefill(gamma: f32, tau: f32) -> Self {
        Self::FlexPrefill {
            gamma,
            tau,
            budget_min: budget_min(),
        }
    }

    /// Its name in files and tables.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::AShape { .. } => "a-shape",
            Self::VerticalSlash { .. } => "vertical-slash",
            Self::BlockSparse { .. } => "block-sparse",
            Self::FlexPrefill { .. } => "flex-prefill",
            Self::XAttention { .. } => "x-attention",
        }
    }

    /// Checks what planners rely on.
    ///
    /// # Errors
    /// [`BadPattern`] for the first parameter that is out of range.
    pub fn validate(&self) -> Result<(), BadPattern> {
        let bad = |parameter, found: String, expected| {
            Err(BadPattern {
                kind: self.kind(),
                parameter,
                found,
                expected,
            })
        };
        let counts: [(&'static str, u32, u32); 4] = match *self {
            Self::Dense | Self::XAttention { .. } => [("", 0, 0); 4],
            Self::AShape { initial, local } => [("initial", initial, 1), ("local", local, 1), ("", 0, 0), ("", 0, 0)],
            Self::VerticalSlash {
                verticals,
                slashes,
                sink,
                near,
            } => [
                ("verticals", verticals, 0),
                ("slashes", slashes, 0),
                ("sink", sink, 1),
                ("near", near, 1),
            ],
            Self::BlockSparse { blocks } => [("blocks", blocks, 1), ("", 0, 0), ("", 0, 0), ("", 0, 0)],
            Self::FlexPrefill { budget_min, .. } => [("budget_min", budget_min, 0), ("", 0, 0), ("", 0, 0), ("", 0, 0)],
        };
        for (parameter, found, least) in counts {
            if found > COUNT_MAX || found < least {
                let expected = if least == 0 { "at most 2^24" } else { "from 1 to 2^24" };
                return bad(parameter, found.to_string(), expected);
            }
        }
        // Written so that NaN fails too.
        let is_share = |share: f32| share > 0.0 && share <= 1.0;
        match *self {
            Self::FlexPrefill { gamma, .. } if !is_share(gamma) => bad("gamma", gamma.to_string(), "a share in (0, 1]"),
            Self::FlexPrefill { tau, .. } if !(0.0..=1.0).contains(&tau) => {
                bad("tau", tau.to_string(), "a distance in [0, 1]")
            }
            Self::XAttention { threshold, .. } if !is_share(threshold) => {
                bad("threshold", threshold.to_string(), "a share in (0, 1]")
            }
            Self::XAttention { stride, .. } if stride == 0 || !(TILE as u32).is_multiple_of(stride) => {
                bad("stride", stride.to_string(), "a divisor of 64")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_read_as_they_are_shown() {
        let table = [
            "dense",
            "a-shape:256,1024",
            "vertical-slash:100,800",
            "block-sparse:20",
            "flex-prefill:0.9,0.1",
            "x-attention:8,0.85",
        ];
        for text in table {
            let pattern: Pattern = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(pattern.to_string(), text);
            assert_eq!(pattern.validate(), Ok(()));
        }
        for text in [
            "",
            "dense:1",
            "a-shape:1",
            "a-shape:0,4",
            "block-sparse:-1",
            "x-attention:9,0.5",
            "flex-prefill:2,0",
        ] {
            assert!(text.parse::<Pattern>().is_err(), "{text:?}");
        }
    }
}
