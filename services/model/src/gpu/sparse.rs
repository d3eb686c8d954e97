//! Sparse prefill on the device: what each head's pattern is there, and which rows of a step attend by it.
//!
//! The lists of all blocks of a sequence and of all heads are made in one set of launches, then one launch attends over them: rows
//! before the first sparse block and behind the last have dense lists of their own.

use std::ops::Range;

use kvasir_block::KvSchema;
use kvasir_cuda::{
    BlockSparse, FlexPrefill, Gpu, HeadMask, HeadPlan, KvShape, Planner, SparseRows, VerticalSlash, XAttention, plan,
};
use kvasir_sparse::Pattern;

use super::{layout::SequenceRows, load_error};
use crate::{LoadError, ModelShape, SparsePrefill, TileRows};

/// Patterns on the device.
pub(super) struct GpuSparse {
    pub(super) planner: Planner,
    /// Position of the first block that may be sparse.
    from: usize,
    block_tokens: usize,
}

impl GpuSparse {
    pub(super) fn new(
        gpu: &Gpu,
        kv: KvShape,
        shape: &ModelShape,
        schema: &KvSchema,
        sparse: &SparsePrefill,
    ) -> Result<Self, LoadError> {
        if sparse.tile_rows() != TileRows::Rows128 {
            let problem = format!("the GPU's row blocks have {} queries", plan::ROWS);
            return Err(LoadError::Sparse(problem));
        }
        let layers = (0..shape.layers).map(|layer| {
            let heads = sparse.layer(layer).iter().enumerate();
            heads
                .map(|(head, pattern)| {
                    head_plan(pattern, shape.context_tokens_max)
                        .map_err(|why| LoadError::Sparse(format!("layer {layer}, head {head}: {why}")))
                })
                .collect()
        });
        let layers = layers.collect::<Result<Vec<Vec<HeadPlan>>, _>>()?;
        Ok(Self {
            planner: Planner::new(gpu, kv, shape.context_tokens_max, &layers).map_err(load_error)?,
            from: sparse.from(),
            block_tokens: usize::from(schema.block_tokens),
        })
    }

    /// Position of the first block that may be sparse.
    pub(super) fn from(&self) -> usize {
        self.from
    }

    /// The rows of a sequence's launch and those of them that are sparse, which begin with a block, and so with a row block.
    pub(super) fn rows(&self, sequence: &SequenceRows) -> SparseRows {
        let Range { start, end } = sequence.sparse;
        SparseRows {
            rows: sequence.rows().len(),
            sparse: sequence.filling + start..sequence.filling + end,
            part_rows: self.block_tokens,
        }
    }
}

/// What a pattern is on the device, for prompts of up to `tokens` tokens.
fn head_plan(pattern: &Pattern, tokens: usize) -> Result<HeadPlan, String> {
    Ok(match *pattern {
        Pattern::Dense => HeadPlan::Fixed(HeadMask::Dense),
        Pattern::AShape { initial, local } => {
            let [initial, local] = [initial, local].map(|count| (count as usize).min(tokens));
            HeadPlan::Fixed(HeadMask::a_shape(plan::ROWS, initial, local))
        }
        Pattern::VerticalSlash {
            verticals,
            slashes,
            sink,
            near,
        } => HeadPlan::VerticalSlash(VerticalSlash {
            verticals: verticals.max(sink) as usize,
            slashes: slashes.max(near).max(1) as usize,
            sink: sink as usize,
            // A query always sees itself.
            near: near.max(1) as usize,
        }),
        Pattern::BlockSparse { blocks } => HeadPlan::BlockSparse(BlockSparse::new(blocks as usize)),
        Pattern::FlexPrefill { gamma, tau, budget_min } => HeadPlan::FlexPrefill(FlexPrefill {
            gamma,
            tau,
            budget_min: budget_min as usize,
        }),
        Pattern::XAttention { stride, threshold } if matches!(stride, 8 | 16) => HeadPlan::XAttention(XAttention {
            stride: stride as usize,
            threshold,
        }),
        Pattern::XAttention { stride, .. } => {
            return Err(format!(
                "x-attention with stride {stride} is planned for on the CPU alone: a GPU has 8 and 16, or set worker.device = \"cpu\""
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_become_plans() {
        let plans = [
            ("dense", HeadPlan::Fixed(HeadMask::Dense)),
            ("a-shape:4,100", HeadPlan::Fixed(HeadMask::a_shape(plan::ROWS, 4, 100))),
            (
                "a-shape:4,5000",
                HeadPlan::Fixed(HeadMask::a_shape(plan::ROWS, 4, 1000)),
            ),
            (
                "vertical-slash:10,60",
                HeadPlan::VerticalSlash(VerticalSlash {
                    verticals: 30,
                    slashes: 100,
                    sink: 30,
                    near: 100,
                }),
            ),
            ("block-sparse:100", HeadPlan::BlockSparse(BlockSparse { blocks: 100 })),
            // What is always kept fits.
            ("block-sparse:1", HeadPlan::BlockSparse(BlockSparse { blocks: 3 })),
            (
                "flex-prefill:0.9,0.1",
                HeadPlan::FlexPrefill(FlexPrefill {
                    gamma: 0.9,
                    tau: 0.1,
                    budget_min: 1024,
                }),
            ),
            (
                "x-attention:16,0.8",
                HeadPlan::XAttention(XAttention {
                    stride: 16,
                    threshold: 0.8,
                }),
            ),
        ];
        for (text, plan) in plans {
            assert_eq!(head_plan(&text.parse().expect(text), 1000), Ok(plan), "{text}");
        }
        let alone = Pattern::VerticalSlash {
            verticals: 0,
            slashes: 0,
            sink: 0,
            near: 0,
        };
        let own = HeadPlan::VerticalSlash(VerticalSlash {
            verticals: 0,
            slashes: 1,
            sink: 0,
            near: 1,
        });
        assert_eq!(head_plan(&alone, 1000), Ok(own), "a query sees itself");
        let error = head_plan(&"x-attention:4,0.9".parse().expect("a pattern"), 1000).expect_err("no kernel");
        assert!(
            error.contains("stride 4") && error.contains("on the CPU alone"),
            "{error}"
        );
    }
}
