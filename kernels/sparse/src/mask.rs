//! Which keys each query of a prompt sees, per head: one definition for the CPU, the GPU's kernel and the search.
//!
//! Queries come in *row blocks* of so many rows, counted from the first query of the call at position `offset`. With `end`
//! the position after a block's last row (as if the block were full), a key at position `j` lies at distance `u = end - j`.
//! The whole mask is two lines: key `j` is seen by the query at position `p` if `j <= p`, and if `j` is in a tile of `p`'s
//! block or is one of the head's columns. A relative tile `t` holds the keys with `t < u <= t + TILE`, the same for every
//! block, so that a head's list costs memory in its number of tiles and not in the prompt's length; an absolute tile `t`
//! holds `t <= j < t + TILE`, for one block alone.
//!
//! `kernels/cuda` works through these masks as they are, in blocks of 128 rows; here their height is a parameter, because what a
//! mask costs depends on it.

use std::ops::Range;

/// Keys of a tile: its width.
pub const TILE: usize = 64;

/// Positions are below this, so that a tile's end fits a `u32` with room to spare.
pub(crate) const POSITIONS_MAX: u32 = 1 << 30;

/// What the queries of one head see; always causal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadMask {
    /// Every key.
    Dense,
    /// The same distances for every row block.
    Relative {
        /// Tiles in rising order, at least [`TILE`] apart.
        tiles: Vec<u32>,
        /// Positions seen at any distance, in rising order, each once.
        columns: Vec<u32>,
    },
    /// Tiles by row block.
    Absolute {
        /// For each row block its tiles in rising order, at least [`TILE`] apart.
        rows: Vec<Vec<u32>>,
    },
}

impl HeadMask {
    /// The first `initial` positions, and at least the `local` last ones before each query, for row blocks of `rows`.
    pub fn a_shape(rows: usize, initial: usize, local: usize) -> Self {
        Self::cover([(0, local + rows)], (0..initial as u32).collect())
    }

    /// The columns in `verticals` and the diagonals in `slashes` (distance of key from query; 0 is the query itself and is
    /// always seen), for row blocks of `rows`. A diagonal meets each row block in as many keys as the block has rows and one
    /// less again, so it covers `slash < u <= slash + rows`; what overlaps is joined, and tiles cover it from the near end
    /// on (anchors: MInference's merge of ranges, done once per head in place of once per row block).
    pub fn vertical_slash(rows: usize, verticals: &[u32], slashes: &[u32]) -> Self {
        let sorted = |numbers: &[u32], first: Option<u32>| {
            let mut numbers: Vec<u32> = numbers
                .iter()
                .map(|&number| number.min(POSITIONS_MAX - 1 - TILE as u32))
                .chain(first)
                .collect();
            numbers.sort_unstable();
            numbers.dedup();
            numbers
        };
        let slashes = sorted(slashes, Some(0));
        let ranges = slashes.iter().map(|&slash| (slash as usize, slash as usize + rows));
        Self::cover(ranges, sorted(verticals, None))
    }

    /// For each row block of `rows` queries from position `offset` on, the blocks of [`TILE`] keys in `chosen`, by number;
    /// those on the diagonal, and the first one, are always seen.
    pub fn block_sparse(rows: usize, offset: usize, chosen: &[Vec<u32>]) -> Self {
        let lists = chosen.iter().enumerate().map(|(block, numbers)| {
            let first = offset + block * rows;
            let diagonal = (first / TILE) as u32..=((first + rows - 1) / TILE) as u32;
            let mut tiles: Vec<u32> = numbers
                .iter()
                .copied()
                .filter(|&number| number < POSITIONS_MAX / TILE as u32)
                .chain(diagonal)
                .chain([0])
                .collect();
            tiles.sort_unstable();
            tiles.dedup();
            tiles.iter().map(|&number| number * TILE as u32).collect()
        });
        Self::Absolute { rows: lists.collect() }
    }

    /// Relative tiles over ranges `(start, end]` that come in rising order of their starts.
    fn cover(ranges: impl IntoIterator<Item = (usize, usize)>, columns: Vec<u32>) -> Self {
        let (mut tiles, mut covered) = (Vec::new(), 0);
        for (start, end) in ranges {
            covered = covered.max(start);
            while covered < end {
                tiles.push(covered as u32);
                covered += TILE;
            }
        }
        Self::Relative { tiles, columns }
    }

    /// Whether row block `block`, that ends at position `end`, holds `key`; whether a query sees it is for the caller to say.
    pub fn holds(&self, end: usize, block: usize, key: usize) -> bool {
        let within = |tiles: &[u32], place: usize| {
            let after = tiles.partition_point(|&tile| tile as usize <= place);
            after > 0 && place < tiles[after - 1] as usize + TILE
        };
        match self {
            Self::Dense => key < end,
            Self::Relative { tiles, columns } => {
                key < end && (within(tiles, end - key - 1) || columns.binary_search(&(key as u32)).is_ok())
            }
            Self::Absolute { rows } => rows.get(block).is_some_and(|tiles| within(tiles, key)),
        }
    }

    /// What row block `block` holds of the positions below `end`: rising ranges that do not touch, and the columns outside of
    /// them. Nothing is in both, so a sum over the two counts each key once.
    pub fn held(&self, end: usize, block: usize) -> Held {
        let mut held = Held::default();
        match self {
            Self::Dense => held.push(0..end),
            Self::Relative { tiles, columns } => {
                // Distances rise where positions fall.
                for &tile in tiles.iter().rev().filter(|&&tile| (tile as usize) < end) {
                    let tile = tile as usize;
                    held.push(end.saturating_sub(tile + TILE)..end - tile);
                }
                let mut ranges = held.ranges.iter().peekable();
                for &column in columns.iter().take_while(|&&column| (column as usize) < end) {
                    while ranges.next_if(|range| range.end <= column as usize).is_some() {}
                    if ranges.peek().is_none_or(|range| (column as usize) < range.start) {
                        held.columns.push(column);
                    }
                }
            }
            Self::Absolute { rows } => {
                for &tile in rows.get(block).into_iter().flatten() {
                    let tile = tile as usize;
                    if tile < end {
                        held.push(tile..(tile + TILE).min(end));
                    }
                }
            }
        }
        held
    }

    /// Tiles that a kernel works through for the block, columns gathered by the tile.
    fn work(&self, end: usize, block: usize) -> usize {
        let below = |numbers: &[u32]| numbers.partition_point(|&number| (number as usize) < end);
        match self {
            Self::Dense => end.div_ceil(TILE),
            // Columns that tiles cover are not gathered again.
            Self::Relative { tiles, columns } if columns.is_empty() => below(tiles),
            Self::Relative { tiles, .. } => below(tiles) + self.held(end, block).columns.len().div_ceil(TILE),
            Self::Absolute { rows } => rows.get(block).map_or(0, |tiles| below(tiles)),
        }
    }
}

/// Keys of one row block, see [`HeadMask::held`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Runs of positions, rising, with a gap between any two.
    pub ranges: Vec<Range<usize>>,
    /// Single positions outside the runs, rising.
    pub columns: Vec<u32>,
}

impl Held {
    /// Appends a run that begins not before the last one ends.
    fn push(&mut self, range: Range<usize>) {
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if range.is_empty() => {}
            _ => self.ranges.push(range),
        }
    }

    /// Keys at positions of at most `position`.
    pub fn up_to(&self, position: usize) -> usize {
        let runs = self
            .ranges
            .iter()
            .map(|range| range.end.min(position + 1).saturating_sub(range.start));
        runs.sum::<usize>() + self.columns.partition_point(|&column| column as usize <= position)
    }
}

/// Masks of all query heads of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    heads: Vec<HeadMask>,
}

/// Why heads do not make a mask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("head {head}: {what}; tiles must rise by at least {TILE} and columns by at least 1, below 2^30")]
pub struct BadMask {
    /// The head.
    pub head: usize,
    /// What is out of order.
    pub what: &'static str,
}

fn rises(numbers: &[u32], step: u32) -> bool {
    numbers.iter().all(|&number| number < POSITIONS_MAX)
        && numbers.windows(2).all(|pair| pair[1] >= pair[0].saturating_add(step))
}

impl Mask {
    /// A mask of one entry per query head, over row blocks of `rows`.
    ///
    /// # Errors
    /// If tiles overlap, anything is out of order, or row blocks would be empty.
    pub fn new(rows: usize, heads: Vec<HeadMask>) -> Result<Self, BadMask> {
        if rows == 0 {
            let what = "row blocks of no rows";
            return Err(BadMask { head: 0, what });
        }
        for (head, mask) in heads.iter().enumerate() {
            let what = match mask {
                HeadMask::Relative { tiles, .. } if !rises(tiles, TILE as u32) => "relative tiles",
                HeadMask::Relative { columns, .. } if !rises(columns, 1) => "columns",
                HeadMask::Absolute { rows } if !rows.iter().all(|tiles| rises(tiles, TILE as u32)) => "absolute tiles",
                _ => continue,
            };
            return Err(BadMask { head, what });
        }
        Ok(Self { rows, heads })
    }

    /// Queries of a row block.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The heads.
    pub fn heads(&self) -> &[HeadMask] {
        &self.heads
    }

    /// Whether the query in row `row` of a call that begins at position `offset` sees key `key`.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn sees(&self, head: usize, offset: usize, row: usize, key: usize) -> bool {
        let end = offset + (row / self.rows + 1) * self.rows;
        key <= offset + row && self.heads[head].holds(end, row / self.rows, key)
    }

    /// Tiles that a kernel works through for `queries` queries from position `offset` on, columns counted by the tile: the
    /// cost of the mask in units of `rows * TILE` scores.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn work(&self, head: usize, offset: usize, queries: usize) -> usize {
        work(&self.heads[head], self.rows, offset, queries)
    }
}

/// [`Mask::work`] of one head.
pub(crate) fn work(head: &HeadMask, rows: usize, offset: usize, queries: usize) -> usize {
    (0..queries.div_ceil(rows))
        .map(|block| head.work(offset + (block + 1) * rows, block))
        .sum()
}

#[cfg(test)]
mod tests;
