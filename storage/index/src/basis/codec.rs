//! The basis file. `FORMAT.md` beside this file has the bytes.

use half::f16;

use super::{Basis, HeadBasis};
use crate::IndexError;

const MAGIC: [u8; 8] = *b"KVBASIS\0";
const VERSION: u32 = 1;
/// Magic, version, layers, KV heads, head_dim, rank, model.
const HEADER_BYTES: usize = 8 + 5 * 4 + 32;
const CRC_BYTES: usize = 4;
/// Bit of a head's flags.
const STREAMING: u8 = 1;

/// Most layers and most KV heads of a file; also bounds what is multiplied below.
const COUNT_MAX: usize = 4096;
/// Most elements per key.
const HEAD_DIM_MAX: usize = 4096;

impl Basis {
    /// Most bytes of a file that is decoded: a Llama-3-8B's has 4.3 MB.
    pub const BYTES_MAX: usize = 256 << 20;

    /// The file. Elements are rounded to f16, so a basis as it is decoded differs a little from one as it was calculated, and
    /// both have the same file and the same [`Basis::id`].
    ///
    /// # Panics
    /// If sizes and heads do not agree.
    pub fn encode(&self) -> Vec<u8> {
        let (heads, elements) = (self.layers * self.kv_heads, self.rank * self.head_dim);
        assert_eq!(self.heads.len(), heads, "basis: {heads} heads");
        let mut out = Vec::with_capacity(HEADER_BYTES + heads * (1 + 2 * (self.head_dim + 2 * elements)) + CRC_BYTES);
        out.extend(MAGIC);
        for size in [VERSION as usize, self.layers, self.kv_heads, self.head_dim, self.rank] {
            let size = u32::try_from(size).unwrap_or_else(|_| panic!("basis: a size of {size}"));
            out.extend(size.to_le_bytes());
        }
        out.extend(self.model);
        out.extend(self.heads.iter().map(|head| if head.streaming { STREAMING } else { 0 }));
        for head in &self.heads {
            assert_eq!(head.mean.len(), self.head_dim, "basis: a mean key of {}", self.head_dim);
            assert!(
                head.keys.len() == elements && head.queries.len() == elements,
                "basis: rows of [{}, {}]",
                self.rank,
                self.head_dim
            );
            for value in [&head.mean, &head.keys, &head.queries].into_iter().flatten() {
                out.extend(f16::from_f32(*value).to_le_bytes());
            }
        }
        out.extend(crate::file::crc32c(&out).to_le_bytes());
        out
    }

    /// The basis of a file.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if the bytes are not a basis file of a version that is read here, are damaged, or hold
    /// numbers that are not finite. Whatever the bytes, no more memory is taken than about twice their length.
    pub fn decode(bytes: &[u8]) -> Result<Self, IndexError> {
        let unusable = |problem: String| Err(IndexError::Unusable(problem));
        let Some(rest) = bytes.strip_prefix(&MAGIC) else {
            return unusable("it does not begin as a basis file does".to_owned());
        };
        if bytes.len() > Self::BYTES_MAX {
            return unusable(format!(
                "it has {} bytes, and a basis at most {}",
                bytes.len(),
                Self::BYTES_MAX
            ));
        }
        let (Some((sizes, rest)), Some((body, crc))) = (rest.split_first_chunk::<20>(), bytes.split_last_chunk::<4>())
        else {
            return unusable("it is cut short".to_owned());
        };
        let [version, layers, kv_heads, head_dim, rank] =
            [0, 1, 2, 3, 4].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| sizes[4 * at + byte])));
        if version != VERSION {
            return unusable(format!(
                "it is a basis file of version {version}, and this program reads version {VERSION}: calibrate again"
            ));
        }
        if crate::file::crc32c(body) != u32::from_le_bytes(*crc) {
            return unusable("its checksum does not match: it is damaged or cut short".to_owned());
        }
        let [layers, kv_heads, head_dim, rank] = [layers, kv_heads, head_dim, rank].map(|size| size as usize);
        let sound = (1..=COUNT_MAX).contains(&layers)
            && (1..=COUNT_MAX).contains(&kv_heads)
            && (1..=HEAD_DIM_MAX).contains(&head_dim)
            && (1..=head_dim).contains(&rank);
        if !sound {
            return unusable(format!(
                "it says {layers} layers, {kv_heads} KV heads, {head_dim} elements and rank {rank}, which cannot be"
            ));
        }
        // At most 2^24 heads of 2^26 bytes: fits.
        let (heads, head_bytes) = ((layers * kv_heads) as u64, 2 * (head_dim + 2 * rank * head_dim) as u64);
        let expected = (HEADER_BYTES + CRC_BYTES) as u64 + heads * (1 + head_bytes);
        if bytes.len() as u64 != expected {
            return unusable(format!(
                "it has {} bytes, and its sizes ask for {expected}",
                bytes.len()
            ));
        }
        let Some((model, rest)) = rest.split_first_chunk::<32>() else {
            return unusable("it is cut short".to_owned());
        };
        let (flags, rows) = rest[..rest.len() - CRC_BYTES].split_at(layers * kv_heads);
        if let Some(flags) = flags.iter().find(|flags| **flags & !STREAMING != 0) {
            return unusable(format!("a head has flags {flags:#x}, which this program does not know"));
        }
        let heads = flags
            .iter()
            .zip(rows.chunks_exact(head_bytes as usize))
            .map(|(flags, rows)| {
                let values = rows.as_chunks::<2>().0;
                let numbers = |range: std::ops::Range<usize>| -> Vec<f32> {
                    values[range]
                        .iter()
                        .map(|bytes| f16::from_le_bytes(*bytes).to_f32())
                        .collect()
                };
                let (keys, queries) = (head_dim + rank * head_dim, head_dim + 2 * rank * head_dim);
                HeadBasis {
                    mean: numbers(0..head_dim),
                    keys: numbers(head_dim..keys),
                    queries: numbers(keys..queries),
                    streaming: flags & STREAMING != 0,
                }
            });
        let basis = Self {
            model: *model,
            layers,
            kv_heads,
            head_dim,
            rank,
            heads: heads.collect(),
        };
        let finite = |head: &HeadBasis| {
            let values = [&head.mean, &head.keys, &head.queries].into_iter().flatten();
            values.into_iter().all(|value| value.is_finite())
        };
        match basis.heads.iter().position(|head| !finite(head)) {
            None => Ok(basis),
            Some(at) => unusable(format!(
                "layer {}, KV head {} holds numbers that are not finite",
                at / kv_heads,
                at % kv_heads
            )),
        }
    }
}
