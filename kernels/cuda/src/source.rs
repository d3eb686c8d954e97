//! The kernels' sources, which are part of the library.

use sha2::{Digest, Sha256};

/// A set of kernels that is compiled and loaded together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `decode_partial`: attention of one token, split over the keys, with the fused merge.
    Decode,
    /// `merge`: joins partials.
    Merge,
    /// `copy_rows`: between fresh keys and values, pages and push records, with conversion to and from e4m3.
    Pack,
    /// `key_scores`: dot products of queries with every key.
    Scores,
    /// `top_k`: the largest scores of each row.
    TopK,
    /// `prefill`: attention of a prompt over a list of tiles.
    Prefill,
    /// `linear`: rows times a matrix of weights.
    Linear,
    /// `embed`, `rms_norm`, `rope`, `silu_mul`, `round`: what a forward does to rows.
    Rows,
    /// `vs_estimate` and `vs_build`: a Vertical-Slash list from the prompt itself.
    Plan,
    /// `block_scores` and `blocks_build`: a Block-Sparse list from the prompt itself.
    Blocks,
    /// `flex_test`, `flex_choose`, `flex_build` and what lies between: FlexPrefill's lists from the prompt itself.
    FlexPrefill,
    /// `long_scores` and `x_attention_build`: XAttention's lists from the prompt itself.
    XAttention,
    /// `sample_best`, `sample_weigh`, `sample_list`, `sample_draw`: the next token of every row.
    Sample,
}

/// How the kernels are compiled. All variants give the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Variant {
    /// For use.
    #[default]
    Plain,
    /// With random delays where threads wait for each other: slow, and a race that is there shows in the result.
    Delays,
    /// Every thread says itself that it has read or written, for tools that follow a barrier no further than one step.
    Direct,
}

impl Variant {
    /// The macro that the sources look at.
    pub(crate) const fn define(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Delays => Some("DELAYS"),
            Self::Direct => Some("DIRECT"),
        }
    }
}

/// Headers that the families share.
pub(crate) const HEADERS: &[(&str, &str)] = &[
    ("types.cuh", include_str!("../cuda/types.cuh")),
    ("tile.cuh", include_str!("../cuda/tile.cuh")),
    ("softmax.cuh", include_str!("../cuda/softmax.cuh")),
    ("hopper.cuh", include_str!("../cuda/hopper.cuh")),
    ("kv.cuh", include_str!("../cuda/kv.cuh")),
    ("prefill.cuh", include_str!("../cuda/prefill.cuh")),
    ("prefill_wide.cuh", include_str!("../cuda/prefill_wide.cuh")),
    ("sample.cuh", include_str!("../cuda/sample.cuh")),
    ("linear.cuh", include_str!("../cuda/linear.cuh")),
    ("linear_wide.cuh", include_str!("../cuda/linear_wide.cuh")),
    ("keys.cuh", include_str!("../cuda/keys.cuh")),
    ("planner.cuh", include_str!("../cuda/planner.cuh")),
    ("products.cuh", include_str!("../cuda/products.cuh")),
    ("share.cuh", include_str!("../cuda/share.cuh")),
];

impl Family {
    /// All families.
    pub const ALL: &[Self] = &[
        Self::Decode,
        Self::Merge,
        Self::Pack,
        Self::Scores,
        Self::TopK,
        Self::Prefill,
        Self::Linear,
        Self::Rows,
        Self::Plan,
        Self::Blocks,
        Self::FlexPrefill,
        Self::XAttention,
        Self::Sample,
    ];

    /// Name of the family and of its source file, without the ending.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Merge => "merge",
            Self::Pack => "pack",
            Self::Scores => "scores",
            Self::TopK => "top_k",
            Self::Prefill => "prefill",
            Self::Linear => "linear",
            Self::Rows => "rows",
            Self::Plan => "plan",
            Self::Blocks => "blocks",
            Self::FlexPrefill => "flex_prefill",
            Self::XAttention => "x_attention",
            Self::Sample => "sample",
        }
    }

    /// The CUDA C++ source.
    pub const fn source(self) -> &'static str {
        match self {
            Self::Decode => include_str!("../cuda/decode.cu"),
            Self::Merge => include_str!("../cuda/merge.cu"),
            Self::Pack => include_str!("../cuda/pack.cu"),
            Self::Scores => include_str!("../cuda/scores.cu"),
            Self::TopK => include_str!("../cuda/top_k.cu"),
            Self::Prefill => include_str!("../cuda/prefill.cu"),
            Self::Linear => include_str!("../cuda/linear.cu"),
            Self::Rows => include_str!("../cuda/rows.cu"),
            Self::Plan => include_str!("../cuda/plan.cu"),
            Self::Blocks => include_str!("../cuda/blocks.cu"),
            Self::FlexPrefill => include_str!("../cuda/flex_prefill.cu"),
            Self::XAttention => include_str!("../cuda/x_attention.cu"),
            Self::Sample => include_str!("../cuda/sample.cu"),
        }
    }

    /// SHA-256 of everything that the family is compiled from, as 32 hexadecimal digits: a part of its name in the cache.
    pub(crate) fn digest(self) -> String {
        let mut hash = Sha256::new();
        for part in [self.name(), self.source()]
            .into_iter()
            .chain(HEADERS.iter().flat_map(|(name, text)| [*name, *text]))
        {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        for option in crate::nvrtc::FLAGS {
            hash.update(option);
        }
        hex(&hash.finalize()[..16])
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
