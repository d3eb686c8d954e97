//! Sketches of layer blocks, and how a KV head is attended to through them.

use std::ops::Range;

use half::f16;
use kvasir_block::LayerBlockLayout;
use kvasir_index::{Attend, Attended, Basis, Column, SketchAttended, SketchFormat, SketchScan, encode_block};
use kvasir_simd::{GROUP, SEGMENT};

use super::{AttendOptions, Certificate, Form};

/// Directions that a sketch takes.
pub(super) const RANK: usize = 32;
/// Tokens of a block that a sketch takes.
pub(super) const BLOCK_TOKENS_MAX: usize = 256;
/// Share of the keys that may be scored exactly if the caller does not say: what decoding of real text needs for its likelihood to be
/// that of full attention (the table in the worker's README).
pub(super) const EFFORT: f32 = 0.05;

/// What draws begin with, beside the query and the key: an answer is a function of what is asked.
const SEED: u64 = 0;

/// Sketches of a chain's blocks in one layer: per KV head a column; of streaming heads none.
#[derive(Clone, Debug, Default)]
pub(super) struct LayerSketches {
    columns: Vec<Option<Column>>,
    /// Which blocks have sketches.
    made: Vec<bool>,
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
    /// Share of the mass that keys and what the caller attends to cover, per query head; only of attention.
    pub(super) covered: Vec<f32>,
}

impl LayerSketches {
    /// Of `blocks` blocks, of which none has a sketch yet. Room for all is made.
    pub(super) fn none(blocks: usize, layout: &LayerBlockLayout, basis: &Basis, layer: u16) -> Self {
        let column = |kv_head| {
            let mut column = Column::new(SketchFormat::new(layout.head_dim));
            let push = |_| column.push_missing(layout.block_tokens).is_ok();
            (!basis.head(layer.into(), kv_head).streaming && (0..blocks).all(push)).then_some(column)
        };
        Self {
            columns: (0..layout.kv_heads).map(column).collect(),
            made: vec![false; blocks],
        }
    }

    /// Bytes that the sketches of `blocks` blocks take at most.
    pub(super) fn bytes_for(blocks: usize, layout: &LayerBlockLayout) -> u64 {
        let one = Self::bytes_of(layout);
        let columns = SketchFormat::new(layout.head_dim).column_bytes() * layout.kv_heads;
        blocks as u64 * one + if blocks > 0 { columns as u64 } else { 0 }
    }

    fn bytes_of(layout: &LayerBlockLayout) -> u64 {
        let format = SketchFormat::new(layout.head_dim);
        // A group's step, mask and share of a run are less than what a block's header and mean take.
        let groups = layout.block_tokens.div_ceil(16);
        ((format.bytes(layout.block_tokens) + groups * 8) * layout.kv_heads) as u64
    }

    /// Of how many blocks it is.
    pub(super) fn blocks(&self) -> usize {
        self.made.len()
    }

    pub(super) fn has(&self, at: usize) -> bool {
        self.made.get(at).copied().unwrap_or(false)
    }

    /// Takes block `at`'s sketches, as [`encode_layer`] gives them; answers whether they are ones of this layer and basis.
    pub(super) fn set(&mut self, at: usize, sketches: &[u8], layout: &LayerBlockLayout) -> bool {
        let each = SketchFormat::new(layout.head_dim).bytes(layout.block_tokens);
        if sketches.len() != self.columns.iter().flatten().count() * each {
            return false;
        }
        let mut parts = self.columns.iter_mut().flatten().zip(sketches.chunks_exact(each));
        self.made[at] = parts.all(|(column, part)| column.set(at, part).is_ok());
        self.made[at]
    }

    /// Learns from block `at`, which was set, what sketches do not say, where the columns want it.
    pub(super) fn learn(&mut self, at: usize, halves: &[f16], layout: &LayerBlockLayout, basis: &Basis, layer: u16) {
        for (kv_head, column) in self.columns.iter_mut().enumerate() {
            let Some(column) = column.as_mut().filter(|column| column.learns(at)) else {
                continue;
            };
            let (keys, values) = (&halves[layout.keys(kv_head)], &halves[layout.values(kv_head)]);
            // It was sketched in this basis, so it can be.
            let _ = column.learn(basis.head(layer.into(), kv_head), keys, values);
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> u64 {
        self.columns.iter().flatten().map(|column| column.bytes() as u64).sum()
    }

    /// Bytes that clustering adds, at most.
    pub(super) fn clustered_bytes(&self) -> u64 {
        let Some(next) = self.next_segment() else { return 0 };
        let segments = (self.made.len() - next.start) / next.len();
        let each = SEGMENT / GROUP * Column::CLUSTERED_GROUP_BYTES;
        (self.columns.iter().flatten().count() * segments * each) as u64
    }

    /// The blocks of the segment that is to be clustered next; `None` where all are.
    pub(super) fn next_segment(&self) -> Option<Range<usize>> {
        self.columns.iter().flatten().next()?.next_segment()
    }

    /// Clusters the [next segment](Self::next_segment), whose blocks have sketches and these payloads; false if they have not.
    pub(super) fn cluster_next(&mut self, halves: &[&[f16]], layout: &LayerBlockLayout) -> bool {
        let cluster = |(kv_head, column): (usize, &mut Option<Column>)| {
            let Some(column) = column else { return true };
            let values: Vec<_> = halves.iter().map(|halves| &halves[layout.values(kv_head)]).collect();
            column.cluster(&values).is_ok()
        };
        self.columns.iter_mut().enumerate().all(cluster)
    }

    /// Those of a KV head; `None` if it is a streaming one.
    pub(super) fn column(&self, kv_head: usize) -> Option<&Column> {
        self.columns.get(kv_head).and_then(Option::as_ref)
    }
}

/// Sketches of a layer block: of each KV head that is no streaming one, one behind the other. `None` where it cannot be sketched
/// in this basis.
pub(crate) fn encode_layer(halves: &[f16], layout: &LayerBlockLayout, basis: &Basis, layer: u16) -> Option<Vec<u8>> {
    let format = SketchFormat::new(layout.head_dim);
    let mut out = Vec::with_capacity(sketched_bytes(layout, basis, layer));
    for kv_head in 0..layout.kv_heads {
        let head = basis.head(layer.into(), kv_head);
        if !head.streaming {
            let (keys, values) = (&halves[layout.keys(kv_head)], &halves[layout.values(kv_head)]);
            encode_block(format, head, keys, values, &mut out).ok()?;
        }
    }
    Some(out)
}

/// Bytes of what [`encode_layer`] gives.
pub(crate) fn sketched_bytes(layout: &LayerBlockLayout, basis: &Basis, layer: u16) -> usize {
    let heads = (0..layout.kv_heads).filter(|&kv_head| !basis.head(layer.into(), kv_head).streaming);
    heads.count() * SketchFormat::new(layout.head_dim).bytes(layout.block_tokens)
}

/// What is asked of a scan of `keys`.
pub(super) fn wanted(form: Form, keys: usize) -> Attend {
    match form {
        Form::Rows { k } => rows_wanted(k, keys),
        Form::Attend {
            target_mass,
            k_max,
            options,
        } => attend_wanted(target_mass, k_max, options),
    }
}

/// How rows are looked for: candidates for the best `k` of `keys`.
fn rows_wanted(k: usize, keys: usize) -> Attend {
    Attend {
        target_mass: 1.0,
        effort: rows_effort(k, keys),
        ..Attend::default()
    }
}

/// Share of `keys` to score exactly for the best `k` of them.
pub(super) fn rows_effort(k: usize, keys: usize) -> f32 {
    (2.0 * k as f32 / keys.max(1) as f32).clamp(EFFORT, 1.0)
}

/// Share of the keys that may be scored exactly. The whole mass is every key.
fn effort(target_mass: f32, options: AttendOptions) -> f32 {
    match (target_mass, options.effort) {
        (1.0, _) => 1.0,
        (_, 0.0) => EFFORT,
        (_, effort) => effort,
    }
}

fn attend_wanted(target_mass: f32, k_max: Option<usize>, options: AttendOptions) -> Attend {
    let demand = (options.missed_mass_max > 0.0).then_some(options.missed_mass_max);
    Attend {
        target_mass,
        k_max,
        effort: effort(target_mass, options),
        tail: options.tail,
        // A demand is checked by the bound, also where the caller does not want to see it.
        certificate: options.certificate != Certificate::None || demand.is_some(),
        missed_mass_max: demand,
    }
}

/// Attends as the options say. A head whose wanted mass lies in more keys than the effort allows is not looked at further, unless the
/// missed mass is bounded: its tail is estimated. (Looking at four times the keys until the mass was there took three times the
/// keys and twice the time, and what the model said was no nearer to full attention.)
pub(super) fn attend(scan: &mut SketchScan<'_>, wanted: Attend) -> (Attended, Extra) {
    told(scan.attend(wanted))
}

/// Attends to keys that are drawn, as many as may be scored exactly and at most `k_max`: right on average, whatever sketches err by. A
/// target below the whole mass says nothing here: what was not drawn is stood for.
pub(super) fn attend_lifted(
    scan: &mut SketchScan<'_>,
    target_mass: f32,
    k_max: Option<usize>,
    options: AttendOptions,
) -> (Attended, Extra) {
    let keys = scan.keys_scanned() as f64 * f64::from(effort(target_mass, options));
    let mut found = SketchAttended::default();
    scan.attend_lifted(
        (keys.ceil() as usize).min(k_max.unwrap_or(usize::MAX)),
        SEED,
        &mut found,
    );
    told(found)
}

fn told(found: SketchAttended) -> (Attended, Extra) {
    let extra = Extra {
        bounds: found.missed_max,
        rescored: found.keys_scored as u64,
        bytes_read: found.bytes_read,
        escalated: found.escalations > 0,
        covered: found.covered,
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
