//! What a row of keys or values is, and in which order rows lie.

use crate::GpuError;

/// Element type of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// OCP e4m3: four exponent and three mantissa bits, up to 448, with one f32 scale per row.
    E4m3,
}

impl Dtype {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::E4m3 => 1,
        }
    }

    /// Number by which the kernels know it.
    pub(crate) const fn code(self) -> u32 {
        match self {
            Self::Bf16 => 0,
            Self::F16 => 1,
            Self::E4m3 => 2,
        }
    }
}

/// What a row of keys or values is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Element type.
    pub dtype: Dtype,
    /// KV heads of the layer.
    pub kv_heads: usize,
    /// Elements of a row: 64 or 128.
    pub head_dim: usize,
}

impl KvShape {
    pub(crate) const fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.bytes()
    }

    const fn scale_bytes(&self) -> usize {
        match self.dtype {
            Dtype::E4m3 => 4,
            Dtype::Bf16 | Dtype::F16 => 0,
        }
    }

    pub(crate) fn check(&self) -> Result<(), GpuError> {
        if self.head_dim != 64 && self.head_dim != 128 {
            let why = format!("head dim {} has no kernel; 64 and 128 have", self.head_dim);
            return Err(GpuError::shape("shape", why));
        }
        if self.kv_heads == 0 || self.kv_heads > 4096 {
            let why = format!("{} KV heads; 1 to 4096 are possible", self.kv_heads);
            return Err(GpuError::shape("shape", why));
        }
        Ok(())
    }
}

/// Byte offsets of the rows of `tokens` tokens. Row `t` of head `h` begins at `k + h * head_stride + t * token_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// First key.
    pub k: usize,
    /// First value.
    pub v: usize,
    /// First scale of the keys (e4m3 only).
    pub k_scale: usize,
    /// First scale of the values (e4m3 only).
    pub v_scale: usize,
    /// From one head to the next.
    pub head_stride: usize,
    /// From one token to the next.
    pub token_stride: usize,
    /// From one head's first scale to the next one's.
    pub scale_head_stride: usize,
    /// From one token's scale to the next one's.
    pub scale_token_stride: usize,
    /// Bytes in all.
    pub bytes: usize,
}

impl Layout {
    /// A layer block or page: all keys, then all values, head after head, token after token (`k-then-v/head-major`); for
    /// e4m3 then the scales of the keys and those of the values, in the same order.
    pub const fn block(shape: KvShape, tokens: usize) -> Self {
        let plane = shape.kv_heads * tokens * shape.row_bytes();
        let scales = shape.kv_heads * tokens * shape.scale_bytes();
        Self {
            k: 0,
            v: plane,
            k_scale: 2 * plane,
            v_scale: 2 * plane + scales,
            head_stride: tokens * shape.row_bytes(),
            token_stride: shape.row_bytes(),
            scale_head_stride: tokens * shape.scale_bytes(),
            scale_token_stride: shape.scale_bytes(),
            bytes: 2 * plane + 2 * scales,
        }
    }

    /// Records, `[kv_heads, tokens]`: a token's key, its value, and for e4m3 both scales and 8 zero bytes, so that every
    /// record begins at a multiple of 16 bytes. The form in which retrieved rows travel, each head having its own tokens.
    pub const fn records(shape: KvShape, tokens: usize) -> Self {
        let row = shape.row_bytes();
        let record = 2 * row + 4 * shape.scale_bytes();
        Self {
            k: 0,
            v: row,
            k_scale: 2 * row,
            v_scale: 2 * row + shape.scale_bytes(),
            head_stride: tokens * record,
            token_stride: record,
            scale_head_stride: tokens * record,
            scale_token_stride: record,
            bytes: shape.kv_heads * tokens * record,
        }
    }
}
