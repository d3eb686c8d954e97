//! From the batch out of it: the last word, a caller that left, and the change into retrieval and out of it.

use std::sync::Arc;

use kvasir_client::BuiltIndex;
use tracing::Instrument;

use super::{Command, Compute, SequenceId};
use crate::{
    config::{AttentionMode, IndexWanted},
    outbox::Failure,
    report::Reason,
    retrieval::{
        BulkWire, Link, LinkAround, LinkPlan, OpenStream, Opening, ReplyShape, Split, StoreWire, Wire, Wish,
        ask_for_index, open, rows_within,
    },
    sequence::{Phase, Sequence},
};

/// The index of this name, if it is one that is built.
const fn built(index: IndexWanted) -> Option<BuiltIndex> {
    match index {
        IndexWanted::Best | IndexWanted::Flat | IndexWanted::Sketch => None,
        IndexWanted::Roar => Some(BuiltIndex::Roar),
        IndexWanted::Wave => Some(BuiltIndex::Wave),
    }
}

impl Compute {
    /// Drops sequences nobody reads; their pages are free for the next step.
    pub(super) fn leave_abandoned(&mut self) {
        let samples = &mut self.samples;
        self.waiting.retain(|sequence| {
            let stays = !sequence.is_abandoned();
            if !stays {
                samples.remove(&sequence.id);
            }
            stays
        });
        let abandoned: Vec<SequenceId> = self
            .running
            .iter()
            .filter(|sequence| sequence.is_abandoned())
            .map(|sequence| sequence.id)
            .collect();
        for id in abandoned {
            if let Some(sequence) = self.take_out(id) {
                tracing::info!(parent: &sequence.span, "the caller left, cancelled");
                self.around.metrics.aborted.increment(1);
            }
        }
    }

    /// Ends a sequence with its result.
    pub(super) fn finish(&mut self, id: SequenceId, reason: Reason) {
        let Some(sequence) = self.take_out(id) else { return };
        let (span, submitted) = (sequence.span.clone(), sequence.times.submitted);
        let finished = sequence.finish(reason);
        let report = &finished.report;
        let seconds = (
            report.queued.as_secs_f64(),
            report.prefill.as_secs_f64(),
            report.decode.as_secs_f64(),
        );
        self.around
            .metrics
            .finished(reason, seconds, submitted.elapsed().as_secs_f64());
        tracing::info!(
            parent: &span,
            reason = reason.name(),
            prompt_tokens = finished.started.prompt_tokens,
            cached_device = finished.started.cached_device,
            cached_store = finished.started.cached_store,
            completion_tokens = finished.completion_tokens,
            mode = report.mode.name(),
            fell_back = report.fallback.is_some(),
            queue_ms = report.queued.as_millis() as u64,
            prefill_ms = report.prefill.as_millis() as u64,
            decode_ms = report.decode.as_millis() as u64,
            "finished"
        );
    }

    /// Ends a sequence that cannot go on.
    pub(super) fn fail(&mut self, id: SequenceId, why: &str) {
        if let Some(sequence) = self.take_out(id) {
            sequence.fail(Failure::Internal(why.to_owned()));
        }
    }

    /// Takes a running sequence out of the batch and gives back all it holds.
    fn take_out(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.running.remove(self.running_index(id)?);
        self.onboards.remove(&id);
        self.samples.remove(&id);
        if let Some(link) = self.links.remove(&id) {
            sequence.tally = link.into_tally();
        }
        self.tier
            .release(std::mem::take(&mut sequence.pages).into_iter().flatten());
        self.tier.touch(sequence.chain.hashes());
        self.tier.settle(std::mem::take(&mut sequence.promise));
        Some(sequence)
    }

    /// After the first token of a sequence that asked for retrieval: opens its context, unless there is nothing to
    /// retrieve from.
    pub(super) fn open_context(&mut self, at: usize) {
        let settings = self.around.settings;
        let sequence = &mut self.running[at];
        sequence.wants_retrieval = false;
        let mut attention = sequence.request.attention;
        let mut prompt_tokens = sequence.request.prompt.len();
        if !self.model.names_sampled_tokens() {
            // The block of the prompt's last token has no name there, and attention is to whole pages.
            prompt_tokens -= 1;
            attention.sink = attention.sink.next_multiple_of(settings.block_tokens);
            attention.window = attention.window.next_multiple_of(settings.block_tokens);
        }
        // What has no name cannot be retrieved, and stays here.
        prompt_tokens = prompt_tokens.min(sequence.unnamed_from);
        let Some(split) = Split::new(prompt_tokens, settings.block_tokens, &attention) else {
            return;
        };
        let id = sequence.id;
        let Some(store) = self.around.store.clone() else {
            return self.give_up_retrieval(id, "no store is configured (worker.store_url)".to_owned());
        };
        let shape = self.link_shape;
        if attention.mode == AttentionMode::Auto {
            attention.mode = store.experience.choose(ReplyShape {
                q_heads: shape.q_heads,
                head_dim: shape.head_dim,
                k: attention.k as usize,
            });
            sequence.request.attention.mode = attention.mode;
        }
        let row_cache_rows = match attention.mode {
            AttentionMode::Rows => {
                rows_within(settings.row_cache_bytes, shape.layers, shape.kv_heads, shape.head_dim).min(split.context)
            }
            _ => 0,
        };
        sequence.phase = Phase::Opening;
        let opening = Opening {
            client: store.session.client_for(&sequence.request.id),
            session: Arc::clone(&store.session),
            offload: store.offload,
            chain: sequence.chain.hashes()[..split.context_blocks()].to_vec(),
            q_heads: shape.q_heads,
            softmax_scale: shape.softmax_scale,
            index: attention.index,
            row_cache_rows,
            timeout: settings.context_timeout,
            sequence: id,
            compute: self.around.handle.clone(),
        };
        let plan = LinkPlan {
            split,
            attention,
            shape,
            hint_from: settings.hint_from_layer,
            row_cache_rows,
        };
        let around = LinkAround {
            metrics: store.metrics,
            experience: store.experience,
        };
        let wish = built(attention.index).map(|index| Wish {
            index,
            samples: self.samples.remove(&id),
            chain: opening.chain.clone(),
            block_tokens: settings.block_tokens,
        });
        let runtime = self.around.runtime.clone();
        let task = async move {
            let opened = open(&opening).await.map(|stream| {
                let opened = stream.opened().clone();
                let session = Arc::clone(&opening.session);
                let wire: Box<dyn Wire> = match stream {
                    OpenStream::Bulk(stream) => Box::new(BulkWire::new(stream, session)),
                    OpenStream::Grpc(stream) => Box::new(StoreWire::new(stream, session, runtime)),
                };
                Box::new(Link::new(wire, &opened, &plan, around))
            });
            let is_held = opened.is_ok();
            opening.compute.send(Command::Opened(id, opened)).await;
            if let Some(wish) = wish.filter(|_| is_held) {
                ask_for_index(wish, opening.client, opening.session).await;
            }
        };
        let span = tracing::info_span!(parent: &sequence.span, "retrieve", mode = attention.mode.name());
        store.session.spawn(task.instrument(span));
    }

    /// The context is open: lets its middle go.
    pub(super) fn begin_retrieval(&mut self, id: SequenceId, link: Link) {
        // The sequence may have left meanwhile; dropping the link ends its task.
        let Some(at) = self.running_index(id) else { return };
        let sequence = &mut self.running[at];
        let remote = link.split().remote_blocks();
        // Cached pages stay as long as their place is not needed: a fall-back may find them again.
        self.tier
            .release(sequence.pages[remote].iter_mut().filter_map(Option::take));
        sequence.phase = Phase::Running;
        self.links.insert(id, link);
    }

    /// The context was not opened: the sequence goes on over its own pages, which it still has.
    pub(super) fn give_up_retrieval(&mut self, id: SequenceId, why: String) {
        let Some(at) = self.running_index(id) else { return };
        let sequence = &mut self.running[at];
        self.around.metrics.fallbacks.increment(1);
        tracing::warn!(parent: &sequence.span, why, "retrieval was not begun, going on with full attention");
        sequence.fallback = Some(why);
        sequence.phase = Phase::Running;
    }

    /// Retrieval failed in mid-decode. The sequence gives back everything and stands first in the queue: what the device
    /// tier still has it finds again, the store may bring more, the rest is computed, the tokens it has said included,
    /// whose KV was that of retrieval attention. It holds nothing while it waits, so it can wait for pages without
    /// anyone waiting for it.
    pub(super) fn fall_back(&mut self, id: SequenceId, why: String) {
        let Some(mut sequence) = self.take_out(id) else { return };
        self.around.metrics.fallbacks.increment(1);
        tracing::warn!(parent: &sequence.span, why, "retrieval failed, going on with full attention");
        sequence.fallback = Some(why);
        sequence.computed = 0;
        sequence.unnamed_from = sequence.names_end;
        self.look_up(&mut sequence);
        self.waiting.push_front(sequence);
    }
}
