//! Which keys each query of a prompt sees: one type for dense, A-shape, Vertical-Slash and Block-Sparse attention.
//!
//! Queries come in row blocks of [`ROWS`]; with `end` the position after a block's last row (as if the block were full), a
//! key at position `j` lies at distance `u = end - j`. The whole mask is two lines: key `j` is seen by the query at
//! position `p` if `j <= p`, and if `j` is in a tile of `p`'s block or is one of the head's columns. A relative tile `t`
//! holds the keys with `t < u <= t + TILE`, the same for every block, so that a head's list costs memory in its number of
//! tiles and not in the prompt's length; an absolute tile `t` holds `t <= j < t + TILE`, for one block alone.

/// Query rows that share a list of tiles: the height of the kernel's tile.
pub const ROWS: usize = 128;
/// Keys of a tile: its width.
pub const TILE: usize = 64;

/// What the queries of one head see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadTiles {
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

/// Masks of all query heads of a layer; all of them causal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TileList {
    heads: Vec<HeadTiles>,
}

/// Why heads do not make a list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("head {head}: {what}; tiles must rise by at least {TILE} and columns by at least 1, below 2^30")]
pub struct BadTiles {
    /// The head.
    pub head: usize,
    /// What is out of order.
    pub what: &'static str,
}

const MOST: u32 = 1 << 30;

fn rises(numbers: &[u32], step: u32) -> bool {
    numbers.iter().all(|&number| number < MOST)
        && numbers.windows(2).all(|pair| pair[1] >= pair[0].saturating_add(step))
}

impl TileList {
    /// A list of one entry per query head.
    ///
    /// # Errors
    /// If tiles overlap or anything is out of order.
    pub fn new(heads: Vec<HeadTiles>) -> Result<Self, BadTiles> {
        for (head, tiles) in heads.iter().enumerate() {
            let what = match tiles {
                HeadTiles::Relative { tiles, .. } if !rises(tiles, TILE as u32) => "relative tiles",
                HeadTiles::Relative { columns, .. } if !rises(columns, 1) => "columns",
                HeadTiles::Absolute { rows } if !rows.iter().all(|tiles| rises(tiles, TILE as u32)) => "absolute tiles",
                _ => continue,
            };
            return Err(BadTiles { head, what });
        }
        Ok(Self { heads })
    }

    /// The heads.
    pub fn heads(&self) -> &[HeadTiles] {
        &self.heads
    }

    /// Whether the query in row `row` of a prompt chunk that begins at position `offset` sees key `key`.
    pub fn sees(&self, head: usize, offset: usize, row: usize, key: usize) -> bool {
        let end = offset + (row / ROWS + 1) * ROWS;
        key <= offset + row && self.heads[head].holds(end, row / ROWS, key)
    }

    /// Tiles that the kernel works through for `rows` queries from position `offset` on, columns counted by the tile: the
    /// cost of the mask in units of `ROWS * TILE` scores.
    pub fn work(&self, head: usize, offset: usize, rows: usize) -> usize {
        (0..rows.div_ceil(ROWS))
            .map(|block| self.heads[head].work(offset + (block + 1) * ROWS, block))
            .sum()
    }
}

impl HeadTiles {
    /// Every key: full causal attention over prompts of up to `tokens` positions.
    pub fn dense(tokens: usize) -> Self {
        Self::cover([(0, tokens.next_multiple_of(ROWS))], Vec::new())
    }

    /// The first `initial` positions, and at least the `local` last ones before each query.
    pub fn a_shape(initial: usize, local: usize) -> Self {
        Self::cover([(0, local + ROWS)], (0..initial as u32).collect())
    }

    /// The columns in `verticals` and the diagonals in `slashes` (distance of key from query; 0 is the query itself and is
    /// always seen). A diagonal meets each row block in as many keys as the block has rows and one less again, so it
    /// covers `slash < u <= slash + ROWS`; what overlaps is joined, and tiles cover it from the near end on.
    pub fn vertical_slash(verticals: &[u32], slashes: &[u32]) -> Self {
        let mut with_diagonal = slashes.to_vec();
        with_diagonal.push(0);
        Self::slashes_alone(verticals.to_vec(), &with_diagonal)
    }

    /// As [`HeadTiles::vertical_slash`], but the query itself is seen only if diagonal 0 is among `slashes`.
    pub fn slashes_alone(verticals: Vec<u32>, slashes: &[u32]) -> Self {
        let sorted = |mut numbers: Vec<u32>| {
            numbers
                .iter_mut()
                .for_each(|number| *number = (*number).min(MOST - 1 - TILE as u32));
            numbers.sort_unstable();
            numbers.dedup();
            numbers
        };
        let slashes = sorted(slashes.to_vec());
        let ranges = slashes.iter().map(|&slash| (slash as usize, slash as usize + ROWS));
        Self::cover(ranges, sorted(verticals))
    }

    /// For each row block the blocks of [`TILE`] keys in `rows`, by number; the two on the diagonal are always seen.
    /// `offset` is the position of the first query.
    pub fn block_sparse(offset: usize, rows: &[Vec<u32>]) -> Self {
        let rows = rows.iter().enumerate().map(|(block, numbers)| {
            let first = offset + block * ROWS;
            let diagonal = (first / TILE) as u32..=((first + ROWS - 1) / TILE) as u32;
            let mut tiles: Vec<u32> = numbers
                .iter()
                .copied()
                .filter(|&number| number < MOST / TILE as u32)
                .collect();
            tiles.extend(diagonal);
            tiles.sort_unstable();
            tiles.dedup();
            tiles.iter().map(|&number| number * TILE as u32).collect()
        });
        Self::Absolute { rows: rows.collect() }
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

    fn holds(&self, end: usize, block: usize, key: usize) -> bool {
        let within = |tiles: &[u32], place: usize| {
            let after = tiles.partition_point(|&tile| tile as usize <= place);
            after > 0 && place < tiles[after - 1] as usize + TILE
        };
        match self {
            Self::Relative { tiles, columns } => {
                within(tiles, end - key - 1) || columns.binary_search(&(key as u32)).is_ok()
            }
            Self::Absolute { rows } => rows.get(block).is_some_and(|tiles| within(tiles, key)),
        }
    }

    fn work(&self, end: usize, block: usize) -> usize {
        let below = |numbers: &[u32]| numbers.partition_point(|&number| (number as usize) < end);
        match self {
            Self::Relative { tiles, columns } => below(tiles) + below(columns).div_ceil(TILE),
            Self::Absolute { rows } => rows.get(block).map_or(0, |tiles| below(tiles)),
        }
    }
}

#[cfg(test)]
mod tests;
