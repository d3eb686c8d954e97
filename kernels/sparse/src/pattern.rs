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
