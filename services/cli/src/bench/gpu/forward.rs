//! The forward alone: no worker, no store.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use kvasir_block::{BlockHash, KvSchema};
use kvasir_model::{
    Attention, Device, Draw, LoadError, Logits, Model, ModelFile, ModelShape, PageId, PagePool, Sampler, Sampling,
    SparsePrefill, StepHooks, StepSequence, TileRows,
};
use kvasir_sparse::HeadPatterns;
use kvasir_worker::Pusher;

pub(super) struct Forward {
    model: Model,
    pool: PagePool,
    block_tokens: usize,
    /// Pages of each sequence.
    pages: Vec<Vec<Option<PageId>>>,
    /// What prompts attend to.
    attention: Attention,
}

/// Where the next token is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drawn {
    /// Where the model computes: only the token comes back.
    There,
    /// On the host, which gets all logits.
    Here,
}

/// What becomes of the whole blocks of a prompt.
#[derive(Clone, Copy, Debug)]
pub(super) enum Blocks<'a> {
    /// They stay on the device.
    Stay,
    /// All of them are sent to the host, layer by layer, and let go there.
    Land,
    /// They are pushed under these names through a worker's queue, which drops what it has no room for.
    Push(&'a Pusher, &'a [BlockHash]),
}

/// What a prompt cost beside its computing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Waits {
    /// For page-locked memory, of all steps.
    pub(super) room: Duration,
    /// Blocks that the queue had no room for.
    pub(super) dropped: usize,
}

/// Takes the pages it wants and lets them go.
struct Land {
    wanted: Vec<PageId>,
    bytes: usize,
    waited: Duration,
}

impl StepHooks for Land {
    fn wanted_pages(&self) -> &[PageId] {
        &self.wanted
    }

    fn waited_for_room(&mut self, time: Duration) {
        self.waited += time;
    }

    fn after_layer(&mut self, layer: usize, pool: &PagePool) {
        for page in &self.wanted {
            self.bytes += pool.page_bytes(layer, *page).map_or(0, |bytes| bytes.len());
        }
    }
}

impl Forward {
    /// Room for `sequences` of `tokens` each.
    pub(super) fn load(
        file: &ModelFile,
        device: &Device,
        block_tokens: u16,
        tokens: usize,
        sequences: usize,
    ) -> Result<Self> {
        Self::new(Model::load_on(file, device, block_tokens)?, tokens, sequences)
    }

    /// The same of a model that is there.
    pub(super) fn new(model: Model, tokens: usize, sequences: usize) -> Result<Self> {
        let block_tokens = usize::from(model.schema().block_tokens);
        let blocks = (tokens + block_tokens) / block_tokens + 1;
        let pool = model.pool(blocks * sequences)?;
        let pages = (0..sequences).map(|sequence| {
            let first = sequence * blocks;
            (first..first + blocks).map(|page| Some(PageId(page as u32))).collect()
        });
        Ok(Self {
            pages: pages.collect(),
            model,
            pool,
            block_tokens,
            attention: Attention::Full,
        })
    }

    /// Attends to prompts by `patterns` from now on, planned for in row blocks of `rows`.
    pub(super) fn sparse(self, patterns: HeadPatterns, rows: TileRows) -> Result<Self, LoadError> {
        let sparse = SparsePrefill::new(patterns, self.model.shape(), self.model.schema(), rows)?;
        Ok(Self {
            model: self.model.with_sparse_prefill(sparse)?,
            attention: Attention::Sparse,
            ..self
        })
    }

    pub(super) fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    pub(super) fn schema(&self) -> &KvSchema {
        self.model.schema()
    }

    pub(super) fn shape(&self) -> &ModelShape {
        self.model.shape()
    }

    pub(super) fn softmax_scale(&self) -> f32 {
        self.model.softmax_scale()
    }

    /// Bytes of a block of the first sequence in one layer.
    pub(super) fn block(&self, layer: usize, block: usize) -> Result<Bytes> {
        let page = self.pages[0]
            .get(block)
            .copied()
            .flatten()
            .context("there is no such block")?;
        Ok(self.pool.page_bytes(layer, page)?)
    }

    /// Keeps of the first sequence's `blocks` blocks those that `kept` names, and behind them room for `room` more; everything else
    /// goes, so that what remains is what a worker holds whose context lies elsewhere.
    pub(super) fn keep(&mut self, blocks: usize, kept: impl Fn(usize) -> bool, room: usize) -> Result<()> {
        let names: Vec<usize> = (0..blocks).filter(|block| kept(*block)).collect();
        let mut pool = self.model.pool(names.len() + room)?;
        for layer in 0..self.model.shape().layers {
            for (to, &block) in names.iter().enumerate() {
                pool.fill(layer, PageId(to as u32), &self.block(layer, block)?)?;
            }
        }
        let mut pages = vec![None; blocks];
        for (to, &block) in names.iter().enumerate() {
            pages[block] = Some(PageId(to as u32));
        }
        pages.extend((names.len()..names.len() + room).map(|page| Some(PageId(page as u32))));
        self.pages = vec![pages];
        self.pool = pool;
        Ok(())
    }

    /// Logits of one more token of the first sequence, which attends to `local` and what `hooks` bring.
    pub(super) fn next_local(
        &mut self,
        token: u32,
        position: usize,
        local: Vec<Range<usize>>,
        hooks: &mut dyn StepHooks,
    ) -> Result<Vec<f32>> {
        let sequence = StepSequence {
            tokens: &[token],
            position,
            pages: &self.pages[0],
            attention: Attention::Local(local),
            logits: Logits::Last,
        };
        let output = self.model.step(&[sequence], &mut self.pool, hooks)?;
        output.rows.into_iter().next().context("no logits came")
    }

    /// Bytes of the pool.
    pub(super) fn pool_bytes(&self) -> usize {
        self.pool.bytes()
    }

    /// Seconds of each step of a prefill as the first sequence, from position `from` on; no logits.
    pub(super) fn steps(&mut self, tokens: &[u32], from: usize, step: usize) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        for (nth, some) in tokens[from..].chunks(step).enumerate() {
            let sequence = StepSequence {
                tokens: some,
                position: from + nth * step,
                pages: &self.pages[0],
                attention: self.attention.clone(),
                logits: Logits::None,
            };
            let begun = Instant::now();
            self.model.step(&[sequence], &mut self.pool, &mut ())?;
            times.push(begun.elapsed().as_secs_f64());
        }
        Ok(times)
    }

    /// Runs a prompt as sequence `index`, and returns the last token's logits.
    pub(super) fn prompt(&mut self, index: usize, tokens: &[u32], step: usize) -> Result<Vec<f32>> {
        self.prompt_with(index, tokens, step, Blocks::Stay)
            .map(|(logits, _)| logits)
    }

    /// The same, with something done with its whole blocks.
    pub(super) fn prompt_with(
        &mut self,
        index: usize,
        tokens: &[u32],
        step: usize,
        blocks: Blocks<'_>,
    ) -> Result<(Vec<f32>, Waits)> {
        let (mut logits, mut waits) = (Vec::new(), Waits::default());
        let steps = tokens.len().div_ceil(step);
        for (nth, some) in tokens.chunks(step).enumerate() {
            let position = nth * step;
            let last = nth + 1 == steps;
            let sequence = StepSequence {
                tokens: some,
                position,
                pages: &self.pages[index],
                attention: self.attention.clone(),
                logits: if last { Logits::Last } else { Logits::None },
            };
            let whole = position / self.block_tokens..(position + some.len()) / self.block_tokens;
            let pages = self.pages[index][whole.clone()].iter().copied().flatten();
            let (model, pool) = (&mut self.model, &mut self.pool);
            let output = match blocks {
                Blocks::Stay => model.step(&[sequence], pool, &mut ())?,
                Blocks::Land => {
                    let mut hooks = Land {
                        wanted: pages.collect(),
                        bytes: 0,
                        waited: Duration::ZERO,
                    };
                    let output = model.step(&[sequence], pool, &mut hooks)?;
                    let wanted_bytes = hooks.wanted.len() * model.schema().block_bytes();
                    ensure!(hooks.bytes == wanted_bytes, "not every page came to the host");
                    waits.room += hooks.waited;
                    output
                }
                Blocks::Push(pusher, chain) => {
                    let mut hooks = pusher.step(chain[whole].iter().copied().zip(pages));
                    let output = model.step(&[sequence], pool, &mut hooks)?;
                    waits.room += hooks.waited();
                    waits.dropped += hooks.dropped();
                    output
                }
            };
            logits = output.rows.into_iter().next().unwrap_or_default();
        }
        Ok((logits, waits))
    }

    /// The token behind one more of the first sequence, drawn where the model computes.
    pub(super) fn next_token(&mut self, token: u32, position: usize) -> Result<u32> {
        let sequence = StepSequence {
            tokens: &[token],
            position,
            pages: &self.pages[0],
            attention: Attention::Full,
            logits: Logits::Drawn(Draw::GREEDY),
        };
        let output = self.model.step(&[sequence], &mut self.pool, &mut ())?;
        output.drawn.into_iter().next().flatten().context("no token came")
    }

    /// Logits of one more token of the first sequence.
    pub(super) fn next(&mut self, token: u32, position: usize) -> Result<Vec<f32>> {
        let sequence = StepSequence {
            tokens: &[token],
            position,
            pages: &self.pages[0],
            attention: Attention::Full,
            logits: Logits::Last,
        };
        let output = self.model.step(&[sequence], &mut self.pool, &mut ())?;
        output.rows.into_iter().next().context("no logits came")
    }

    /// Seconds to decode `count` tokens of each of `sequences` behind `prompt`, drawn as `drawn` says; the prefill is not in them.
    pub(super) fn decode(&mut self, prompt: &[u32], sequences: usize, count: usize, drawn: Drawn) -> Result<f64> {
        let mut sampler = Sampler::new(Sampling::greedy());
        let mut next = Vec::new();
        for sequence in 0..sequences {
            let logits = self.prompt(sequence, prompt, super::STEP_TOKENS)?;
            next.push(sampler.sample(&logits));
        }
        let begun = Instant::now();
        for step in 0..count {
            let batch: Vec<StepSequence<'_>> = (0..sequences)
                .map(|sequence| StepSequence {
                    tokens: std::slice::from_ref(&next[sequence]),
                    position: prompt.len() + step,
                    pages: &self.pages[sequence],
                    attention: Attention::Full,
                    logits: match drawn {
                        Drawn::There => Logits::Drawn(Draw::GREEDY),
                        Drawn::Here => Logits::Last,
                    },
                })
                .collect();
            let output = self.model.step(&batch, &mut self.pool, &mut ())?;
            let tokens = output.rows.iter().zip(output.drawn);
            next = tokens
                .map(|(logits, drawn)| drawn.unwrap_or_else(|| sampler.sample(logits)))
                .collect();
        }
        Ok(begun.elapsed().as_secs_f64())
    }
}
