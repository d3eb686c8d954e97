//! [`Flat`] as a [`KeyIndex`]: holds nothing, scores every key.

use half::f16;
use kvasir_simd::{scores, top_k};

use crate::{
    Hits, IndexError, KeyIndex, Search,
    file::{self, Fields, Kind, Origin},
    search::check,
};

const VERSION: u16 = 1;

/// The exact scan; the oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flat {
    head_dim: usize,
    keys: usize,
    origin: Origin,
}

impl Flat {
    /// For keys of `head_dim` elements; `origin` names them in its file.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if `head_dim` is 0.
    pub fn new(head_dim: usize, origin: Origin) -> Result<Self, IndexError> {
        if head_dim == 0 {
            return Err(IndexError::Invalid {
                argument: "head_dim",
                problem: "keys have at least 1 element".into(),
            });
        }
        Ok(Self {
            head_dim,
            keys: 0,
            origin,
        })
    }

    /// Reads [`KeyIndex::encode`]'s file.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if it is not one, is damaged, or is of other keys.
    pub fn decode(bytes: &[u8], origin: Origin) -> Result<Self, IndexError> {
        let frame = file::open(bytes, Kind::Flat, VERSION, origin)?;
        Fields::new(frame.payload).finish()?;
        Ok(Self {
            head_dim: frame.head_dim,
            keys: frame.keys,
            origin,
        })
    }
}

impl KeyIndex for Flat {
    fn name(&self) -> &'static str {
        "flat"
    }

    fn keys(&self) -> usize {
        self.keys
    }

    fn bytes(&self) -> usize {
        0
    }

    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        if !keys.len().is_multiple_of(self.head_dim) {
            return Err(IndexError::Invalid {
                argument: "keys",
                problem: format!("wants rows of {}, not {} elements", self.head_dim, keys.len()),
            });
        }
        self.keys += keys.len() / self.head_dim;
        Ok(())
    }

    /// Whatever the effort, every key is scored.
    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let d = self.head_dim;
        let heads = check(search, d, self.keys)?;
        let mut all = vec![Vec::with_capacity(self.keys); heads];
        let (mut part, mut start) = (Vec::new(), 0_u32);
        for block in search.keys.blocks() {
            let len = block.len() / d;
            part.resize(heads * len, 0.0);
            scores(search.q, block, d, search.scale, &mut part);
            for (all, part) in all.iter_mut().zip(part.chunks_exact(len.max(1))) {
                let from = all.len();
                all.resize(from + len, f32::NEG_INFINITY);
                for range in search.excluded.searched(start..start + len as u32) {
                    for at in range {
                        let score = part[(at - start) as usize];
                        if score.is_finite() {
                            all[at as usize] = score;
                        }
                    }
                }
            }
            start += len as u32;
        }
        let mut hits = Hits::default();
        let mut best = Vec::new();
        for scores in &all {
            top_k(scores, search.k, &mut best);
            let found = best.iter().map(|at| (*at, scores[*at as usize]));
            let mut found: Vec<(u32, f32)> = found.filter(|(_, score)| *score > f32::NEG_INFINITY).collect();
            found.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            hits.heads.push(found);
        }
        let searched = u64::from(search.excluded.searched_count(start));
        hits.cost.keys_scored = searched * heads as u64;
        hits.cost.bytes_read = u64::from(start) * d as u64 * 2;
        Ok(hits)
    }

    fn encode(&self) -> Vec<u8> {
        file::seal(Kind::Flat, VERSION, self.head_dim, self.keys, self.origin, &[])
    }
}
