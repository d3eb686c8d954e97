//! The plans of a layer's heads on the device.

use super::{HeadPlan, Heads};
use crate::{
    BlockSparse, Buffer, Gpu, GpuError, HeadMask, Mask, VerticalSlash,
    plan::{ROWS, TILE},
    tiles::{DENSE_LIST, LIST_WORDS, relative_list},
    x_attention::STRIDES,
};

/// Words of a head's plan, see planner.cuh: kind, numbers, a list, and what a share needs.
const WORDS: usize = 6 + LIST_WORDS + 3;
const LIST: usize = 6;
const SHARE: usize = LIST + LIST_WORDS;

#[derive(Debug)]
pub(super) struct LayerPlans {
    pub(super) plans: Buffer<u32>,
    pub(super) vertical_slash: Heads<VerticalSlash>,
    pub(super) block_sparse: Heads<BlockSparse>,
    /// Whether any of them has a test.
    pub(super) flex_prefill: Heads<bool>,
    /// By stride.
    pub(super) x_attention: [Heads<()>; STRIDES.len()],
}

impl LayerPlans {
    pub(super) fn new(
        gpu: &Gpu,
        heads: &[HeadPlan],
        tokens_max: usize,
        fixed: &mut Vec<u32>,
    ) -> Result<Self, GpuError> {
        let masks = heads.iter().filter_map(|head| match head {
            HeadPlan::Fixed(mask) => Some(mask.clone()),
            _ => None,
        });
        Mask::new(ROWS, masks.collect()).map_err(|error| GpuError::shape("planner", error.to_string()))?;
        let (mut words, mut slash_heads, mut block_heads, mut flex_heads) = (vec![], vec![], vec![], vec![]);
        let mut x_heads = STRIDES.map(|_| Vec::new());
        let mut slashes_most = VerticalSlash::NOTHING;
        let mut blocks_most = BlockSparse { blocks: 0 };
        let mut any_test = false;
        for (head, plan) in heads.iter().enumerate() {
            let mut record = [0u32; WORDS];
            match plan {
                HeadPlan::Fixed(HeadMask::Dense) => record[LIST..SHARE].copy_from_slice(&DENSE_LIST),
                HeadPlan::Fixed(HeadMask::Relative { tiles, columns }) => {
                    record[LIST..SHARE].copy_from_slice(&relative_list(tiles, columns, fixed));
                }
                HeadPlan::Fixed(HeadMask::Absolute { .. }) => {
                    let why = format!("head {head}: fixed tiles by row block");
                    return Err(GpuError::shape("planner", why));
                }
                HeadPlan::VerticalSlash(plan) => {
                    let plan = plan.checked(head)?;
                    slashes_most = slashes_most.most(plan);
                    slash_heads.push(head as u32);
                    let numbers = [plan.verticals, plan.slashes, plan.sink, plan.near];
                    record[0] = 1;
                    record[1..5].copy_from_slice(&numbers.map(|number| number as u32));
                }
                HeadPlan::BlockSparse(plan) => {
                    let plan = plan.checked(head)?;
                    blocks_most.blocks = blocks_most.blocks.max(plan.blocks);
                    block_heads.push(head as u32);
                    record[0] = 2;
                    record[5] = plan.blocks as u32;
                }
                HeadPlan::FlexPrefill(plan) => {
                    let plan = plan.checked(head)?;
                    any_test |= plan.tau > 0.0;
                    flex_heads.push(head as u32);
                    record[0] = 3;
                    let least = plan.budget_min.div_ceil(TILE) as u32;
                    record[SHARE..].copy_from_slice(&[plan.gamma.to_bits(), plan.tau.to_bits(), least]);
                }
                HeadPlan::XAttention(plan) => {
                    let plan = plan.checked(head, tokens_max)?;
                    let of_stride = x_heads
                        .iter_mut()
                        .zip(STRIDES)
                        .filter(|(_, stride)| *stride == plan.stride);
                    of_stride.for_each(|(heads, _)| heads.push(head as u32));
                    record[0] = 4;
                    record[SHARE] = plan.threshold.to_bits();
                }
            }
            words.extend(record);
        }
        let [of_first, of_second] = x_heads;
        Ok(Self {
            plans: gpu.upload(&words)?,
            vertical_slash: Heads::upload(gpu, &slash_heads, slashes_most)?,
            block_sparse: Heads::upload(gpu, &block_heads, blocks_most)?,
            flex_prefill: Heads::upload(gpu, &flex_heads, any_test)?,
            x_attention: [Heads::upload(gpu, &of_first, ())?, Heads::upload(gpu, &of_second, ())?],
        })
    }
}

impl<T> Heads<T> {
    fn upload(gpu: &Gpu, numbers: &[u32], most: T) -> Result<Self, GpuError> {
        Ok(Self {
            numbers: gpu.upload(numbers)?,
            count: numbers.len(),
            most,
        })
    }
}
