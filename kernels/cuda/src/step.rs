//! The rows of one step on the device: tokens, positions, and where their keys and values are.

use crate::{Buffer, Gpu, GpuError, PinnedBuffer};

/// What numbers in a step may be; looked at before they are copied, so that no kernel can be led outside a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens are below it.
    pub vocab: usize,
    /// Positions are below it.
    pub positions: usize,
    /// Page numbers are below it.
    pub pages: usize,
    /// Tokens of a page, a multiple of 16.
    pub page_tokens: usize,
}

/// One row of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepRow {
    /// Token.
    pub token: u32,
    /// Its position.
    pub position: u32,
    /// Page, and row in the page, that its key and value go to; none for a row that only fills a place.
    pub slot: Option<(u32, u32)>,
    /// Page table that [`crate::DecodeRows`] reads for this row.
    pub table: u32,
    /// Tokens of that table that the row sees.
    pub sees: u32,
}

const NOWHERE: u32 = u32::MAX;

/// Rows and page tables of a step in buffers that stay where they are, so that recorded work finds the next step's there.
#[derive(Debug)]
pub struct StepRows {
    limits: StepLimits,
    words: Buffer<u32>,
    staged: PinnedBuffer,
    room: usize,
    tables: usize,
    /// Numbers of a table.
    stride: usize,
    rows: usize,
}

/// The arrays of rows, in order.
#[derive(Clone, Copy)]
pub(crate) enum Array {
    Tokens,
    Positions,
    Slots,
    Tables,
    Sees,
}

const ARRAYS: usize = 5;

impl StepRows {
    /// Room for `rows` rows and `tables` page tables of `pages` numbers each.
    ///
    /// # Errors
    /// If limits cannot be, or there is no room.
    pub fn new(gpu: &Gpu, limits: StepLimits, rows: usize, tables: usize, pages: usize) -> Result<Self, GpuError> {
        let slots = limits.pages.checked_mul(limits.page_tokens);
        let words = tables
            .checked_mul(pages)
            .and_then(|numbers| numbers.checked_add(rows.checked_mul(ARRAYS)?))
            .filter(|&words| words > 0 && words < 1 << 30);
        let (Some(words), Some(..0x4000_0000)) = (words, slots) else {
            let why = format!("{rows} rows and {tables} tables of {pages} under {limits:?}");
            return Err(GpuError::shape("step", why));
        };
        if limits.page_tokens == 0 || !limits.page_tokens.is_multiple_of(16) {
            let why = format!("pages of {} tokens; a multiple of 16 is needed", limits.page_tokens);
            return Err(GpuError::shape("step", why));
        }
        Ok(Self {
            limits,
            words: gpu.zeros(words)?,
            staged: gpu.pinned(4 * words)?,
            room: rows,
            tables,
            stride: pages,
            rows: 0,
        })
    }

    /// Replaces all rows and tables; waits for the step before.
    ///
    /// # Errors
    /// If there are too many, or a number is beyond its limit; nothing is replaced then.
    pub fn set(&mut self, gpu: &Gpu, rows: &[StepRow], tables: &[Vec<u32>]) -> Result<(), GpuError> {
        let StepLimits {
            vocab,
            positions,
            pages,
            page_tokens,
        } = self.limits;
        let refuse = |why: String| Err(GpuError::shape("step", why));
        if rows.len() > self.room || tables.len() > self.tables {
            return refuse(format!(
                "{} rows and {} tables; there is room for {} and {}",
                rows.len(),
                tables.len(),
                self.room,
                self.tables
            ));
        }
        let is_bad_row = |row: &&StepRow| {
            let outside = row
                .slot
                .is_some_and(|(page, inside)| page as usize >= pages || inside as usize >= page_tokens);
            let table = tables.get(row.table as usize).map_or(0, Vec::len);
            outside
                || row.token as usize >= vocab
                || row.position as usize >= positions
                || row.sees as usize > table * page_tokens
        };
        if let Some(row) = rows.iter().find(is_bad_row) {
            return refuse(format!("{row:?} is beyond {:?} or its table", self.limits));
        }
        if let Some(table) = tables
            .iter()
            .find(|table| table.len() > self.stride || table.iter().any(|&page| page as usize >= pages))
        {
            return refuse(format!(
                "a table of {} pages, up to {:?}; there is room for {} below {pages}",
                table.len(),
                table.iter().max(),
                self.stride
            ));
        }
        let bytes = self.staged.write()?;
        let mut put = |at: usize, word: u32| bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        for (i, row) in rows.iter().enumerate() {
            let slot = row
                .slot
                .map_or(NOWHERE, |(page, inside)| page * page_tokens as u32 + inside);
            let words = [row.token, row.position, slot, row.table, row.sees];
            words
                .into_iter()
                .enumerate()
                .for_each(|(array, word)| put(array * self.room + i, word));
        }
        for (i, table) in tables.iter().enumerate() {
            let first = ARRAYS * self.room + i * self.stride;
            table.iter().enumerate().for_each(|(j, &page)| put(first + j, page));
        }
        self.rows = rows.len();
        let used = ARRAYS * self.room + tables.len() * self.stride;
        gpu.copy_from_host(&self.staged, &mut self.words, 4 * used)
    }

    /// What the numbers keep within.
    pub const fn limits(&self) -> StepLimits {
        self.limits
    }

    /// Rows that there is room for.
    pub const fn room(&self) -> usize {
        self.room
    }

    /// Address of row `first` of an array.
    pub(crate) fn array(&self, array: Array, first: usize) -> u64 {
        self.words.pointer + 4 * (array as usize * self.room + first) as u64
    }

    /// Address of a page table, its numbers, and the numbers from one to the next.
    pub(crate) fn table(&self, table: usize) -> Option<(u64, usize)> {
        let first = ARRAYS * self.room + table * self.stride;
        (table < self.tables).then_some((self.words.pointer + 4 * first as u64, self.stride))
    }

    pub(crate) fn check_rows(&self, rows: &std::ops::Range<usize>) -> Result<(), GpuError> {
        if rows.start > rows.end || rows.end > self.room {
            return Err(GpuError::shape("step", format!("rows {rows:?} of {}", self.room)));
        }
        Ok(())
    }
}
