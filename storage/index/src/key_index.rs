//! What every index over the keys of one KV head can do.

use half::f16;

use crate::Excluded;

/// Rows of `head_dim` elements that lie in equal blocks: where keys and values of one KV head are read in place.
#[derive(Clone, Copy, Debug)]
pub struct KeyRows<'a> {
    blocks: &'a [&'a [f16]],
    block_rows: usize,
    head_dim: usize,
}

impl<'a> KeyRows<'a> {
    /// Rows of `head_dim` elements in `blocks` of `block_rows` rows each; the last block may be shorter.
    ///
    /// # Panics
    /// If a block is not whole rows, or one before the last is not `block_rows` of them.
    pub fn new(blocks: &'a [&'a [f16]], block_rows: usize, head_dim: usize) -> Self {
        assert!(
            block_rows > 0 && head_dim > 0,
            "rows: block_rows and head_dim are at least 1"
        );
        let (last, whole) = blocks
            .split_last()
            .map_or((0, &[][..]), |(last, whole)| (last.len(), whole));
        assert!(
            last.is_multiple_of(head_dim) && last <= block_rows * head_dim,
            "rows: the last block is at most {block_rows} rows of {head_dim}"
        );
        assert!(
            whole.iter().all(|block| block.len() == block_rows * head_dim),
            "rows: each block but the last is {block_rows} rows of {head_dim}"
        );
        Self {
            blocks,
            block_rows,
            head_dim,
        }
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        let last = self.blocks.last().map_or(0, |last| last.len() / self.head_dim);
        self.blocks.len().saturating_sub(1) * self.block_rows + last
    }

    /// No rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements per row.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Row `at`, counted from 0.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, at: usize) -> &'a [f16] {
        &self.blocks[at / self.block_rows][at % self.block_rows * self.head_dim..][..self.head_dim]
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &'a [&'a [f16]] {
        self.blocks
    }
}

/// A question to an index: the query rows of one KV head's group.
#[derive(Clone, Copy, Debug)]
pub struct Search<'a> {
    /// Rotated queries, `[heads, head_dim]`, finite.
    pub q: &'a [f32],
    /// Multiplied into `q . k`, usually `1/sqrt(head_dim)`; scores are base 2, so `log2(e)` is multiplied in too.
    pub scale: f32,
    /// The keys that were appended, for exact scores; row `i` has position `i`.
    pub keys: KeyRows<'a>,
    /// Keys wanted per query head.
    pub k: usize,
    /// Share of the keys that may be scored exactly, (0, 1]: the one knob that all indexes turn (beam width, lists probed,
    /// candidates re-scored).
    pub effort: f32,
    /// Share of each head's searched softmax mass, (0, 1], that is enough: an index that knows about what it has not read stops
    /// where the keys found hold it, by its own estimate, and says so in [`Hits::covered`]. Others go by effort alone.
    pub mass: f32,
    /// Positions that are not searched.
    pub excluded: &'a Excluded,
}

/// What a search found and what it cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hits {
    /// Per query head: position and exact base-2 score, best first, at most `k`; ties go to the lower position.
    pub heads: Vec<Vec<(u32, f32)>>,
    /// Per query head, the share of the searched mass that the keys scored hold, as the index estimates it; empty where it went by
    /// effort alone.
    pub covered: Vec<f32>,
    /// Work done.
    pub cost: Cost,
}

/// Work of a search, counted where it is done; summed over the query heads of the group, but rows that are read once for the
/// whole group count once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Keys whose exact score was computed.
    pub keys_scored: u64,
    /// Bytes of keys, codes, centroids and edges that were read.
    pub bytes_read: u64,
}

/// An index over the keys of one KV head, in the order of their positions. Derived data: it can be built again from the keys.
///
/// Implementations never return a position twice, an excluded one, or a score that is not finite; they return fewer than `k`
/// where there are fewer.
pub trait KeyIndex: Send + Sync {
    /// Name, as it is asked for and reported: `"flat"`, `"sketch"`, `"roar"`, ...
    fn name(&self) -> &'static str;

    /// Keys appended so far.
    fn keys(&self) -> usize;

    /// Bytes that the index holds beside keys and values.
    fn bytes(&self) -> usize;

    /// Adds `keys[n, head_dim]` behind those that are there. What cannot append says so.
    ///
    /// # Errors
    /// [`IndexError`] naming what is wrong with the keys, or that this kind is built once.
    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError>;

    /// Finds the best keys for a group of queries.
    ///
    /// # Errors
    /// [`IndexError`] naming the argument: shapes that do not fit, a query that is not finite, `k` of 0.
    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError>;

    /// Whether [`Hits::cost`] says what a search cost. Where it does not, the cost is 0 and means nothing.
    fn counts(&self) -> bool {
        true
    }

    /// Its file: versioned, checksummed, naming what it was built from.
    fn encode(&self) -> Vec<u8>;
}

/// Why an index cannot do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// An argument cannot be.
    #[error("{argument}: {problem}")]
    Invalid {
        /// Which.
        argument: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The bytes are not a file of this index: another kind, version, model or basis, or damaged.
    #[error("not usable as an index: {0}")]
    Unusable(String),
    /// This kind cannot do this.
    #[error("{index} {problem}")]
    Unsupported {
        /// Its name.
        index: &'static str,
        /// What it cannot do and what to do instead.
        problem: &'static str,
    },
}
