//! Random rows in random layouts, on the host and on the device.

use kvasir_cuda::{
    Buffer, Dtype, Gpu, GpuError, KvShape, KvView, Layout, PageTable,
    reference::{Placement, Rows},
};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};

/// How rows lie.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    Block,
    Records,
    Paged,
    Fresh,
}

/// Rows on the device in one form, surrounded by NaN wherever there is none.
pub(crate) struct Held {
    pub(crate) form: Form,
    pub(crate) shape: KvShape,
    /// What the device holds, converted back.
    pub(crate) rows: Rows,
    /// Tokens that are there, per KV head.
    pub(crate) lengths: Vec<usize>,
    pub(crate) placement: Placement,
    /// The bytes that the device holds, keys and values together.
    pub(crate) host: Vec<u8>,
    room: usize,
    bytes: Buffer<u8>,
    values: Buffer<u8>,
    pages: PageTable,
    on_device: Option<Buffer<u32>>,
}

pub(crate) const PAGE_TOKENS: usize = 64;

/// Numbers of a bell-like shape with some large ones, as activations have.
pub(crate) fn numbers(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let x: f32 = (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum();
            if rng.random_bool(0.01) { 8.0 * x } else { x }
        })
        .collect()
}

/// A length that is often at a border.
pub(crate) fn length(rng: &mut StdRng, most: usize) -> usize {
    match rng.random_range(0..6) {
        0 => 0,
        1 => rng.random_range(0..=17),
        2 => 64 * rng.random_range(0..=most / 64),
        _ => rng.random_range(0..=most),
    }
}

impl Held {
    pub(crate) fn new(
        gpu: &Gpu,
        rng: &mut StdRng,
        shape: KvShape,
        form: Form,
        tokens: usize,
        cut: bool,
    ) -> Result<Self, GpuError> {
        let room = tokens + rng.random_range(0..5);
        let elements = shape.kv_heads * tokens * shape.head_dim;
        let rows = Rows {
            k: numbers(rng, elements),
            v: numbers(rng, elements),
            tokens,
        };
        let needed = tokens.div_ceil(PAGE_TOKENS);
        let (layout, count) = match form {
            Form::Block => (Layout::block(shape, room), 1),
            Form::Records => (Layout::records(shape, room), 1),
            Form::Paged => (Layout::block(shape, PAGE_TOKENS), needed + 3),
            Form::Fresh => (fresh(shape, tokens), 1),
        };
        let mut numbers: Vec<u32> = (0..count as u32).collect();
        numbers.shuffle(rng);
        numbers.truncate(needed);
        let pages = matches!(form, Form::Paged).then(|| (PAGE_TOKENS, numbers.clone()));
        let placement = Placement { shape, layout, pages };
        // All ones are a NaN in bf16, f16, e4m3 and f32: whatever is read by mistake shows.
        let mut host = vec![0xff; layout.bytes * count];
        placement.write(&rows, &mut host);
        let rows = placement.read(tokens, &host);
        let (keys, values) = match form {
            Form::Fresh => host.split_at(host.len() / 2),
            _ => (&host[..], &[][..]),
        };
        let (bytes, values) = (gpu.upload(keys)?, gpu.upload(values)?);
        let lengths: Vec<usize> = (0..shape.kv_heads)
            .map(|_| if cut { rng.random_range(0..=tokens) } else { tokens })
            .collect();
        let on_device: Vec<u32> = lengths.iter().map(|&length| length as u32).collect();
        Ok(Self {
            form,
            shape,
            rows,
            lengths,
            placement,
            host,
            room,
            bytes,
            values,
            pages: PageTable::upload(gpu, &numbers)?,
            on_device: if cut { Some(gpu.upload(&on_device)?) } else { None },
        })
    }

    pub(crate) fn view(&self) -> Result<KvView<'_>, GpuError> {
        self.view_below(self.rows.tokens)
    }

    /// Of the positions below `tokens`.
    pub(crate) fn view_below(&self, tokens: usize) -> Result<KvView<'_>, GpuError> {
        let shape = self.shape;
        let view = match self.form {
            Form::Block => KvView::block(shape, &self.bytes, self.room, tokens),
            Form::Records => KvView::records(shape, &self.bytes, self.room, tokens),
            Form::Paged => KvView::paged(shape, &self.bytes, PAGE_TOKENS, &self.pages, tokens),
            Form::Fresh => KvView::fresh(shape, &self.bytes, &self.values, tokens),
        }?;
        match &self.on_device {
            Some(lengths) => view.with_lengths(lengths),
            None => Ok(view),
        }
    }
}

/// `[tokens, kv_heads, head_dim]` keys, then such values.
fn fresh(shape: KvShape, tokens: usize) -> Layout {
    let row = shape.head_dim * shape.dtype.bytes();
    Layout {
        k: 0,
        v: tokens * shape.kv_heads * row,
        head_stride: row,
        token_stride: shape.kv_heads * row,
        bytes: 2 * tokens * shape.kv_heads * row,
        ..Layout::block(shape, 0)
    }
}

pub(crate) fn any_shape(rng: &mut StdRng) -> KvShape {
    KvShape {
        dtype: [Dtype::Bf16, Dtype::F16, Dtype::E4m3][rng.random_range(0..3)],
        kv_heads: [1, 2, 3, 8][rng.random_range(0..4)],
        head_dim: [64, 128][rng.random_range(0..2)],
    }
}

pub(crate) fn any_form(rng: &mut StdRng, dtype: Dtype) -> Form {
    let forms = [Form::Block, Form::Records, Form::Paged, Form::Fresh];
    forms[rng.random_range(0..if dtype == Dtype::E4m3 { 3 } else { 4 })]
}
