//! The offline search: which pattern a head is given, at the same cost for all that are tried.
//!
//! MInference (arXiv 2407.02490, algorithm 1) makes every candidate cost in its kernel what one A-shape costs, and takes the one
//! whose attention output is nearest to full attention's. Cost is counted in tiles, of the height that the kernel has, over the
//! masks that the planners make of this head's queries and keys; so a diagonal alone is dear and diagonals side by side are
//! cheap. Its released code does otherwise: fixed candidates, and the most softmax mass kept. Both are here.

use half::f16;

use crate::{HeadChunk, HeadMask, Pattern, Quality, TILE, chunk::BadChunk, estimate, judge, mask::work, plan::Sums};

/// Everything of one head over a text.
#[derive(Clone, Copy, Debug)]
pub struct HeadText<'a> {
    /// Rotated queries, `[tokens, head_dim]`.
    pub q: &'a [f32],
    /// Rotated keys, likewise.
    pub keys: &'a [f16],
    /// Values, likewise.
    pub values: &'a [f16],
    /// Elements of a row.
    pub head_dim: usize,
    /// What scores are multiplied by before the softmax.
    pub scale: f32,
}

/// What a candidate is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Criterion {
    /// Least difference of the attention output, as in the paper.
    OutputError,
    /// Most softmax mass kept, as in the released code.
    KeptMass,
}

/// Which candidates there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// A-shape, four Vertical-Slash and one Block-Sparse, all brought to the cost of the A-shape.
    Paper,
    /// As [`Space::Paper`], with FlexPrefill and XAttention, whose shares of the mass are chosen so that they cost as much on
    /// this text.
    Wide,
    /// The released code's candidates as they are, whatever they cost; the winner is written as Vertical-Slash, as there.
    Released,
}

/// How a search is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Height of a tile for which cost is counted: 64 on the CPU, 128 in the GPU's kernel.
    pub rows: usize,
    /// Queries that are planned for together: what the worker's blocks have.
    pub chunk_tokens: usize,
    /// Queries below this position are not judged, since they attend densely.
    pub from: usize,
    /// `initial` and `local` of the A-shape that sets the cost.
    pub budget: (u32, u32),
    /// What is judged by.
    pub criterion: Criterion,
    /// What is tried.
    pub space: Space,
    /// Each so-manieth query is looked at.
    pub every: usize,
}

/// What was found for a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The best.
    pub pattern: Pattern,
    /// How it did.
    pub quality: Quality,
    /// All that were tried.
    pub tried: Vec<(Pattern, Quality)>,
}

/// Why nothing was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SearchError {
    /// The slices do not fit each other.
    #[error(transparent)]
    Chunk(#[from] BadChunk),
    /// There is nothing to judge by, or an option is 0.
    #[error("{0}")]
    Options(String),
}

/// MInference's budget and the candidates that come of it (its table 7), as `(columns, diagonals)`.
const PAPER_BUDGET: (u32, u32) = (1024, 4096);
const PAPER_VERTICAL_SLASH: [(u32, u32); 4] = [(30, 2048), (100, 1800), (500, 1500), (3000, 200)];
/// What its search changes a candidate by.
const PAPER_STEP: u32 = 50;

/// The released code's (`search_pattern`).
const RELEASED_VERTICAL_SLASH: [(u32, u32); 4] = [(30, 800), (100, 750), (500, 700), (3500, 100)];
const RELEASED_A_SHAPE: (u32, u32) = (100, 800);
/// It judges queries from here on.
const RELEASED_FROM: usize = 2500;

/// The best pattern of a head.
///
/// # Errors
/// If the text and the options do not fit each other.
pub fn search(text: &HeadText<'_>, options: &Options) -> Result<Found, SearchError> {
    let sections = Sections::new(text, options)?;
    let candidates = match options.space {
        Space::Released => released(sections.tokens),
        Space::Paper | Space::Wide => sections.equal_cost(options),
    };
    let tried = sections.judge(text, &candidates, options.every);
    let better = |a: &Quality, b: &Quality| match options.criterion {
        Criterion::OutputError => a.output_error < b.output_error,
        Criterion::KeptMass => a.mass > b.mass,
    };
    let mut best = tried[0];
    for &candidate in &tried[1..] {
        if better(&candidate.1, &best.1) {
            best = candidate;
        }
    }
    let (mut pattern, quality) = best;
    if options.space == Space::Released {
        pattern = match pattern {
            Pattern::AShape { initial, local } => Pattern::vertical_slash(initial, local),
            Pattern::BlockSparse { .. } => Pattern::vertical_slash(1000, 6096),
            other => other,
        };
    }
    Ok(Found {
        pattern,
        quality,
        tried,
    })
}

/// How `patterns` do on a head, each as it is.
///
/// # Errors
/// If the text and the options do not fit each other.
pub fn compare(
    text: &HeadText<'_>,
    patterns: &[Pattern],
    options: &Options,
) -> Result<Vec<(Pattern, Quality)>, SearchError> {
    Ok(Sections::new(text, options)?.judge(text, patterns, options.every))
}

/// The default budget for a text of `tokens`: the paper's, which it used for 30K tokens and more, scaled down for less.
pub fn default_budget(tokens: usize) -> (u32, u32) {
    let scaled = |count: u32| {
        let tokens = tokens.min(32 * 1024) as u64;
        let scaled = u64::from(count) * tokens / (32 * 1024);
        scaled.next_multiple_of(TILE as u64) as u32
    };
    (
        scaled(PAPER_BUDGET.0).max(TILE as u32),
        scaled(PAPER_BUDGET.1).max(TILE as u32),
    )
}

fn released(tokens: usize) -> Vec<Pattern> {
    let (initial, local) = RELEASED_A_SHAPE;
    let mut all = vec![Pattern::AShape { initial, local }];
    all.extend(RELEASED_VERTICAL_SLASH.map(|(v, s)| Pattern::vertical_slash(v, s)));
    // An eighth of the blocks.
    let blocks = (tokens / TILE / 8).max(1) as u32;
    all.push(Pattern::BlockSparse { blocks });
    all
}

/// The runs of queries that are planned for one by one.
struct Sections<'a> {
    chunks: Vec<HeadChunk<'a>>,
    /// The Vertical-Slash estimates, which all such candidates share.
    sums: Vec<Sums>,
    rows: usize,
    tokens: usize,
    /// Position of the first query that is judged.
    from: usize,
}

impl<'a> Sections<'a> {
    fn new(text: &HeadText<'a>, options: &Options) -> Result<Self, SearchError> {
        let d = text.head_dim;
        HeadChunk::new(text.q, text.keys, d, text.scale)?;
        let tokens = text.q.len() / d.max(1);
        let wrong = |what: String| Err(SearchError::Options(what));
        if text.keys.len() != text.q.len() || text.values.len() != text.q.len() {
            return wrong("a head's queries, keys and values must be of the same positions".to_owned());
        }
        if options.rows == 0 || options.chunk_tokens == 0 || options.every == 0 {
            return wrong(
                "rows of a tile, tokens of a chunk and the step between queries must be at least 1".to_owned(),
            );
        }
        let from = match options.space {
            Space::Released => options.from.max(RELEASED_FROM),
            Space::Paper | Space::Wide => options.from,
        };
        let mut chunks = Vec::new();
        for start in (0..tokens).step_by(options.chunk_tokens) {
            let end = (start + options.chunk_tokens).min(tokens);
            // A chunk that begins below is dense, unless all is one chunk, as in MInference.
            if end > from && (start >= from || options.chunk_tokens >= tokens) {
                chunks.push(HeadChunk::new(
                    &text.q[start * d..end * d],
                    &text.keys[..end * d],
                    d,
                    text.scale,
                )?);
            }
        }
        if chunks.is_empty() {
            return wrong(format!(
                "of {tokens} tokens none lie in a chunk of {} that begins at or behind {from}: give a longer text, or chunks that \
                 are shorter",
                options.chunk_tokens
            ));
        }
        let sums = chunks.iter().map(|chunk| {
            let mut sums = estimate(chunk, 64);
            sums.favour(30, 100);
            sums
        });
        Ok(Self {
            sums: sums.collect(),
            chunks,
            rows: options.rows,
            tokens,
            from,
        })
    }

    /// Masks of all sections.
    fn masks(&self, pattern: &Pattern) -> Vec<HeadMask> {
        let sections = self.chunks.iter().zip(&self.sums);
        let masks = sections.map(|(chunk, sums)| match *pattern {
            // What was estimated once for all of them, where the forced ones are the usual ones.
            Pattern::VerticalSlash {
                verticals,
                slashes,
                sink: 30,
                near: 100,
            } => sums.mask(self.rows, verticals.max(30) as usize, slashes.max(100) as usize),
            _ => pattern.plan(chunk, self.rows),
        });
        masks.collect()
    }

    fn work(&self, pattern: &Pattern) -> usize {
        let masks = self.masks(pattern);
        let sections = masks.iter().zip(&self.chunks);
        sections
            .map(|(mask, chunk)| work(mask, self.rows, chunk.offset(), chunk.rows()))
            .sum()
    }

    fn judge(&self, text: &HeadText<'_>, patterns: &[Pattern], every: usize) -> Vec<(Pattern, Quality)> {
        let masks: Vec<Vec<HeadMask>> = patterns.iter().map(|pattern| self.masks(pattern)).collect();
        let mut qualities = vec![Quality::default(); patterns.len()];
        for (section, chunk) in self.chunks.iter().enumerate() {
            let masks: Vec<HeadMask> = masks.iter().map(|masks| masks[section].clone()).collect();
            let values = &text.values[..chunk.tokens() * text.head_dim];
            let judged = judge(chunk, values, &masks, self.rows, every, self.from);
            for (quality, judged) in qualities.iter_mut().zip(judged) {
                *quality = quality.join(judged);
            }
        }
        patterns.iter().copied().zip(qualities).collect()
    }

    /// The A-shape and everything else at its cost.
    fn equal_cost(&self, options: &Options) -> Vec<Pattern> {
        let (initial, local) = options.budget;
        let a_shape = Pattern::AShape { initial, local };
        let target = self.work(&a_shape);
        let mut all = vec![a_shape];
        // Initial candidates and the step by which they change are the paper's, scaled to this budget.
        let scale = f64::from(initial + local) / f64::from(PAPER_BUDGET.0 + PAPER_BUDGET.1);
        let scaled = |count: u32| (f64::from(count) * scale).round().max(1.0) as u32;
        let step = scaled(PAPER_STEP);
        let tokens = self.tokens as u32;
        for (verticals, _) in PAPER_VERTICAL_SLASH {
            // Columns alone may cost too much already: then there are fewer of them.
            let fewer = |steps: u32| scaled(verticals).saturating_sub(step.saturating_mul(steps));
            let down = first_within(0, scaled(verticals).div_ceil(step), |steps| {
                self.work(&Pattern::vertical_slash(fewer(steps), 50)) <= target
            });
            let verticals = fewer(down);
            all.push(self.most(0, tokens / step + 1, target, |steps| {
                Pattern::vertical_slash(verticals, 50 + step * steps)
            }));
        }
        all.push(
            self.most(1, tokens.div_ceil(TILE as u32), target, |blocks| Pattern::BlockSparse {
                blocks,
            }),
        );
        if options.space == Space::Wide {
            for tau in [0.0, 0.1] {
                all.push(self.most(1, 100, target, |percent| Pattern::FlexPrefill {
                    gamma: percent as f32 / 100.0,
                    tau,
                    budget_min: 0,
                }));
            }
            for stride in [8, 16] {
                all.push(self.most(1, 100, target, |percent| Pattern::XAttention {
                    stride,
                    threshold: percent as f32 / 100.0,
                }));
            }
        }
        all
    }

    /// Of a family whose cost rises with its parameter, the last that costs no more than `target`; the first where all do.
    fn most(&self, first: u32, last: u32, target: usize, family: impl Fn(u32) -> Pattern) -> Pattern {
        let (mut low, mut high) = (first, last);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if self.work(&family(middle)) <= target {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        family(low)
    }
}

/// The least number in `first..=last` that fits, where all above one that fits do; `last` if none does.
fn first_within(first: u32, last: u32, fits: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (first, last);
    while low < high {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

#[cfg(test)]
mod tests;
