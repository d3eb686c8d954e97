//! Rows that the store has sent, kept so that they need not be sent again.
//!
//! Successive steps of a generation attend to much the same keys: of the best 100, 58 % are among those of the step before,
//! and an LRU of five times as many finds 87 %. The store knows what the worker keeps because both follow one rule, per
//! layer and KV head and in the order of the replies:
//!
//! 1. A position of the reply is a *hit* if it was kept before the reply; the others are sent.
//! 2. Then all positions of the reply count as used, in rising order, those that are new being added.
//! 3. Then the least recently used are dropped until at most `rows_max` are left.
//!
//! The rule looks at positions only, so the store's half is a list of numbers. That the two halves agree is not trusted:
//! a row that was not sent and is not here ends retrieval for the sequence.

use std::collections::HashMap;

use half::f16;

/// No slot.
const NONE: u32 = u32::MAX;

/// What is kept of one layer and KV head.
#[derive(Debug)]
pub(crate) struct RowCache {
    rows_max: usize,
    head_dim: usize,
    slots: HashMap<u32, u32>,
    uses: Vec<Use>,
    /// Least recently used.
    oldest: u32,
    /// Most recently used.
    newest: u32,
    free: Vec<u32>,
    /// `[slots, 2, head_dim]`: key and value of each slot.
    rows: Vec<f16>,
}

/// A slot's place in the order of use.
#[derive(Clone, Copy, Debug)]
struct Use {
    position: u32,
    older: u32,
    newer: u32,
}

/// What a reply brought, as slices of rows: `keys` and `values` hold those at `sent`, indices into `positions`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SentRows<'a> {
    /// Rising.
    pub(crate) positions: &'a [u32],
    /// Rising.
    pub(crate) sent: &'a [u32],
    pub(crate) keys: &'a [f16],
    pub(crate) values: &'a [f16],
}

impl RowCache {
    /// A cache of at most `rows_max` rows of keys and of values.
    pub(crate) fn new(rows_max: usize, head_dim: usize) -> Self {
        Self {
            rows_max,
            head_dim,
            slots: HashMap::new(),
            uses: Vec::new(),
            oldest: NONE,
            newest: NONE,
            free: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Puts keys and values of all positions together, `[positions, head_dim]` each behind what `keys` and `values` hold, and
    /// keeps what is new by the rule.
    ///
    /// # Errors
    /// In words, if a row was neither sent nor kept, or the slices do not fit. The cache is then of no more use.
    pub(crate) fn complete(
        &mut self,
        reply: SentRows<'_>,
        keys: &mut Vec<f16>,
        values: &mut Vec<f16>,
    ) -> Result<(), String> {
        let d = self.head_dim;
        let SentRows { positions, sent, .. } = reply;
        if reply.keys.len() != sent.len() * d || reply.values.len() != sent.len() * d {
            return Err(format!("{} rows were announced, and others came", sent.len()));
        }
        let mut next = sent.iter().enumerate().peekable();
        for (index, position) in positions.iter().enumerate() {
            if let Some((row, _)) = next.next_if(|(_, at)| **at as usize == index) {
                keys.extend_from_slice(&reply.keys[row * d..(row + 1) * d]);
                values.extend_from_slice(&reply.values[row * d..(row + 1) * d]);
            } else if let Some(slot) = self.slots.get(position) {
                let row = &self.rows[*slot as usize * 2 * d..][..2 * d];
                keys.extend_from_slice(&row[..d]);
                values.extend_from_slice(&row[d..]);
            } else {
                return Err("the store counted on a row that is not kept here".to_owned());
            }
        }
        if next.next().is_some() {
            return Err("the store sent rows that are out of order or of no position".to_owned());
        }
        let first = keys.len() - positions.len() * d;
        for (index, position) in positions.iter().enumerate() {
            let at = first + index * d;
            self.touch(*position, &keys[at..at + d], &values[at..at + d]);
        }
        while self.slots.len() > self.rows_max {
            self.drop_oldest();
        }
        Ok(())
    }

    /// Counts a row as used now; adds it if it is new.
    fn touch(&mut self, position: u32, key: &[f16], value: &[f16]) {
        let slot = match self.slots.get(&position) {
            Some(slot) => {
                let slot = *slot;
                self.unlink(slot);
                slot
            }
            None => self.add(position, key, value),
        };
        let older = std::mem::replace(&mut self.newest, slot);
        self.uses[slot as usize] = Use {
            position,
            older,
            newer: NONE,
        };
        match older {
            NONE => self.oldest = slot,
            older => self.uses[older as usize].newer = slot,
        }
    }

    fn add(&mut self, position: u32, key: &[f16], value: &[f16]) -> u32 {
        let d = self.head_dim;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.uses.push(Use {
                position,
                older: NONE,
                newer: NONE,
            });
            self.rows.resize(self.uses.len() * 2 * d, f16::ZERO);
            (self.uses.len() - 1) as u32
        });
        let row = &mut self.rows[slot as usize * 2 * d..][..2 * d];
        row[..d].copy_from_slice(key);
        row[d..].copy_from_slice(value);
        self.slots.insert(position, slot);
        slot
    }

    fn drop_oldest(&mut self) {
        let slot = self.oldest;
        if slot != NONE {
            self.unlink(slot);
            self.slots.remove(&self.uses[slot as usize].position);
            self.free.push(slot);
        }
    }

    fn unlink(&mut self, slot: u32) {
        let Use { older, newer, .. } = self.uses[slot as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.uses[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.uses[newer as usize].older = older,
        }
    }
}

/// Rows per layer and KV head that `bytes_max` allows a sequence to keep.
pub(crate) fn rows_within(bytes_max: usize, layers: usize, kv_heads: usize, head_dim: usize) -> usize {
    let row_bytes = layers * kv_heads * 2 * head_dim * size_of::<f16>();
    bytes_max / row_bytes.max(1)
}

#[cfg(test)]
mod tests;
