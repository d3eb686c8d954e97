//! What is put and got: blocks of a wanted size, named and filled from a seed.

use anyhow::{Result, ensure};
use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, Dtype, KvSchema, RopeStyle};
use kvasir_client::LayerBlock;
use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};

/// Bytes of the smallest layer block: one KV head of 64 tokens, 64 elements each.
const UNIT: usize = 2 * 64 * 64 * 2;
/// Different payloads; noise, so that nothing that compresses or skips zeros gains by it.
const PAYLOADS: usize = 32;

/// A schema whose layer blocks have `bytes` bytes, a multiple of 16 KiB.
pub(in crate::bench) fn schema(bytes: usize, block_tokens: u16) -> Result<KvSchema> {
    let unit = UNIT / 64 * usize::from(block_tokens);
    ensure!(
        bytes > 0 && bytes.is_multiple_of(unit) && bytes <= KvSchema::LAYER_BLOCK_BYTES_MAX,
        "a size of {bytes} bytes: take a multiple of {unit}, at most {}",
        KvSchema::LAYER_BLOCK_BYTES_MAX
    );
    Ok(KvSchema {
        model: format!("bench of {bytes} bytes"),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 1,
        kv_heads: u16::try_from(bytes / unit)?,
        head_dim: 64,
        block_tokens,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e5,
        rope_dims: 64,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "bench/1".to_owned(),
    })
}

/// Payloads of one size with their checksums.
#[derive(Debug)]
pub(in crate::bench) struct Payloads(Vec<(Bytes, Checksum)>);

impl Payloads {
    pub(in crate::bench) fn new(bytes: usize, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        // One run of noise, read from different places.
        let mut noise = vec![0; bytes + PAYLOADS * 64];
        rng.fill_bytes(&mut noise);
        let noise = Bytes::from(noise);
        let payload = |i: usize| {
            let payload = noise.slice(i * 64..i * 64 + bytes);
            let checksum = Checksum::of(&payload);
            (payload, checksum)
        };
        Self((0..PAYLOADS).map(payload).collect())
    }

    /// The block called `hash`; the same bytes whenever asked.
    pub(in crate::bench) fn block(&self, hash: BlockHash) -> LayerBlock {
        let [first, ..] = *hash.as_bytes();
        let (payload, checksum) = self.0[usize::from(first) % self.0.len()].clone();
        LayerBlock {
            hash,
            layer: 0,
            checksum,
            payload,
        }
    }
}

/// The name of block `at` of context `context` of a run.
pub(in crate::bench) fn hash(run: u64, context: u64, at: u64) -> BlockHash {
    let mut rng = SmallRng::seed_from_u64(run ^ context.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ at.rotate_left(40));
    let mut name = [0; 32];
    rng.fill_bytes(&mut name);
    name[8..16].copy_from_slice(&context.to_le_bytes());
    name[16..24].copy_from_slice(&at.to_le_bytes());
    name[24..32].copy_from_slice(&run.to_le_bytes());
    BlockHash::from_bytes(name)
}

/// Numbers `0..len` with the popularity of Zipf's law: the i-th with weight `1 / (i + 1)^exponent`.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Zipf(Vec<f64>);

impl Zipf {
    pub(in crate::bench) fn new(len: usize, exponent: f64) -> Self {
        let mut sum = 0.0;
        let weights = (1..=len.max(1)).map(|i| {
            sum += (i as f64).powf(-exponent);
            sum
        });
        Self(weights.collect())
    }

    pub(in crate::bench) fn draw(&self, rng: &mut impl Rng) -> usize {
        let all = self.0.last().copied().unwrap_or(1.0);
        let wanted = rng.random::<f64>() * all;
        self.0.partition_point(|sum| *sum <= wanted).min(self.0.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_or_refused() {
        for (bytes, tokens, fits) in [
            (16 << 10, 64, true),
            (64 << 10, 64, true),
            (16 << 20, 64, true),
            (128 << 10, 512, true),
            (17 << 20, 64, false),
            (20_000, 64, false),
            (0, 64, false),
            (64 << 10, 512, false),
        ] {
            match schema(bytes, tokens) {
                Ok(schema) => {
                    assert!(fits, "{bytes} of {tokens} tokens");
                    schema.validate().expect("a store serves it");
                    assert_eq!(schema.layer_block_bytes(), bytes);
                }
                Err(error) => assert!(!fits, "{error}"),
            }
        }
    }

    #[test]
    fn names_differ_and_payloads_repeat() {
        let names: std::collections::HashSet<_> = (0..3)
            .flat_map(|run| (0..10).flat_map(move |context| (0..10).map(move |at| hash(run, context, at))))
            .collect();
        assert_eq!(names.len(), 300);
        let payloads = Payloads::new(16 << 10, 7);
        for name in names {
            let block = payloads.block(name);
            assert_eq!(Checksum::of(&block.payload), block.checksum);
            assert_eq!(payloads.block(name).payload, block.payload);
        }
    }

    #[test]
    fn zipf_favours_the_first() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut counts = [0_u32; 8];
        let zipf = Zipf::new(counts.len(), 1.0);
        for _ in 0..8000 {
            counts[zipf.draw(&mut rng)] += 1;
        }
        // The first of eight has 1/H(8) = 37 % of the draws, the last an eighth of that.
        assert!((2700..3200).contains(&counts[0]), "{counts:?}");
        assert!((270..460).contains(&counts[7]), "{counts:?}");
        let mut even = [0_u32; 4];
        let zipf = Zipf::new(even.len(), 0.0);
        (0..4000).for_each(|_| even[zipf.draw(&mut rng)] += 1);
        assert!(even.iter().all(|count| (850..1150).contains(count)), "{even:?}");
    }
}
