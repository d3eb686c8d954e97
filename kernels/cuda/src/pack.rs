//! Rows from one layout to another, with conversion to and from e4m3: what offload and onboard are made of.

use crate::{Dtype, Family, Gpu, GpuError, KvView, KvViewMut, view::RawView};

#[repr(C)]
struct PackParams {
    from: RawView,
    to: RawView,
    kv_heads: u32,
}

/// Copies all rows of `from` to the same tokens of `to`: fresh rows to pages, pages to push records, records to pages.
/// Element types may differ only where one of them is e4m3.
///
/// To e4m3 each row gets the scale `largest magnitude / 448` and is multiplied by `448 / largest magnitude` before it is
/// rounded to nearest; rows below 1e-30 become zeros with scale 1. The result is that of
/// [`quantize`](crate::reference::quantize), bit for bit.
///
/// # Errors
/// If the shapes or the numbers of tokens differ, or there is no such conversion; nothing is launched then.
pub fn copy_rows(gpu: &Gpu, from: &KvView<'_>, to: &mut KvViewMut<'_>) -> Result<(), GpuError> {
    let (shape, other) = (from.shape, to.shape);
    if (shape.kv_heads, shape.head_dim, from.tokens()) != (other.kv_heads, other.head_dim, to.tokens()) {
        let why = format!("{} tokens of {shape:?} to {} of {other:?}", from.tokens(), to.tokens());
        return Err(GpuError::shape("copy_rows", why));
    }
    let wide = shape.head_dim == 128;
    let kernel = match (shape.dtype, other.dtype) {
        (Dtype::Bf16, Dtype::Bf16) | (Dtype::F16, Dtype::F16) if wide => "copy_16_128",
        (Dtype::Bf16, Dtype::Bf16) | (Dtype::F16, Dtype::F16) => "copy_16_64",
        (Dtype::E4m3, Dtype::E4m3) if wide => "copy_e4m3_128",
        (Dtype::E4m3, Dtype::E4m3) => "copy_e4m3_64",
        (Dtype::Bf16, Dtype::E4m3) if wide => "bf16_to_e4m3_128",
        (Dtype::Bf16, Dtype::E4m3) => "bf16_to_e4m3_64",
        (Dtype::F16, Dtype::E4m3) if wide => "f16_to_e4m3_128",
        (Dtype::F16, Dtype::E4m3) => "f16_to_e4m3_64",
        (Dtype::E4m3, Dtype::Bf16) if wide => "e4m3_to_bf16_128",
        (Dtype::E4m3, Dtype::Bf16) => "e4m3_to_bf16_64",
        (Dtype::E4m3, Dtype::F16) if wide => "e4m3_to_f16_128",
        (Dtype::E4m3, Dtype::F16) => "e4m3_to_f16_64",
        (Dtype::Bf16, Dtype::F16) | (Dtype::F16, Dtype::Bf16) => {
            return Err(GpuError::shape(
                "copy_rows",
                "bf16 and f16 are not converted into each other",
            ));
        }
    };
    if from.tokens() == 0 {
        return Ok(());
    }
    let params = PackParams {
        from: from.raw,
        to: to.raw,
        kv_heads: shape.kv_heads as u32,
    };
    // Rows of a CTA's pass: 256 threads, at most 16 to a row. Enough CTAs to fill the device, no more than there is work.
    let ctas = from
        .tokens()
        .div_ceil(16)
        .min((16 * gpu.multiprocessors()).div_ceil(shape.kv_heads)) as u32;
    // SAFETY: `PackParams` is pack.cu's; both views were checked against their buffers when they were made, and the
    // borrow of `to` is exclusive, so that they do not overlap.
    unsafe { gpu.launch(Family::Pack, kernel, (ctas, shape.kv_heads as u32, 1), 256, &params) }
}
