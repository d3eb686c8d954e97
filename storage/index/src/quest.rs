//! Quest (Tang et al. 2024, arXiv 2406.10774): pages of 16 tokens with the least and the greatest of each element.
//!
//! `sum_d max(q_d * low_d, q_d * high_d)` is at least the product with any key of the page, so pages are read in the order of
//! this bound. Each query head ranks pages for itself. Appending widens the last page; nothing is ever rebuilt.

use half::f16;

use crate::{
    Cost, Hits, IndexError, KeyIndex, Search,
    file::{self, Fields, Kind, Origin},
    search::{Best, budget, check, check_rows, hits, is_finite, ranked, scan_lists},
};

/// Tokens of a page, as published.
const PAGE_TOKENS: usize = 16;
const VERSION: u16 = 1;

/// Pages of 16 keys, each with its bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Quest {
    origin: Origin,
    head_dim: usize,
    keys: usize,
    /// Per page the greatest elements, then the least: `[pages, 2, head_dim]`. A page without a finite key has zeros.
    bounds: Vec<f16>,
    /// Finite keys of the last page: with none, its bounds are not yet bounds.
    last_finite: usize,
}

impl Quest {
    /// No pages yet.
    ///
    /// # Panics
    /// If `head_dim` is not 1 to 1024.
    pub fn new(head_dim: usize, origin: Origin) -> Self {
        assert!((1..=1024).contains(&head_dim), "quest: head_dim is 1 to 1024");
        Self {
            origin,
            head_dim,
            keys: 0,
            bounds: Vec::new(),
            last_finite: 0,
        }
    }

    /// Reads what [`KeyIndex::encode`] wrote.
    ///
    /// # Errors
    /// [`IndexError::Unusable`]: damaged, another kind or version, or built from something else than `origin`.
    pub fn decode(bytes: &[u8], origin: Origin) -> Result<Self, IndexError> {
        let frame = file::open(bytes, Kind::Quest, VERSION, origin)?;
        let mut fields = Fields::new(frame.payload);
        let last_finite = fields.u32()? as usize;
        let bounds = fields.halves(frame.keys.div_ceil(PAGE_TOKENS) * 2 * frame.head_dim)?;
        fields.finish()?;
        if last_finite > PAGE_TOKENS || !is_finite(&bounds) {
            return Err(IndexError::Unusable("its bounds cannot be".to_owned()));
        }
        Ok(Self {
            origin,
            head_dim: frame.head_dim,
            keys: frame.keys,
            bounds,
            last_finite,
        })
    }

    fn widen(&mut self, key: &[f16]) {
        if self.keys.is_multiple_of(PAGE_TOKENS) {
            self.bounds.resize(self.bounds.len() + 2 * self.head_dim, f16::ZERO);
            self.last_finite = 0;
        }
        self.keys += 1;
        if !is_finite(key) {
            return;
        }
        let page = self.bounds.len() - 2 * self.head_dim;
        let (high, low) = self.bounds[page..].split_at_mut(self.head_dim);
        for ((high, low), &x) in high.iter_mut().zip(low).zip(key) {
            if self.last_finite == 0 || x > *high {
                *high = x;
            }
            if self.last_finite == 0 || x < *low {
                *low = x;
            }
        }
        self.last_finite += 1;
    }
}

impl KeyIndex for Quest {
    fn name(&self) -> &'static str {
        "quest"
    }

    fn keys(&self) -> usize {
        self.keys
    }

    fn bytes(&self) -> usize {
        size_of_val(self.bounds.as_slice())
    }

    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        check_rows(keys, self.head_dim, self.keys)?;
        keys.chunks_exact(self.head_dim).for_each(|key| self.widen(key));
        Ok(())
    }

    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let heads = check(search, self.head_dim, self.keys)?;
        // The bound is one product over twice the elements: [q where positive, q where negative] . [high, low].
        let mut split = Vec::with_capacity(2 * search.q.len());
        for q in search.q.chunks_exact(self.head_dim) {
            split.extend(q.iter().map(|x| (x * search.scale.signum()).max(0.0)));
            split.extend(q.iter().map(|x| (x * search.scale.signum()).min(0.0)));
        }
        let pages = self.keys.div_ceil(PAGE_TOKENS);
        let mut bounds = vec![0.0; heads * pages];
        kvasir_simd::scores(&split, &self.bounds, 2 * self.head_dim, search.scale.abs(), &mut bounds);
        let orders: Vec<_> = (0..heads)
            .map(|head| ranked(&bounds[head * pages..][..pages]))
            .collect();
        let mut cost = Cost {
            keys_scored: 0,
            bytes_read: self.bytes() as u64,
        };
        let mut best = vec![Best::new(search.k); heads];
        let members = |page: u32| {
            let from = page * PAGE_TOKENS as u32;
            from..(from + PAGE_TOKENS as u32).min(self.keys as u32)
        };
        scan_lists(
            search,
            &orders,
            budget(search, self.keys),
            0,
            members,
            &mut cost,
            &mut best,
        );
        Ok(hits(best, cost))
    }

    fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(4 + self.bytes());
        file::put_u32s(&mut payload, &[self.last_finite as u32]);
        file::put_halves(&mut payload, &self.bounds);
        file::seal(Kind::Quest, VERSION, self.head_dim, self.keys, self.origin, &payload)
    }
}
