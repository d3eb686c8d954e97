//! Sketches of layer blocks, and how a KV head is attended to through them.

use std::{ops::Range, sync::Arc};

use half::f16;
use kvasir_block::LayerBlockLayout;
use kvasir_index::{Attend, Attended, Basis, SketchFormat, SketchScan, encode_block};

use super::{AttendOptions, Certificate};

/// Directions that a sketch takes.
pub(super) const RANK: usize = 32;
/// Tokens of a block that a sketch takes.
pub(super) const BLOCK_TOKENS_MAX: usize = 256;
/// Share of the keys that are scored exactly if the caller does not say.
const EFFORT: f32 = 0.05;

/// Sketches of one layer block, KV head after KV head; of streaming heads none.
#[derive(Clone, Debug)]
pub(super) struct BlockSketches {
    bytes: Arc<[u8]>,
    heads: Arc<[Range<usize>]>,
}

/// What a search through sketches says beside what was found.
#[derive(Debug, Default)]
pub(super) struct Extra {
    /// Per query head; empty without a certificate.
    pub(super) bounds: Vec<f32>,
    /// Keys that were scored exactly.
    pub(super) rescored: u64,
    /// Bytes of sketches, keys and values.
    pub(super) bytes_read: u64,
    pub(super) escalated: bool,
}

impl BlockSketches {
    /// Of a layer block; `None` if it cannot be sketched in this basis.
    pub(super) fn of(halves: &[f16], layout: &LayerBlockLayout, basis: &Basis, layer: u16) -> Option<Self> {
        let format = SketchFormat::new(layout.head_dim);
        let (mut bytes, mut heads) = (Vec::new(), Vec::with_capacity(layout.kv_heads));
        for kv_head in 0..layout.kv_heads {
            let (start, head) = (bytes.len(), basis.head(layer.into(), kv_head));
            if !head.streaming {
                let (keys, values) = (&halves[layout.keys(kv_head)], &halves[layout.values(kv_head)]);
                encode_block(format, head, keys, values, &mut bytes).ok()?;
                // The means of values are read in place: they must not begin at an odd address.
                bytes.resize(bytes.len().next_multiple_of(8), 0);
            }
            heads.push(start..bytes.len());
        }
        Some(Self {
            bytes: bytes.into(),
            heads: heads.into(),
        })
    }

    /// The sketch for one KV head; empty if it is a streaming one.
    pub(super) fn head(&self, kv_head: usize, format: SketchFormat, keys: usize) -> &[u8] {
        let all = &self.bytes[self.heads[kv_head].clone()];
        &all[..format.bytes(keys).min(all.len())]
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// Share of `keys` to score exactly for the best `k` of them.
pub(super) fn rows_effort(k: usize, keys: usize) -> f32 {
    (2.0 * k as f32 / keys.max(1) as f32).clamp(EFFORT, 1.0)
}

/// Attends as the options say.
pub(super) fn attend(
    scan: &mut SketchScan<'_>,
    target_mass: f32,
    k_max: Option<usize>,
    options: AttendOptions,
) -> (Attended, Extra) {
    let demand = (options.missed_mass_max > 0.0).then_some(options.missed_mass_max);
    let found = scan.attend(Attend {
        target_mass,
        k_max,
        // The whole mass is every key.
        effort: match (target_mass, options.effort) {
            (1.0, _) => 1.0,
            (_, 0.0) => EFFORT,
            (_, effort) => effort,
        },
        tail: options.tail,
        // A demand is checked by the bound, also where the caller does not want to see it.
        certificate: options.certificate != Certificate::None || demand.is_some(),
        missed_mass_max: demand,
    });
    let extra = Extra {
        bounds: found.missed_max,
        rescored: found.keys_scored as u64,
        bytes_read: found.bytes_read,
        escalated: found.escalations > 0,
    };
    let attended = Attended {
        o: found.o,
        lse: found.lse,
        mass: found.mass,
        keys: found.keys,
        value_rows: found.value_rows,
        cut_short: found.cut_short,
    };
    (attended, extra)
}
