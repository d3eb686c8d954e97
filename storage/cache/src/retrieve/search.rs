//! One scan for one or several queries of a layer, by one or several threads.

mod indexed;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use bytes::{BufMut, BytesMut};
use half::f16;
use kvasir_block::{Dtype, LayerBlockLayout};
use kvasir_index::{Attended, Excluded, FlatScan, Segment, SketchFormat, SketchScan, Streaming};
use parking_lot::{Condvar, Mutex};

use self::indexed::Indexed;
pub(super) use self::indexed::wants_scan;
use super::{
    AttendOptions, Certificate, Context, FLAT, Form, Found, HeadRows, Query, Report, SKETCH, Shortfall,
    blocks::ContextBlocks,
    context::Payload,
    report::{HeadCount, Progress},
    sketches::{self, Extra, LayerSketches, rows_effort},
};
use crate::{cache::Shared, namespace::NamespaceBasis};

/// A search that has its blocks. Threads [work](Self::work) on it, each on one KV head after another; one [waits](Self::wait)
/// for the answers.
#[derive(Debug)]
pub struct Search {
    shared: Arc<Shared>,
    blocks: Arc<ContextBlocks>,
    payloads: Arc<[Option<Payload>]>,
    layout: LayerBlockLayout,
    group: usize,
    scale: f32,
    form: Form,
    /// Where sketches serve: their basis, the layer in it, and the sketches.
    sketched: Option<Sketched>,
    /// Where a built index serves.
    indexed: Option<Indexed>,
    /// Name of the index that serves, and why another than its context was opened with.
    served_by: &'static str,
    served_why: &'static str,
    excluded: Excluded,
    /// Latest deadline of the queries; `None` if one has none.
    deadline: Option<Instant>,
    /// `[kv_heads, queries, group, head_dim]`
    q: Vec<f32>,
    queries: usize,
    /// KV head that the next thread takes.
    next: AtomicUsize,
    heads: Mutex<Heads>,
    changed: Condvar,
}

#[derive(Debug)]
struct Sketched {
    basis: Arc<NamespaceBasis>,
    layer: u16,
    blocks: Arc<LayerSketches>,
}

/// What one thread's scans reuse from head to head.
struct Buffers<'a> {
    flat: FlatScan<'a>,
    sketch: SketchScan<'a>,
}

#[derive(Debug)]
struct Heads {
    found: Vec<Option<Head>>,
    missing: usize,
    panicked: bool,
}

/// What was found for one KV head, for all queries.
#[derive(Debug)]
struct Head {
    scanned: usize,
    late: bool,
    missing: bool,
    /// Of a search through sketches.
    sketch: Option<Extra>,
    /// It attends to sink and window only: nothing was searched.
    streaming: bool,
    found: HeadFound,
}

#[derive(Debug)]
enum HeadFound {
    /// And the share of the searched mass that they hold, per query head.
    Rows(HeadRows, Vec<f32>),
    /// And whether it was more than was asked.
    Attend(Attended, bool),
}

impl Search {
    /// All `queries` are checked and join `first`, which is one of them.
    pub(super) fn begin(shared: &Arc<Shared>, context: &Context, first: &Query<'_>, queries: &[Query<'_>]) -> Self {
        let layout = context.schema().layout();
        let (group, kv_heads) = (context.group(), layout.kv_heads);
        let excluded = Excluded::new(first.excluded);
        let deadlines = queries.iter().map(|query| query.deadline);
        let deadline = deadlines.reduce(|a, b| Some(a?.max(b?))).flatten();
        let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let covering = context.covering(shared).filter(|_| !wants_scan(first.form));
        let index = covering.and_then(|covering| Some((covering, shared.layer_index(covering, first.layer)?)));
        // An index is walked over what is excluded, too.
        let unread = if index.is_some() { &Excluded::none() } else { &excluded };
        let payloads = context.blocks().load(shared, first.layer, unread, &late);
        let indexed = index
            .filter(|(covering, _)| payloads[..covering.blocks].iter().all(Option::is_some))
            .map(|(covering, index)| Indexed::new(covering, index, &layout, first.excluded));
        let sketched = context
            .basis()
            .filter(|_| !wants_exact(first.form))
            .map(|basis| Sketched {
                basis: Arc::clone(basis),
                layer: first.layer,
                blocks: (context.blocks()).sketch(shared, first.layer, &payloads, basis, &late),
            });
        let served_by = match &indexed {
            Some(indexed) => indexed.name,
            None if sketched.is_some() => SKETCH,
            None => FLAT,
        };
        let per_head = group * layout.head_dim;
        let mut q = Vec::with_capacity(kv_heads * queries.len() * per_head);
        for kv_head in 0..kv_heads {
            for query in queries {
                q.extend_from_slice(&query.q[kv_head * per_head..][..per_head]);
            }
        }
        Self {
            shared: Arc::clone(shared),
            blocks: Arc::clone(context.blocks()),
            payloads,
            layout,
            group,
            scale: context.scale(),
            form: first.form,
            sketched,
            indexed,
            served_by,
            served_why: context.reason(served_by, first.form),
            excluded,
            deadline,
            q,
            queries: queries.len(),
            next: AtomicUsize::new(0),
            heads: Mutex::new(Heads {
                found: std::iter::repeat_with(|| None).take(kv_heads).collect(),
                missing: kv_heads,
                panicked: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// KV heads: as many threads can work at once.
    pub fn parts(&self) -> usize {
        self.layout.kv_heads
    }

    /// Takes one KV head after another until none is left to take. Others may still be at work then.
    pub fn work(&self) {
        let halves: Vec<Option<&[f16]>> = self
            .payloads
            .iter()
            .map(|payload| payload.as_ref().map(Payload::halves))
            .collect();
        // Their buffers are used for one head after another.
        let mut buffers = Buffers {
            flat: FlatScan::new(self.layout.head_dim, self.scale),
            sketch: SketchScan::new(SketchFormat::new(self.layout.head_dim), self.scale),
        };
        loop {
            let kv_head = self.next.fetch_add(1, Ordering::Relaxed);
            if kv_head >= self.layout.kv_heads {
                return;
            }
            let mut taken = Taken {
                search: self,
                kv_head,
                found: None,
            };
            taken.found = Some(match self.index_of(kv_head) {
                Some((indexed, index)) => self.indexed_head(kv_head, &halves, indexed, index, &mut buffers),
                None => self.scanned_head(kv_head, &halves, &self.excluded, &mut buffers),
            });
        }
    }

    /// Waits until all KV heads are done; the answers, one per query in their order. They are given once.
    ///
    /// # Panics
    /// If a thread panicked at work.
    pub fn wait(&self) -> Vec<(Found, Report)> {
        let mut heads = self.heads.lock();
        while heads.missing > 0 && !heads.panicked {
            self.changed.wait(&mut heads);
        }
        assert!(!heads.panicked, "search: a thread that worked on it panicked");
        let found: Vec<Head> = heads.found.drain(..).flatten().collect();
        drop(heads);
        self.answers(&found)
    }

    fn scanned_head<'a>(
        &'a self,
        kv_head: usize,
        halves: &[Option<&'a [f16]>],
        excluded: &'a Excluded,
        buffers: &mut Buffers<'a>,
    ) -> Head {
        match &self.sketched {
            Some(sketched) => self.sketched_head(kv_head, halves, sketched, excluded, &mut buffers.sketch),
            None => self.head(kv_head, halves, excluded, &mut buffers.flat),
        }
    }

    fn head<'a>(
        &'a self,
        kv_head: usize,
        halves: &[Option<&'a [f16]>],
        excluded: &Excluded,
        scan: &mut FlatScan<'a>,
    ) -> Head {
        let layout = &self.layout;
        let per_head = self.queries * self.group * layout.head_dim;
        scan.begin(&self.q[kv_head * per_head..][..per_head]);
        let (mut late, mut missing) = (false, false);
        for (at, halves) in halves.iter().enumerate() {
            if self.blocks.is_excluded(at, excluded) {
                continue;
            }
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                late = true;
                break;
            }
            match halves {
                Some(halves) => scan.scan(
                    Segment {
                        keys: &halves[layout.keys(kv_head)],
                        values: &halves[layout.values(kv_head)],
                        position: at * layout.block_tokens,
                    },
                    excluded,
                ),
                None => missing = true,
            }
        }
        let found = match self.form {
            Form::Rows { k } => {
                let rows = scan.rows(k);
                let gathered = gather(rows.positions(), layout.head_dim, |take| scan.each_row(&rows, take));
                HeadFound::Rows(gathered, rows.mass)
            }
            Form::Attend {
                target_mass,
                k_max,
                options,
            } => attend(scan, target_mass, k_max, options),
        };
        Head {
            scanned: scan.keys_scanned(),
            late,
            missing,
            sketch: None,
            streaming: false,
            found,
        }
    }

    /// Whether the caller attends by itself to what a streaming head was found to attend to. Only then may such a head go
    /// unsearched.
    fn keeps_static_set(&self) -> bool {
        let tokens = (self.blocks.len() * self.layout.block_tokens) as u32;
        let kept = [
            0..(Streaming::SINK as u32).min(tokens),
            tokens.saturating_sub(Streaming::WINDOW as u32)..tokens,
        ];
        kept.into_iter()
            .all(|range| self.excluded.searched(range).next().is_none())
    }

    fn sketched_head<'a>(
        &'a self,
        kv_head: usize,
        halves: &[Option<&'a [f16]>],
        sketched: &'a Sketched,
        excluded: &'a Excluded,
        scan: &mut SketchScan<'a>,
    ) -> Head {
        let layout = &self.layout;
        let basis = sketched.basis.basis().head(sketched.layer.into(), kv_head);
        if basis.streaming {
            let mut flat = FlatScan::new(layout.head_dim, self.scale);
            let streaming = self.keeps_static_set();
            let searched = if streaming { &[] } else { halves };
            return Head {
                streaming,
                ..self.head(kv_head, searched, excluded, &mut flat)
            };
        }
        let per_head = self.queries * self.group * layout.head_dim;
        let q = &self.q[kv_head * per_head..][..per_head];
        let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let there = |at: usize| halves[at].filter(|_| sketched.blocks.has(at));
        let wanted = |at: usize| !self.blocks.is_excluded(at, excluded);
        // When it is late what is not there was given up.
        let mut missing = !late && (0..halves.len()).any(|at| there(at).is_none() && wanted(at));
        let segments = (0..halves.len()).map(|at| {
            there(at).map(|halves| Segment {
                keys: &halves[layout.keys(kv_head)],
                values: &halves[layout.values(kv_head)],
                position: at * layout.block_tokens,
            })
        });
        let excluded = std::slice::from_ref(excluded);
        let begun = scan.begin(q, basis);
        missing |= match sketched.blocks.column(kv_head) {
            Some(column) if !late => begun
                .and_then(|()| scan.scan_column(column, segments, excluded))
                .is_err(),
            Some(_) => begun.is_err(),
            None => true,
        };
        let scanned = scan.keys_scanned();
        let (found, extra) = match self.form {
            Form::Rows { k } => {
                let before = scan.cost();
                let rows = scan.rows(k, rows_effort(k, scanned));
                let extra = Extra {
                    rescored: (scan.cost().keys_scored - before.keys_scored) / (self.queries * self.group) as u64,
                    bytes_read: scan.cost().bytes_read,
                    ..Extra::default()
                };
                let gathered = gather(rows.positions(), layout.head_dim, |take| scan.each_row(&rows, take));
                (HeadFound::Rows(gathered, rows.mass), extra)
            }
            Form::Attend {
                target_mass,
                k_max,
                options,
            } => {
                let (attended, extra) = sketches::attend(scan, target_mass, k_max, options);
                let escalated = extra.escalated;
                (HeadFound::Attend(attended, escalated), extra)
            }
        };
        Head {
            scanned,
            late,
            missing,
            sketch: Some(extra),
            streaming: false,
            found,
        }
    }

    fn answers(&self, heads: &[Head]) -> Vec<(Found, Report)> {
        let answers: Vec<_> = (0..self.queries).map(|at| self.answer(at, heads)).collect();
        let counters = &self.shared.counters;
        counters.retrieve_queries.add(self.queries as u64);
        if self.queries > 1 {
            counters.retrieve_joined.add(self.queries as u64);
        }
        for (_, report) in &answers {
            let late = report.shortfall == Some(Shortfall::Deadline);
            counters.retrieve_late.add(u64::from(late));
            counters.retrieve_keys_scanned.add(report.keys_scanned);
            counters.retrieve_bytes.add(report.bytes_read);
        }
        answers
    }

    fn answer(&self, at: usize, heads: &[Head]) -> (Found, Report) {
        let tokens = self.blocks.len() * self.layout.block_tokens;
        let mut progress = Progress::new(&self.layout, tokens, &self.excluded, self.queries);
        let group = at * self.group..(at + 1) * self.group;
        let (mut rows, mut o, mut lse) = (Vec::new(), Vec::new(), Vec::new());
        for head in heads {
            progress.stopped(head.late, head.missing);
            if head.streaming {
                progress.streaming();
            }
            if let Some(extra) = &head.sketch {
                let bounds = extra.bounds.get(group.clone()).unwrap_or_default();
                progress.sketched(extra.rescored, extra.bytes_read, bounds);
            }
            match &head.found {
                HeadFound::Rows(head_rows, mass) => {
                    let positions = head_rows.positions.len();
                    progress.head(HeadCount {
                        scanned: head.scanned,
                        mass,
                        attended: positions * self.group,
                        value_rows: positions,
                    });
                    rows.push(head_rows.clone());
                }
                HeadFound::Attend(found, escalated) => {
                    progress.head(HeadCount {
                        scanned: head.scanned,
                        mass: &found.mass[group.clone()],
                        attended: found.keys[group.clone()].iter().sum(),
                        value_rows: found.value_rows,
                    });
                    progress.cut_short(found.cut_short);
                    progress.escalated(*escalated);
                    let head_dim = self.layout.head_dim;
                    o.extend_from_slice(&found.o[group.start * head_dim..group.end * head_dim]);
                    lse.extend_from_slice(&found.lse[group.clone()]);
                }
            }
        }
        progress.index(self.served_by, self.served_why);
        let found = match self.form {
            Form::Rows { .. } => Found::Rows(rows),
            Form::Attend { options, .. } => {
                if options.certificate != Certificate::None {
                    progress.certify(self.sketched.is_some());
                }
                Found::Attend { o, lse }
            }
        };
        (found, progress.finish())
    }
}

/// A KV head that a thread has taken; says so when it is done, and when its thread panics.
struct Taken<'a> {
    search: &'a Search,
    kv_head: usize,
    found: Option<Head>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut heads = self.search.heads.lock();
        match self.found.take() {
            Some(found) => {
                heads.found[self.kv_head] = Some(found);
                heads.missing -= 1;
            }
            None => heads.panicked = true,
        }
        self.search.changed.notify_all();
    }
}

/// Whether only a scan of every key gives what is asked for.
fn wants_exact(form: Form) -> bool {
    matches!(form, Form::Attend { options, .. } if options.unbiased || options.certificate == Certificate::Deterministic)
}

/// Attends to what is asked for, and to more where that leaves out more than is acceptable.
fn attend(scan: &FlatScan<'_>, target_mass: f32, k_max: Option<usize>, options: AttendOptions) -> HeadFound {
    let found = scan.attend(target_mass, k_max);
    let missed_max = options.missed_mass_max;
    let misses = |found: &Attended| missed_max > 0.0 && found.mass.iter().any(|mass| 1.0 - mass > missed_max);
    if !misses(&found) {
        return HeadFound::Attend(found, false);
    }
    // Every key is scored: the fewest that are enough are known, up to rounding.
    let more = scan.attend((1.0 - missed_max).max(target_mass), None);
    let more = if misses(&more) { scan.attend(1.0, None) } else { more };
    HeadFound::Attend(more, true)
}

/// Copies chosen rows out of their blocks: they travel, the blocks stay.
fn gather(positions: &[u32], head_dim: usize, each_row: impl FnOnce(&mut dyn FnMut(&[f16], &[f16]))) -> HeadRows {
    let bytes = positions.len() * head_dim * Dtype::F16.bytes();
    let (mut keys, mut values) = (BytesMut::with_capacity(bytes), BytesMut::with_capacity(bytes));
    each_row(&mut |key, value| {
        key.iter().for_each(|half| keys.put_u16_le(half.to_bits()));
        value.iter().for_each(|half| values.put_u16_le(half.to_bits()));
    });
    HeadRows {
        positions: positions.to_vec(),
        keys: keys.freeze(),
        values: values.freeze(),
    }
}
