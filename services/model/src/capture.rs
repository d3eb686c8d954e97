//! Queries, keys and values of a whole text, layer by layer: what calibration and index measurements are made of.

use std::ops::Range;

use half::f16;

use crate::{
    Attention, Logits, Model, PageId, PagePool, PoolError, StepAborted, StepError, StepHooks, StepSequence,
    pool::page_ids,
};

/// Tokens of a step, unless told otherwise: few enough that scratch stays in the cache, enough to keep threads busy.
const STEP_TOKENS: usize = 256;

/// How a text is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureOptions {
    /// Tokens per step, at least 1.
    pub step_tokens: usize,
    /// Whether forecasts of the queries are wanted, see [`StepHooks::predicted`].
    pub predicted: bool,
    /// Whether logits of all tokens are wanted; a quarter more work for SmolLM2-135M.
    pub logits: bool,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        Self {
            step_tokens: STEP_TOKENS,
            predicted: false,
            logits: false,
        }
    }
}

/// Why a capture ended early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    /// Keys and values of the text do not fit in memory.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A step failed, or the sink gave up.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Who takes what is captured. Called on the stepping thread.
pub trait CaptureSink {
    /// A layer of a step is done.
    ///
    /// # Errors
    /// [`StepAborted`] ends the capture.
    fn layer(&mut self, layer: &CapturedLayer<'_>) -> Result<(), StepAborted>;

    /// All layers of a step are done: `tokens` of the text, and the logits of each where they were asked for.
    ///
    /// # Errors
    /// [`StepAborted`] ends the capture.
    fn step(&mut self, _tokens: Range<usize>, _logits: &[f32]) -> Result<(), StepAborted> {
        Ok(())
    }
}

/// A layer of a step, as a sink sees it.
pub struct CapturedLayer<'a> {
    /// Which layer.
    pub layer: usize,
    /// Positions of the step's tokens.
    pub tokens: Range<usize>,
    /// Their rotated queries, `[tokens, q_heads, head_dim]`.
    pub q: &'a [f32],
    /// What was forecast of them a layer earlier, in the same shape; `None` in layer 0 and where it was not asked for.
    pub predicted: Option<&'a [f32]>,
    pool: &'a PagePool,
    pages: &'a [Option<PageId>],
}

impl CapturedLayer<'_> {
    /// Rotated keys of one KV head at `positions`, `[n, head_dim]`, appended to `out`. Positions end with the step's.
    ///
    /// # Panics
    /// If there is no such head or position.
    pub fn keys(&self, kv_head: usize, positions: Range<usize>, out: &mut Vec<f16>) {
        let keys = self.pool.layout().keys(kv_head);
        self.gather(keys, positions, out);
    }

    /// Values, likewise.
    ///
    /// # Panics
    /// If there is no such head or position.
    pub fn values(&self, kv_head: usize, positions: Range<usize>, out: &mut Vec<f16>) {
        let values = self.pool.layout().values(kv_head);
        self.gather(values, positions, out);
    }

    fn gather(&self, rows: Range<usize>, positions: Range<usize>, out: &mut Vec<f16>) {
        assert!(
            positions.end <= self.tokens.end,
            "captured: positions up to {}",
            self.tokens.end
        );
        let layout = self.pool.layout();
        let (block_tokens, head_dim) = (layout.block_tokens, layout.head_dim);
        let mut at = positions.start;
        while at < positions.end {
            let block = at / block_tokens;
            let end = ((block + 1) * block_tokens).min(positions.end);
            let Some(Some(page)) = self.pages.get(block) else {
                unreachable!("every block up to the step's end has a page");
            };
            let page = &self.pool.page(self.layer, *page)[rows.clone()];
            out.extend_from_slice(&page[at % block_tokens * head_dim..(end - block * block_tokens) * head_dim]);
            at = end;
        }
    }
}

/// Runs `tokens` from position 0 on through `model` with full attention, and hands every layer of every step to `sink`. Takes
/// memory for the keys and values of the whole text.
///
/// # Errors
/// [`CaptureError`] if the text is empty or longer than the model's context, does not fit in memory, or the sink gave up.
pub fn capture(
    model: &mut Model,
    tokens: &[u32],
    options: &CaptureOptions,
    sink: &mut dyn CaptureSink,
) -> Result<(), CaptureError> {
    let most = model.shape().context_tokens_max;
    if tokens.is_empty() || tokens.len() > most || options.step_tokens == 0 {
        return Err(CaptureError::Step(StepError::Invalid(format!(
            "a capture of {} tokens in steps of {}: give 1 to {most} tokens, and steps of at least 1",
            tokens.len(),
            options.step_tokens
        ))));
    }
    let layout = model.schema().layout();
    let blocks = tokens.len().div_ceil(layout.block_tokens);
    let mut pool = PagePool::new(layout, model.shape().layers, blocks)?;
    let pages = page_ids(blocks);
    let mut position = 0;
    for part in tokens.chunks(options.step_tokens) {
        let range = position..position + part.len();
        let sequence = StepSequence {
            tokens: part,
            position,
            pages: &pages,
            attention: Attention::Full,
            logits: if options.logits { Logits::All } else { Logits::None },
        };
        let mut hooks = Hooks {
            sink,
            tokens: range.clone(),
            pages: &pages,
            predicted: options.predicted,
            queries: Vec::new(),
            forecast: Forecast::default(),
            gave_up: None,
        };
        let output = model.step(&[sequence], &mut pool, &mut hooks)?;
        if let Some(aborted) = hooks.gave_up.take() {
            return Err(CaptureError::Step(aborted.into()));
        }
        let logits = output.rows.first().map(Vec::as_slice).unwrap_or_default();
        sink.step(range, logits).map_err(StepError::from)?;
        position += part.len();
    }
    Ok(())
}

/// Puts together what a layer's hooks see apart.
struct Hooks<'a> {
    sink: &'a mut dyn CaptureSink,
    tokens: Range<usize>,
    pages: &'a [Option<PageId>],
    predicted: bool,
    queries: Vec<f32>,
    forecast: Forecast,
    /// The end of a layer cannot end the step; the next hook does.
    gave_up: Option<StepAborted>,
}

/// Forecasts come one layer ahead: that of the layer at work, and that of the next.
#[derive(Default)]
struct Forecast {
    now: Vec<f32>,
    next: Vec<f32>,
}

impl StepHooks for Hooks<'_> {
    fn before_layer(&mut self, _: usize, _: &mut PagePool) -> Result<(), StepAborted> {
        std::mem::swap(&mut self.forecast.now, &mut self.forecast.next);
        self.forecast.next.clear();
        self.gave_up.take().map_or(Ok(()), Err)
    }

    fn wants_queries(&self, _: usize) -> bool {
        true
    }

    fn queries(&mut self, _: usize, _: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.queries.clear();
        self.queries.extend_from_slice(q);
        Ok(())
    }

    fn wants_predicted(&self, _: usize) -> bool {
        self.predicted
    }

    fn predicted(&mut self, _: usize, _: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.forecast.next.extend_from_slice(q);
        Ok(())
    }

    fn after_layer(&mut self, layer: usize, pool: &PagePool) {
        let captured = CapturedLayer {
            layer,
            tokens: self.tokens.clone(),
            q: &self.queries,
            predicted: (!self.forecast.now.is_empty()).then_some(&self.forecast.now[..]),
            pool,
            pages: self.pages,
        };
        self.gave_up = self.sink.layer(&captured).err();
    }
}
