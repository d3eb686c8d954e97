//! One scan for one or several queries of a layer, by one or several threads.

mod indexed;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use half::f16;
use kvasir_block::LayerBlockLayout;
use kvasir_index::{Excluded, FlatScan, Parked, SketchFormat, SketchScan};
use parking_lot::{Condvar, Mutex};

use self::indexed::Indexed;
pub(super) use self::indexed::wants_scan;
use super::{
    Certificate, Context, FLAT, Form, Found, Query, Report, SKETCH, Shortfall,
    blocks::ContextBlocks,
    context::Payload,
    head::{Head, HeadFound},
    report::{HeadCount, Progress},
    sketches::LayerSketches,
};
use crate::{CacheError, ErrorKind, cache::Shared, namespace::NamespaceBasis};

/// A search that has its blocks. Threads [work](Self::work) on it, each on one KV head after another; one [waits](Self::wait)
/// for the answers.
#[derive(Debug)]
pub struct Search {
    shared: Arc<Shared>,
    pub(super) purpose: Purpose,
    pub(super) blocks: Arc<ContextBlocks>,
    payloads: Arc<[Option<Payload>]>,
    pub(super) layout: LayerBlockLayout,
    pub(super) group: usize,
    pub(super) scale: f32,
    pub(super) form: Form,
    /// Where sketches serve: their basis, the layer in it, and the sketches.
    pub(super) sketched: Option<Sketched>,
    /// Where a built index serves.
    indexed: Option<Indexed>,
    /// Name of the index that serves, and why another than its context was opened with.
    served_by: &'static str,
    served_why: &'static str,
    pub(super) excluded: Excluded,
    /// Latest deadline of the queries; `None` if one has none.
    deadline: Option<Instant>,
    /// `[kv_heads, queries, group, head_dim]`
    q: Vec<f32>,
    /// `[kv_heads, queries, group]`; empty where the callers do not say.
    local_lse: Vec<f32>,
    pub(super) queries: usize,
    /// KV heads in the order in which they are taken, and which one the next thread takes.
    order: Vec<usize>,
    next: AtomicUsize,
    heads: Mutex<Heads>,
    changed: Condvar,
}

/// What a search is for.
#[derive(Debug)]
pub(super) enum Purpose {
    /// Answers. By KV head what was parked for them; empty where nothing was.
    Answer(Vec<Mutex<Option<Box<Parked>>>>),
    /// Candidates for queries that are still to come.
    Park {
        /// Most bytes that are kept of a KV head.
        head_bytes: usize,
        /// Nobody wants it any more.
        dropped: Arc<AtomicBool>,
    },
}

impl Purpose {
    /// Whether what it is for is of no use any more.
    fn is_gone(&self) -> bool {
        matches!(self, Self::Park { dropped, .. } if dropped.load(Ordering::Relaxed))
    }
}

#[derive(Debug)]
pub(super) struct Sketched {
    pub(super) basis: Arc<NamespaceBasis>,
    pub(super) layer: u16,
    pub(super) blocks: Arc<LayerSketches>,
}

/// What one thread's scans reuse from head to head.
pub(super) struct Buffers<'a> {
    pub(super) flat: FlatScan<'a>,
    pub(super) sketch: SketchScan<'a>,
}

#[derive(Debug)]
struct Heads {
    found: Vec<Option<Head>>,
    missing: usize,
    panicked: bool,
}

impl Search {
    /// All `queries` are checked and join `first`, which is one of them.
    pub(super) fn begin(
        shared: &Arc<Shared>,
        context: &Context,
        first: &Query<'_>,
        queries: &[Query<'_>],
        purpose: Purpose,
    ) -> Self {
        let layout = context.schema().layout();
        let (group, kv_heads) = (context.group(), layout.kv_heads);
        let excluded = Excluded::new(first.excluded);
        let deadlines = queries.iter().map(|query| query.deadline);
        let deadline = deadlines.reduce(|a, b| Some(a?.max(b?))).flatten();
        let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline) || purpose.is_gone();
        let covering = context.covering(shared).filter(|_| !wants_scan(first.form));
        let index = covering.and_then(|covering| Some((covering, shared.layer_index(covering, first.layer)?)));
        // An index is walked over what is excluded, too.
        let unread = if index.is_some() { &Excluded::none() } else { &excluded };
        let payloads = context.blocks().load(shared, first.layer, unread, &late);
        let indexed = index
            .filter(|(covering, _)| payloads[..covering.blocks].iter().all(Option::is_some))
            .map(|(covering, index)| Indexed::new(covering, index, &layout, first.excluded));
        let sketched = context.basis().filter(|_| !wants_exact(first.form)).map(|basis| {
            let blocks = context.blocks();
            let sketches = blocks.sketch(shared, first.layer, &payloads, basis, &late);
            blocks.cluster_later(shared, first.layer, &payloads, &sketches, &excluded, basis);
            Sketched {
                basis: Arc::clone(basis),
                layer: first.layer,
                blocks: sketches,
            }
        });
        let served_by = match &indexed {
            Some(indexed) => indexed.name,
            None if sketched.is_some() => SKETCH,
            None => FLAT,
        };
        let per_head = group * layout.head_dim;
        let mut q = Vec::with_capacity(kv_heads * queries.len() * per_head);
        let mut local_lse = Vec::new();
        for kv_head in 0..kv_heads {
            for query in queries {
                q.extend_from_slice(&query.q[kv_head * per_head..][..per_head]);
                // Of all queries that join or of none.
                let own = query.local_lse.get(kv_head * group..(kv_head + 1) * group);
                local_lse.extend_from_slice(own.unwrap_or_default());
            }
        }
        let order = match purpose {
            Purpose::Park { .. } => context.blocks().usual.by_forecasts(first.layer),
            Purpose::Answer(_) => (0..kv_heads).collect(),
        };
        Self {
            shared: Arc::clone(shared),
            purpose,
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
            local_lse,
            queries: queries.len(),
            order,
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
        self.work_and(&mut || {});
    }

    /// As [`Self::work`], doing `then` after each KV head.
    pub(super) fn work_and(&self, then: &mut dyn FnMut()) {
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
            let Some(&kv_head) = self.order.get(self.next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            let mut taken = Taken {
                search: self,
                kv_head,
                found: None,
            };
            taken.found = Some(match self.index_of(kv_head) {
                Some((indexed, index)) => self.indexed_head(kv_head, &halves, indexed, index, &mut buffers),
                None => self.scanned_head(kv_head, &halves, &self.excluded, &mut buffers),
            });
            drop(taken);
            then();
        }
    }

    /// Waits until all KV heads are done; the answers, one per query in their order. They are given once.
    ///
    /// # Panics
    /// If a thread panicked at work.
    pub fn wait(&self) -> Vec<(Found, Report)> {
        self.answers(&self.finished())
    }

    /// As [`Self::wait`], of a search for one query.
    ///
    /// # Errors
    /// A fault of the cache if there is no answer.
    ///
    /// # Panics
    /// If a thread panicked at work.
    pub fn wait_for_one(&self) -> Result<(Found, Report), CacheError> {
        self.wait().pop().ok_or_else(|| {
            let message = "a search for one query gave no answer: this is a fault of the cache";
            CacheError::new(ErrorKind::Disk, message)
        })
    }

    /// Waits until all KV heads are done, and takes what was found.
    pub(super) fn finished(&self) -> Vec<Head> {
        let mut heads = self.heads.lock();
        while heads.missing > 0 && !heads.panicked {
            self.changed.wait(&mut heads);
        }
        assert!(!heads.panicked, "search: a thread that worked on it panicked");
        heads.found.drain(..).flatten().collect()
    }

    /// Query rows of one KV head, `[queries, group, head_dim]`.
    pub(super) fn queries_of(&self, kv_head: usize) -> &[f32] {
        let per_head = self.queries * self.group * self.layout.head_dim;
        &self.q[kv_head * per_head..][..per_head]
    }

    /// Log-sum-exp of what is attended to elsewhere, of the same rows; none where that is not known.
    pub(super) fn local_lse_of(&self, kv_head: usize) -> Option<&[f32]> {
        let heads = self.queries * self.group;
        self.local_lse.get(kv_head * heads..(kv_head + 1) * heads)
    }

    /// Whether an answer would come too late, or is not wanted any more.
    pub(super) fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline) || self.purpose.is_gone()
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
            progress.ahead(head.ahead);
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
                // Of a search that gives no answers.
                HeadFound::Parked(_) => {}
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
pub(super) fn wants_exact(form: Form) -> bool {
    let Form::Attend { options, .. } = form else {
        return false;
    };
    options.certificate == Certificate::Deterministic || options.unbiased && !wants_lift(form)
}

/// Whether keys drawn by their sketches give what is asked for: no bias, and no bound, which a draw has none of.
pub(super) fn wants_lift(form: Form) -> bool {
    let Form::Attend { options, .. } = form else {
        return false;
    };
    options.unbiased && options.certificate == Certificate::None && options.missed_mass_max == 0.0
}
