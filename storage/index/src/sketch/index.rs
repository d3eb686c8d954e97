//! [`Sketch`] as a [`KeyIndex`]: keys only, in blocks of its own.

mod by_mass;

use half::f16;
use kvasir_simd::{score_rows, top_k};

use super::{
    column::Column,
    format::{SketchFormat, Width, encode_block, invalid},
    search::{Candidates, Kind, Masks, Room, Table},
};
use crate::{
    Cost, HeadBasis, Hits, IndexError, KeyIndex, Search,
    file::{self, Fields, Origin},
    search::check,
};

/// Keys of a block.
const BLOCK: usize = 64;
/// Of the payload.
const VERSION: u16 = 3;

/// Sketches of the keys of one KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct Sketch {
    format: SketchFormat,
    basis: HeadBasis,
    /// Names keys and basis in files.
    origin: Origin,
    keys: usize,
    /// Whole blocks, then the open one.
    column: Column,
    /// Keys of the open block.
    open: Vec<f16>,
}

impl Sketch {
    /// An index without keys; `origin` names keys and basis in its file.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if `basis` is not one for keys of `head_dim`.
    pub fn new(head_dim: usize, width: Width, basis: HeadBasis, origin: Origin) -> Result<Self, IndexError> {
        let format = SketchFormat {
            head_dim,
            width,
            values: false,
        };
        format.check(&basis)?;
        Ok(Self {
            format,
            basis,
            origin,
            keys: 0,
            column: Column::new(format),
            open: Vec::new(),
        })
    }

    /// Reads [`KeyIndex::encode`]'s file.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if it is not one, is damaged, or was made of other keys or with another basis.
    pub fn decode(bytes: &[u8], basis: HeadBasis, origin: Origin) -> Result<Self, IndexError> {
        let unusable = |what: &str| IndexError::Unusable(format!("sketch: {what}"));
        let frame = file::open(bytes, file::Kind::Sketch, VERSION, origin)?;
        let (head_dim, keys) = (frame.head_dim, frame.keys);
        let mut fields = Fields::new(frame.payload);
        let width = match fields.u32()? {
            4 => Width::Four,
            8 => Width::Eight,
            other => return Err(unusable(&format!("{other} bits per direction"))),
        };
        let mut index = Self::new(head_dim, width, basis, origin)?;
        index.keys = keys;
        let tail = keys % BLOCK;
        index.open = fields.halves(tail * head_dim)?;
        let blocks = fields.rest();
        let open = if tail > 0 { index.format.bytes(tail) } else { 0 };
        if blocks.len() != keys / BLOCK * index.format.bytes(BLOCK) + open {
            return Err(unusable("not as many blocks as keys"));
        }
        for (at, block) in blocks.chunks(index.format.bytes(BLOCK)).enumerate() {
            index.column.push_missing(BLOCK.min(keys - at * BLOCK))?;
            // Of another number of keys it is none of this block.
            let other = |_| unusable("a block that is not one");
            index.column.set(at, block).map_err(other)?;
        }
        Ok(index)
    }
}

impl KeyIndex for Sketch {
    fn name(&self) -> &'static str {
        "sketch"
    }

    fn keys(&self) -> usize {
        self.keys
    }

    fn bytes(&self) -> usize {
        self.column.bytes() + self.open.len() * 2
    }

    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        let d = self.format.head_dim;
        if !keys.len().is_multiple_of(d) {
            return Err(invalid(
                "keys",
                format!("wants rows of {d}, not {} elements", keys.len()),
            ));
        }
        if keys.is_empty() {
            return Ok(());
        }
        if !self.open.is_empty() {
            self.column.pop();
        }
        self.open.extend_from_slice(keys);
        self.keys += keys.len() / d;
        let mut sketch = Vec::with_capacity(self.format.bytes(BLOCK));
        for block in self.open.chunks(BLOCK * d) {
            sketch.clear();
            encode_block(self.format, &self.basis, block, &[], &mut sketch)?;
            self.column.push(&sketch)?;
        }
        self.open.drain(..self.open.len() / (BLOCK * d) * BLOCK * d);
        Ok(())
    }

    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let d = self.format.head_dim;
        check(search, d, self.keys)?;
        let column = &self.column;
        let (mut table, mut masks, mut room) = (Table::default(), Masks::default(), Room::default());
        table.begin(self.format, search.q, &self.basis, search.scale, room.weights());
        let mut words = Vec::new();
        let searched = column.searched(0, search.excluded, |block| Some((block * BLOCK) as u32), &mut words);
        masks.words.push(words);
        masks.searched.push(searched);
        if search.mass < 1.0 && searched > 0 {
            return Ok(by_mass::search(search, &table, column, &masks));
        }
        let mut cost = Cost {
            bytes_read: column.coded_bytes() as u64,
            ..Cost::default()
        };
        let wanted = |searched: usize| {
            let count = (f64::from(search.effort) * searched as f64).ceil() as usize;
            (count.max(search.k.min(searched)), 1.0)
        };
        let mut candidates = Candidates::default();
        if searched > 0 {
            table.find(column, &masks, &mut room, &wanted, &mut candidates);
        } else {
            candidates.ends.resize(table.heads(), 0);
        }
        let mut hits = Hits::default();
        let (mut best, mut all) = (Vec::new(), Vec::new());
        for (head, q) in search.q.chunks_exact(d).enumerate() {
            debug_assert_ne!(table.kinds[head], Kind::Dead, "queries are finite");
            let slots = &candidates.slots[candidates.of(head)];
            // Whole blocks before the last: a slot is a position.
            let rows: Vec<&[f16]> = slots.iter().map(|slot| search.keys.row(*slot as usize)).collect();
            let mut scores = vec![0.0; rows.len()];
            score_rows(q, &rows, d, search.scale, &mut scores);
            scores
                .iter_mut()
                .filter(|score| !score.is_finite())
                .for_each(|score| *score = f32::NEG_INFINITY);
            top_k(&scores, search.k, &mut best);
            let finite = best.iter().map(|at| (slots[*at as usize], scores[*at as usize]));
            let mut found: Vec<(u32, f32)> = finite.filter(|(_, score)| *score > f32::NEG_INFINITY).collect();
            found.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            hits.heads.push(found);
            cost.keys_scored += slots.len() as u64;
            all.extend_from_slice(slots);
        }
        all.sort_unstable();
        all.dedup();
        cost.bytes_read += (all.len() * d * 2) as u64;
        hits.cost = cost;
        Ok(hits)
    }

    fn encode(&self) -> Vec<u8> {
        let bits = match self.format.width {
            Width::Four => 4,
            Width::Eight => 8,
        };
        let mut payload = Vec::with_capacity(4 + self.bytes());
        file::put_u32s(&mut payload, &[bits]);
        file::put_halves(&mut payload, &self.open);
        (0..self.column.blocks()).for_each(|at| self.column.write(at, &mut payload));
        let head_dim = self.format.head_dim;
        file::seal(file::Kind::Sketch, VERSION, head_dim, self.keys, self.origin, &payload)
    }
}
