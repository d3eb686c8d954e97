//! The speed of prefill and of its planners, batch 1. Inputs are noise made on the device; the kernels' work does not depend on it,
//! but for planners that choose by share of the mass: see [`sharp`].

use kvasir_cuda::{
    BlockSparse, Buffer, DeviceTiles, Dtype, FlexPrefill, Gpu, GpuError, HeadMask, HeadPlan, KvShape, KvView, Mask,
    PageTable, Planner, Prefill, Products, Query, SparseRows, VerticalSlash, XAttention, noise, plan::ROWS,
};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};
use serde_json::{Map, Value, json};

use crate::prefill::products;

/// Counted runs of a measurement; beyond [`LONG`] tokens one, and none before it.
const REPEATS: usize = 5;
const LONG: usize = 256 * 1024;
const PAGE_TOKENS: usize = 64;

/// Heads and row of a layer.
#[derive(Clone, Copy)]
struct Layer {
    dtype: Dtype,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

const LLAMA: Layer = Layer {
    dtype: Dtype::Bf16,
    q_heads: 32,
    kv_heads: 8,
    head_dim: 128,
};

/// Shapes that are measured densely alone: other types, the smaller head, that of SmolLM2.
const OTHERS: [Layer; 3] = [
    Layer {
        dtype: Dtype::F16,
        ..LLAMA
    },
    Layer { head_dim: 64, ..LLAMA },
    Layer {
        dtype: Dtype::F16,
        q_heads: 9,
        kv_heads: 3,
        head_dim: 64,
    },
];

impl Layer {
    const fn shape(&self) -> KvShape {
        KvShape {
            dtype: self.dtype,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn text(&self) -> String {
        let (q, kv, d) = (self.q_heads, self.kv_heads, self.head_dim);
        format!("{q} query heads, {kv} KV heads, d {d}, {:?}", self.dtype).to_lowercase()
    }
}

/// Queries, keys and values of a prompt, and room for the output.
struct Inputs {
    layer: Layer,
    tokens: usize,
    q: Buffer<u16>,
    k: Buffer<u16>,
    v: Buffer<u16>,
    out: Buffer<u16>,
    lse: Buffer<f32>,
}

impl Inputs {
    fn new(gpu: &Gpu, rng: &mut StdRng, layer: Layer, tokens: usize) -> Result<Self, GpuError> {
        let mut random = |len: usize| {
            let mut to = gpu.zeros(len)?;
            noise(gpu, layer.dtype, &mut to, rng.random(), 1.0)?;
            Ok::<_, GpuError>(to)
        };
        let width = tokens * layer.head_dim;
        Ok(Self {
            q: random(layer.q_heads * width)?,
            // A few numbers apart, so that rows of keys and of values do not meet in the same places of the cache.
            k: random(layer.kv_heads * width + 8)?,
            v: random(layer.kv_heads * width + 8)?,
            out: gpu.zeros(layer.q_heads * width)?,
            lse: gpu.zeros(layer.q_heads * tokens)?,
            layer,
            tokens,
        })
    }

    /// Milliseconds and rate of attention where all heads have the same tiles.
    fn attend(
        &mut self,
        gpu: &Gpu,
        pages: Option<(&Buffer<u16>, &PageTable)>,
        head: &HeadMask,
        products: Products,
    ) -> Result<Value, GpuError> {
        let Layer {
            dtype,
            q_heads,
            head_dim,
            ..
        } = self.layer;
        let scale = self.layer.scale();
        let view = match pages {
            Some((pool, table)) => KvView::paged(self.layer.shape(), pool, PAGE_TOKENS, table, self.tokens)?,
            None => KvView::fresh(self.layer.shape(), &self.k, &self.v, self.tokens)?,
        };
        let one = Mask::new(ROWS, vec![head.clone()]).expect("in order");
        let work = one.work(0, 0, self.tokens);
        let list = Mask::new(ROWS, vec![head.clone(); q_heads]).expect("in order");
        let tiles = DeviceTiles::upload(gpu, &list)?;
        let prefill = Prefill {
            rows: self.tokens,
            q_heads,
            scale,
            products,
        };
        let query = Query::bits(&self.q, dtype);
        let (out, lse) = (&mut self.out, &mut self.lse);
        let ms = median(gpu, self.tokens, || prefill.attend(gpu, query, &view, &tiles, out, lse))?;
        // Of tiles, each 128 rows by 64 keys; for dense of the causal half.
        let flops = if *head == HeadMask::Dense {
            2.0 * (self.tokens * self.tokens * head_dim * q_heads) as f64
        } else {
            (work * 4 * 128 * 64 * head_dim * q_heads) as f64
        };
        Ok(json!({ "ms": ms, "tflop_s": (flops / ms / 1e9).round(), "tiles": work }))
    }

    /// Milliseconds of a list's making, all heads alike and the prompt planned for as a whole, with scores sharpened so many times.
    fn plan(&self, gpu: &Gpu, plan: HeadPlan, sharpened: f32) -> Result<f64, GpuError> {
        let (mut planner, rows) = self.planner(gpu, plan)?;
        let view = KvView::fresh(self.layer.shape(), &self.k, &self.v, self.tokens)?;
        let query = Query::bits(&self.q, self.layer.dtype);
        let scale = sharpened * self.layer.scale();
        median(gpu, 0, || planner.build(gpu, 0, query, &rows, &view, scale).map(|_| ()))
    }

    /// Milliseconds of attention over such a list, and its tiles beside those of dense attention.
    /// This is counted from the lists, which of long prompts are too many to bring to the host.
    fn attend_planned(&mut self, gpu: &Gpu, plan: HeadPlan, sharpened: f32) -> Result<(f64, Option<f64>), GpuError> {
        let (mut planner, rows) = self.planner(gpu, plan)?;
        let view = KvView::fresh(self.layer.shape(), &self.k, &self.v, self.tokens)?;
        let query = Query::bits(&self.q, self.layer.dtype);
        let scale = sharpened * self.layer.scale();
        planner.build(gpu, 0, query, &rows, &view, scale)?;
        let density = if self.tokens > LONG {
            None
        } else {
            let lists = planner.lists()?;
            let tiles = lists.iter().flatten().map(|list| match list {
                HeadMask::Absolute { rows } => rows.iter().map(Vec::len).sum::<usize>(),
                _ => 0,
            });
            let all = Mask::new(ROWS, vec![HeadMask::Dense])
                .expect("in order")
                .work(0, 0, self.tokens);
            let density = tiles.sum::<usize>() as f64 / (all * self.layer.q_heads) as f64;
            Some((density * 1e4).round() / 1e4)
        };
        let tiles = planner.build(gpu, 0, query, &rows, &view, scale)?;
        let prefill = Prefill {
            rows: self.tokens,
            q_heads: self.layer.q_heads,
            scale: self.layer.scale(),
            products: Products::best(gpu),
        };
        let (out, lse) = (&mut self.out, &mut self.lse);
        let ms = median(gpu, 0, || prefill.attend(gpu, query, &view, tiles, out, lse))?;
        Ok((ms, density))
    }

    fn planner(&self, gpu: &Gpu, plan: HeadPlan) -> Result<(Planner, SparseRows), GpuError> {
        let layers = [vec![plan; self.layer.q_heads]];
        let rows = SparseRows {
            rows: self.tokens,
            sparse: 0..self.tokens,
            part_rows: self.tokens,
        };
        Ok((Planner::new(gpu, self.layer.shape(), self.tokens, &layers)?, rows))
    }
}

/// Planners whose lists are of key blocks by row block, and how much sharper than the model's scale their scores are: noise spreads
/// its mass over everything, and those that choose by share of the mass would choose everything; so sharpened it lies in a
/// tenth of the tiles, about. Means and antidiagonals level it out, so theirs is larger.
fn sharp() -> [(&'static str, HeadPlan, f32); 4] {
    let antidiagonals = |stride| HeadPlan::XAttention(XAttention { stride, threshold: 0.9 });
    let flex = FlexPrefill {
        gamma: 0.9,
        tau: 0.1,
        budget_min: 1024,
    };
    [
        ("block_sparse_100", HeadPlan::BlockSparse(BlockSparse::new(100)), 1.0),
        ("flex_prefill_0.9_0.1", HeadPlan::FlexPrefill(flex), 20.0),
        ("x_attention_8_0.9", antidiagonals(8), 52.0),
        ("x_attention_16_0.9", antidiagonals(16), 55.0),
    ]
}

/// Milliseconds of planning, and of attending so; the share of dense attention's tiles.
fn planned(
    gpu: &Gpu,
    inputs: &mut Inputs,
    entry: &mut Map<String, Value>,
    wanted: impl Fn(&str) -> bool,
) -> Result<(), GpuError> {
    let (name, plan) = ("vertical_slash_1000_6096_plan_ms", VerticalSlash::new(1000, 6096));
    if wanted(name) {
        let planned = inputs.plan(gpu, HeadPlan::VerticalSlash(plan), 1.0)?;
        entry.insert(name.into(), planned.into());
    }
    for (name, plan, sharpened) in sharp().into_iter().filter(|(name, ..)| wanted(name)) {
        let planned = inputs.plan(gpu, plan.clone(), sharpened)?;
        let (attended, density) = inputs.attend_planned(gpu, plan, sharpened)?;
        let figures = json!({ "plan_ms": planned, "ms": attended, "of_dense_tiles": density });
        entry.insert(name.into(), figures);
    }
    Ok(())
}

/// 1,000 columns at random; 6,096 diagonals: side by side, or as 95 runs of 64.
fn vertical_slash(rng: &mut StdRng, tokens: usize) -> [HeadMask; 2] {
    let columns: Vec<u32> = (0..1000).map(|_| rng.random_range(0..tokens as u32)).collect();
    let near: Vec<u32> = (0..6096).collect();
    let mut start = |run| {
        if run == 0 {
            0
        } else {
            rng.random_range(0..tokens as u32)
        }
    };
    let runs: Vec<u32> = (0..95).map(&mut start).flat_map(|start| start..start + 64).collect();
    [
        HeadMask::vertical_slash(ROWS, &columns, &near),
        HeadMask::vertical_slash(ROWS, &columns, &runs),
    ]
}

/// All figures, or those whose name contains `only`.
pub(crate) fn run(gpu: &Gpu, rng: &mut StdRng, only: Option<&str>) -> Result<Value, GpuError> {
    let wanted = |name: &str| only.is_none_or(|only| name.contains(only));
    let mut figures = Map::new();
    for tokens in [4096usize, 8192, 16 * 1024, 32 * 1024, 128 * 1024] {
        let mut inputs = Inputs::new(gpu, rng, LLAMA, tokens)?;
        let mut pool = gpu.zeros(2 * tokens * LLAMA.kv_heads * LLAMA.head_dim)?;
        noise(gpu, LLAMA.dtype, &mut pool, rng.random(), 1.0)?;
        let mut pages: Vec<u32> = (0..(tokens / PAGE_TOKENS) as u32).collect();
        pages.shuffle(rng);
        let table = PageTable::upload(gpu, &pages)?;
        let [near, runs] = vertical_slash(rng, tokens);
        let dense = HeadMask::Dense;
        let mut entry = Map::new();
        for &products in products(gpu) {
            let a_shape = HeadMask::a_shape(ROWS, 1024, 4096);
            let cases = [
                ("dense", None, &dense),
                ("dense_in_pages_of_64", Some((&pool, &table)), &dense),
                ("a_shape_1024_4096", None, &a_shape),
                ("vertical_slash_1000_6096_near", None, &near),
                ("vertical_slash_1000_6096_in_95_runs", None, &runs),
            ];
            for (name, pages, head) in cases {
                let name = format!("{name}_{products:?}").to_lowercase();
                if !wanted(&name) {
                    continue;
                }
                entry.insert(name, inputs.attend(gpu, pages, head, products)?);
            }
        }
        planned(gpu, &mut inputs, &mut entry, wanted)?;
        figures.insert(tokens.to_string(), entry.into());
    }
    let mut others = Map::new();
    for layer in OTHERS.into_iter().filter(|layer| wanted(&layer.text())) {
        let mut entry = Map::new();
        for tokens in [8192usize, 32 * 1024, 128 * 1024] {
            let mut inputs = Inputs::new(gpu, rng, layer, tokens)?;
            let dense = HeadMask::Dense;
            entry.insert(
                tokens.to_string(),
                inputs.attend(gpu, None, &dense, Products::best(gpu))?,
            );
        }
        others.insert(layer.text(), entry.into());
    }
    Ok(json!({
        "gpu": gpu.name(),
        "shape": format!("{}, batch 1", LLAMA.text()),
        "by_tokens": figures,
        "dense_by_shape_and_tokens": others,
    }))
}

/// A million tokens: dense once, Vertical-Slash with its index.
pub(crate) fn long(gpu: &Gpu, rng: &mut StdRng) -> Result<Value, GpuError> {
    let tokens = 1 << 20;
    let mut inputs = Inputs::new(gpu, rng, LLAMA, tokens)?;
    let [near, runs] = vertical_slash(rng, tokens);
    let best = Products::best(gpu);
    // The kernels are loaded, and the clocks are up.
    inputs.attend(gpu, None, &near, best)?;
    let near = inputs.attend(gpu, None, &near, best)?;
    let runs = inputs.attend(gpu, None, &runs, best)?;
    let mut planners = Map::new();
    planned(gpu, &mut inputs, &mut planners, |_| true)?;
    let dense = inputs.attend(gpu, None, &HeadMask::Dense, best)?;
    Ok(json!({
        "gpu": gpu.name(),
        "shape": format!("{}, batch 1", LLAMA.text()),
        "tokens": tokens,
        "dense": dense,
        "vertical_slash_1000_6096_near": near,
        "vertical_slash_1000_6096_in_95_runs": runs,
        "planners": planners,
    }))
}

/// Milliseconds: of prompts that take seconds one run.
fn median(gpu: &Gpu, tokens: usize, mut work: impl FnMut() -> Result<(), GpuError>) -> Result<f64, GpuError> {
    let (warm, counted) = if tokens > LONG { (0, 1) } else { (1, REPEATS) };
    let mut times = Vec::new();
    for i in 0..warm + counted {
        let watch = gpu.stopwatch()?;
        work()?;
        let time = watch.stop()?;
        if i >= warm {
            times.push(time);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2] * 1e-3 * 1e4).round() / 1e4)
}
