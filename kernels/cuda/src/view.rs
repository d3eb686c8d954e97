//! Where the keys and values of one layer lie on the device.

use std::marker::PhantomData;

use crate::{Buffer, Dtype, GpuError, KvShape, Layout, Plain, StepRows, tensor_map::Rows};

/// Tokens in one view; more would overflow the kernels' 32-bit numbers.
const MAX_TOKENS: usize = 1 << 30;

/// Page numbers of a sequence, on the device: token `t` lies in page `numbers[t / page_tokens]`.
#[derive(Debug)]
pub struct PageTable {
    numbers: Buffer<u32>,
    /// One more than the largest number.
    end: usize,
}

impl PageTable {
    /// Copies page numbers to the device. They are looked at here, so that no kernel can be led outside its pool.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn upload(gpu: &crate::Gpu, numbers: &[u32]) -> Result<Self, GpuError> {
        Ok(Self {
            end: numbers.iter().max().map_or(0, |&most| most as usize + 1),
            numbers: gpu.upload(numbers)?,
        })
    }
}

/// The kernels' `View`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RawView {
    k: u64,
    v: u64,
    k_scale: u64,
    v_scale: u64,
    pages: u64,
    lengths: u64,
    page_stride: u64,
    head_stride: u64,
    scale_head_stride: u64,
    token_stride: u32,
    scale_token_stride: u32,
    pub(crate) tokens: u32,
    page_tokens: u32,
}

impl RawView {
    /// The first `tokens` of these, at most all.
    pub(crate) const fn first(self, tokens: u32) -> Self {
        Self {
            tokens: if tokens < self.tokens { tokens } else { self.tokens },
            ..self
        }
    }

    /// Address of the page numbers; 0 without pages.
    pub(crate) const fn pages(&self) -> u64 {
        self.pages
    }

    /// Keys as rows of `stride` of them end to end, which `heads` of [`Rows`] tell apart and `pages` the KV heads; none in pages.
    pub(crate) fn long_keys(&self, shape: KvShape, stride: usize) -> Option<Rows> {
        let keys = Rows {
            pointer: self.k,
            row_elements: shape.head_dim,
            rows: self.tokens as usize / stride,
            row_stride: stride as u64 * u64::from(self.token_stride),
            heads: stride,
            head_stride: self.token_stride.into(),
            pages: shape.kv_heads,
            page_stride: self.head_stride,
        };
        Some(keys).filter(|keys| self.pages == 0 && keys.serves())
    }

    /// Whether the device says how many tokens there are.
    pub(crate) const fn has_lengths(&self) -> bool {
        self.lengths != 0
    }

    fn new(layout: &Layout, k: u64, v: u64, tokens: usize) -> Result<Self, GpuError> {
        if tokens > MAX_TOKENS {
            let why = format!("{tokens} tokens; a view has at most {MAX_TOKENS}");
            return Err(GpuError::shape("view", why));
        }
        Ok(Self {
            k: k + layout.k as u64,
            v: v + layout.v as u64,
            k_scale: k + layout.k_scale as u64,
            v_scale: k + layout.v_scale as u64,
            pages: 0,
            lengths: 0,
            page_stride: 0,
            head_stride: layout.head_stride as u64,
            token_stride: layout.token_stride as u32,
            scale_head_stride: layout.scale_head_stride as u64,
            scale_token_stride: layout.scale_token_stride as u32,
            tokens: tokens as u32,
            page_tokens: 16,
        })
    }

    fn whole(shape: KvShape, layout: &Layout, memory: Memory, room: usize, tokens: usize) -> Result<Self, GpuError> {
        shape.check()?;
        if room > MAX_TOKENS || tokens > room || layout.bytes > memory.bytes {
            let why = format!(
                "{tokens} tokens in a layout of {room} ({} bytes) in a buffer of {} bytes",
                layout.bytes, memory.bytes
            );
            return Err(GpuError::shape("view", why));
        }
        Self::new(layout, memory.pointer, memory.pointer, tokens)
    }

    fn paged(
        shape: KvShape,
        pool: Memory,
        page_tokens: usize,
        table: &PageTable,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        shape.check()?;
        if page_tokens == 0 || !page_tokens.is_multiple_of(16) || page_tokens > MAX_TOKENS {
            let why = format!("pages of {page_tokens} tokens; a multiple of 16 is needed");
            return Err(GpuError::shape("pages", why));
        }
        let layout = Layout::block(shape, page_tokens);
        let pages = pool.bytes / layout.bytes;
        if table.end > pages {
            let why = format!("page {} of a pool of {pages}", table.end - 1);
            return Err(GpuError::shape("pages", why));
        }
        if tokens > table.numbers.len().saturating_mul(page_tokens) {
            let why = format!("{tokens} tokens in {} pages of {page_tokens}", table.numbers.len());
            return Err(GpuError::shape("pages", why));
        }
        Ok(Self {
            pages: table.numbers.pointer,
            page_stride: layout.bytes as u64,
            page_tokens: page_tokens as u32,
            ..Self::new(&layout, pool.pointer, pool.pointer, tokens)?
        })
    }

    fn fresh(shape: KvShape, k: Memory, v: Memory, tokens: usize) -> Result<Self, GpuError> {
        shape.check()?;
        if shape.dtype == Dtype::E4m3 {
            return Err(GpuError::shape(
                "fresh rows",
                "e4m3 rows have scales, and fresh ones have no place for them",
            ));
        }
        let token = shape.kv_heads * shape.row_bytes();
        let needed = tokens.saturating_mul(token);
        if needed > k.bytes || needed > v.bytes {
            let why = format!(
                "{tokens} tokens need {needed} bytes; keys have {}, values {}",
                k.bytes, v.bytes
            );
            return Err(GpuError::shape("fresh rows", why));
        }
        let layout = Layout {
            k: 0,
            v: 0,
            k_scale: 0,
            v_scale: 0,
            head_stride: shape.row_bytes(),
            token_stride: token,
            scale_head_stride: 0,
            scale_token_stride: 0,
            bytes: needed,
        };
        Self::new(&layout, k.pointer, v.pointer, tokens)
    }
}

/// A buffer's address and size, whatever its elements.
#[derive(Clone, Copy)]
struct Memory {
    pointer: u64,
    bytes: usize,
}

impl<T: Plain> From<&Buffer<T>> for Memory {
    fn from(buffer: &Buffer<T>) -> Self {
        Self {
            pointer: buffer.pointer,
            bytes: buffer.bytes(),
        }
    }
}

/// Keys and values to read. Checked when it is made: no token of it lies outside its buffers.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a> {
    pub(crate) raw: RawView,
    pub(crate) shape: KvShape,
    /// Above every page number; 1 without pages.
    pages: usize,
    borrowed: PhantomData<&'a ()>,
}

impl<'a> KvView<'a> {
    const fn with(raw: RawView, shape: KvShape) -> Self {
        Self {
            raw,
            shape,
            pages: 1,
            borrowed: PhantomData,
        }
    }

    /// The first `tokens` of one [`Layout::block`] that has room for `room`.
    ///
    /// # Errors
    /// If the buffer is too short or the shape has no kernel.
    pub fn block<T: Plain>(
        shape: KvShape,
        buffer: &'a Buffer<T>,
        room: usize,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        RawView::whole(shape, &Layout::block(shape, room), buffer.into(), room, tokens)
            .map(|raw| Self::with(raw, shape))
    }

    /// The first `tokens` of each head's [`Layout::records`], which have room for `room`.
    ///
    /// # Errors
    /// If the buffer is too short or the shape has no kernel.
    pub fn records<T: Plain>(
        shape: KvShape,
        buffer: &'a Buffer<T>,
        room: usize,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        RawView::whole(shape, &Layout::records(shape, room), buffer.into(), room, tokens)
            .map(|raw| Self::with(raw, shape))
    }

    /// The first `tokens` of a sequence in pages of `page_tokens`, each a [`Layout::block`] of `pool`.
    ///
    /// # Errors
    /// If a page lies outside the pool, there are too few pages, or the shape has no kernel.
    pub fn paged<T: Plain>(
        shape: KvShape,
        pool: &'a Buffer<T>,
        page_tokens: usize,
        table: &'a PageTable,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        let raw = RawView::paged(shape, pool.into(), page_tokens, table, tokens)?;
        Ok(Self {
            pages: table.end,
            ..Self::with(raw, shape)
        })
    }

    /// The first `tokens` of page table `table` of a step, in pages of `pool`.
    ///
    /// # Errors
    /// If the step's pages are not all in the pool, the table has no room for the tokens, or the shape has no kernel.
    pub fn of_step<T: Plain>(
        shape: KvShape,
        pool: &'a Buffer<T>,
        step: &'a StepRows,
        table: usize,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        shape.check()?;
        let limits = step.limits();
        let layout = Layout::block(shape, limits.page_tokens);
        let (pointer, numbers) = step.table(table).unwrap_or_default();
        if limits.pages > pool.bytes() / layout.bytes || tokens > numbers.saturating_mul(limits.page_tokens) {
            let why = format!(
                "{tokens} tokens of a table of {numbers} pages below {}, in a pool of {} bytes",
                limits.pages,
                pool.bytes()
            );
            return Err(GpuError::shape("pages", why));
        }
        let raw = RawView {
            pages: pointer,
            page_stride: layout.bytes as u64,
            page_tokens: limits.page_tokens as u32,
            ..RawView::new(&layout, pool.pointer, pool.pointer, tokens)?
        };
        Ok(Self {
            pages: limits.pages,
            ..Self::with(raw, shape)
        })
    }

    /// Above every page number; 1 without pages.
    pub(crate) const fn pages(&self) -> usize {
        self.pages
    }

    /// Whether the two differ in their pages and lengths alone.
    pub(crate) fn shares_pool(&self, other: &Self) -> bool {
        let alike = RawView {
            pages: other.raw.pages,
            tokens: other.raw.tokens,
            ..self.raw
        };
        self.shape == other.shape && alike == other.raw
    }

    /// Where all keys and all values lie, in `pages` pages, for tensor copies of 64 rows; none if such 64 rows may be in several
    /// pages.
    pub(crate) fn rows(&self, pages: usize) -> Option<[Rows; 2]> {
        let (raw, paged) = (&self.raw, self.raw.pages != 0);
        if paged && !raw.page_tokens.is_multiple_of(crate::plan::TILE as u32) {
            return None;
        }
        let rows = |pointer| Rows {
            pointer,
            row_elements: self.shape.head_dim,
            rows: if paged { raw.page_tokens } else { raw.tokens } as usize,
            row_stride: raw.token_stride.into(),
            heads: self.shape.kv_heads,
            head_stride: raw.head_stride,
            pages,
            page_stride: if paged {
                raw.page_stride
            } else {
                raw.token_stride.into()
            },
        };
        Some([rows(raw.k), rows(raw.v)]).filter(|[k, v]| k.serves() && v.serves())
    }

    /// Keys and values as a projection makes them: `k` and `v` are `[tokens, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// If a buffer is too short, the elements are e4m3, or the shape has no kernel.
    pub fn fresh<T: Plain>(
        shape: KvShape,
        k: &'a Buffer<T>,
        v: &'a Buffer<T>,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        RawView::fresh(shape, k.into(), v.into(), tokens).map(|raw| Self::with(raw, shape))
    }

    /// Reads on the device how many tokens are there for each KV head (at most [`KvView::tokens`]): a recorded graph then
    /// serves while a sequence grows, and heads may have retrieved different numbers of rows.
    ///
    /// # Errors
    /// If there are fewer lengths than KV heads.
    pub fn with_lengths(mut self, lengths: &'a Buffer<u32>) -> Result<Self, GpuError> {
        if lengths.len() < self.shape.kv_heads {
            let why = format!("{} lengths for {} KV heads", lengths.len(), self.shape.kv_heads);
            return Err(GpuError::shape("lengths", why));
        }
        self.raw.lengths = lengths.pointer;
        Ok(self)
    }

    /// Tokens, or the most there can be if the lengths are on the device.
    pub const fn tokens(&self) -> usize {
        self.raw.tokens as usize
    }

    /// What the rows are.
    pub const fn shape(&self) -> KvShape {
        self.shape
    }
}

/// Keys and values to write: the same layouts.
#[derive(Debug)]
pub struct KvViewMut<'a> {
    pub(crate) raw: RawView,
    pub(crate) shape: KvShape,
    borrowed: PhantomData<&'a mut ()>,
}

impl<'a> KvViewMut<'a> {
    const fn with(raw: RawView, shape: KvShape) -> Self {
        Self {
            raw,
            shape,
            borrowed: PhantomData,
        }
    }

    /// As [`KvView::block`].
    ///
    /// # Errors
    /// As there.
    pub fn block<T: Plain>(
        shape: KvShape,
        buffer: &'a mut Buffer<T>,
        room: usize,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        let memory = (&*buffer).into();
        RawView::whole(shape, &Layout::block(shape, room), memory, room, tokens).map(|raw| Self::with(raw, shape))
    }

    /// As [`KvView::records`].
    ///
    /// # Errors
    /// As there.
    pub fn records<T: Plain>(
        shape: KvShape,
        buffer: &'a mut Buffer<T>,
        room: usize,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        let memory = (&*buffer).into();
        RawView::whole(shape, &Layout::records(shape, room), memory, room, tokens).map(|raw| Self::with(raw, shape))
    }

    /// As [`KvView::paged`]. A page that stands twice in the table gets the rows of either place.
    ///
    /// # Errors
    /// As there.
    pub fn paged<T: Plain>(
        shape: KvShape,
        pool: &'a mut Buffer<T>,
        page_tokens: usize,
        table: &'a PageTable,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        RawView::paged(shape, (&*pool).into(), page_tokens, table, tokens).map(|raw| Self::with(raw, shape))
    }

    /// Tokens.
    pub const fn tokens(&self) -> usize {
        self.raw.tokens as usize
    }
}

/// Queries of one token, `[q_heads, head_dim]`. The kernels round them to the type they compute in: bf16 for bf16 keys,
/// f16 for f16 and e4m3 keys.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    pub(crate) pointer: u64,
    pub(crate) elements: usize,
    pub(crate) dtype: u32,
    borrowed: PhantomData<&'a ()>,
}

impl<'a> Query<'a> {
    fn with<T: Plain>(buffer: &'a Buffer<T>, dtype: u32) -> Self {
        Self {
            pointer: buffer.pointer,
            elements: buffer.len(),
            dtype,
            borrowed: PhantomData,
        }
    }

    /// Queries in f32.
    pub fn f32(buffer: &'a Buffer<f32>) -> Self {
        Self::with(buffer, 3)
    }

    /// Queries in bf16.
    pub fn bf16(buffer: &'a Buffer<half::bf16>) -> Self {
        Self::with(buffer, Dtype::Bf16.code())
    }

    /// Rows `rows` of queries of `width` elements each, as the bits of bf16 (`Dtype::Bf16`) or of f16.
    ///
    /// # Errors
    /// If the rows lie outside the buffer.
    pub fn rows(
        buffer: &'a Buffer<u16>,
        dtype: Dtype,
        rows: std::ops::Range<usize>,
        width: usize,
    ) -> Result<Self, GpuError> {
        if rows.start > rows.end || rows.end.checked_mul(width).is_none_or(|end| end > buffer.len()) {
            let why = format!("rows {rows:?} of {width} in {} numbers", buffer.len());
            return Err(GpuError::shape("queries", why));
        }
        let all = Self::bits(buffer, dtype);
        Ok(Self {
            pointer: all.pointer + (rows.start * width * 2) as u64,
            elements: rows.len() * width,
            ..all
        })
    }

    /// Queries as the bits of bf16 (`Dtype::Bf16`) or of f16.
    pub fn bits(buffer: &'a Buffer<u16>, dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::with(buffer, Dtype::Bf16.code()),
            Dtype::F16 | Dtype::E4m3 => Self::with(buffer, Dtype::F16.code()),
        }
    }

    /// Queries in f16.
    pub fn f16(buffer: &'a Buffer<half::f16>) -> Self {
        Self::with(buffer, Dtype::F16.code())
    }
}

/// How the query heads of a layer share the grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups {
    pub(crate) heads_per_kv: u32,
    pub(crate) groups_per_kv: u32,
    pub(crate) groups: u32,
}

impl Groups {
    /// Groups of at most 8 query heads of one KV head.
    pub(crate) fn new(shape: KvShape, q_heads: usize) -> Result<Self, GpuError> {
        if q_heads == 0 || !q_heads.is_multiple_of(shape.kv_heads) || q_heads > 1 << 16 {
            let why = format!("{q_heads} query heads over {} KV heads", shape.kv_heads);
            return Err(GpuError::shape("query heads", why));
        }
        let heads_per_kv = (q_heads / shape.kv_heads) as u32;
        let groups_per_kv = heads_per_kv.div_ceil(8);
        Ok(Self {
            heads_per_kv,
            groups_per_kv,
            groups: groups_per_kv * shape.kv_heads as u32,
        })
    }
}
