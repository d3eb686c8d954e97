//! Tensor maps: what Hopper's copy engine is told of a tensor.

use cudarc::driver::sys;

use crate::GpuError;

/// Rows of 16-bit numbers in global memory, `pages` times `heads` times `rows`, of which copies take boxes of 64 rows by 64 numbers
/// into shared memory, swizzled by 128 bytes. What a box has outside the tensor is zeros.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) pointer: u64,
    pub(crate) row_elements: usize,
    pub(crate) rows: usize,
    pub(crate) row_stride: u64,
    pub(crate) heads: usize,
    pub(crate) head_stride: u64,
    pub(crate) pages: usize,
    pub(crate) page_stride: u64,
}

/// The kernels' `TensorMap`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TensorMap([u64; 16]);

impl Rows {
    /// Whether the copy engine can be told of them: addresses and strides are multiples of 16 bytes, strides below 2^40.
    pub(crate) const fn serves(&self) -> bool {
        let strides = self.row_stride | self.head_stride | self.page_stride;
        (self.pointer | strides).is_multiple_of(16)
            && strides < 1 << 40
            && self.rows > 0
            && self.heads > 0
            && self.pages > 0
    }

    /// The map, made by the driver.
    ///
    /// # Errors
    /// If the driver refuses it.
    pub(crate) fn map(&self) -> Result<TensorMap, GpuError> {
        let mut map = TensorMap::default();
        let sizes = [self.row_elements, self.rows, self.heads, self.pages].map(|size| size as u64);
        let strides = [self.row_stride, self.head_stride, self.page_stride];
        let (one_box, steps) = ([64u32, 64, 1, 1], [1u32; 4]);
        // SAFETY: the map has the 128 bytes and the alignment of a `CUtensorMap`; the arrays hold as many numbers as four
        // dimensions need; the address is only written down.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                4,
                self.pointer as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                one_box.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(GpuError::driver("describing a tensor"))?;
        Ok(map)
    }
}
