//! One step of the batch, and what happens between its layers.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use kvasir_block::BlockHash;
use kvasir_model::{Attention, Logits, PageId, PagePool, StepAborted, StepError, StepHooks, StepOutput, StepSequence};
use kvasir_simd::Partial;
use tokio::runtime::Handle;

use super::{Compute, SequenceId, Settings, Store};
use crate::{
    offload::{Offer, PushStep},
    onboard::Onboard,
    retrieval::{Link, QuerySamples},
    scheduler::{Candidate, Share, Stage, plan},
    sequence::{Next, Phase, Sequence},
    sparse::Blocks,
};

impl Compute {
    /// Computes a step; false when nobody can compute.
    pub(super) fn step(&mut self) -> bool {
        let candidates: Vec<Candidate> = self.running.iter().map(|sequence| self.candidate(sequence)).collect();
        let shares = plan(&candidates, self.around.settings.step_tokens_max);
        if shares.is_empty() {
            return false;
        }
        let begun = Instant::now();
        self.give_pages(&shares);
        let offered = self.offer(&shares);
        let (result, culprit) = self.compute(&shares, &offered);
        match result {
            Ok(output) => {
                self.around.metrics.step.record(begun.elapsed().as_secs_f64());
                self.advance(&shares, &output);
            }
            Err(error) => {
                self.around.metrics.steps_aborted.increment(1);
                self.take_back(&offered);
                self.recover(&shares, culprit, &error);
            }
        }
        true
    }

    fn candidate(&self, sequence: &Sequence) -> Candidate {
        let stage = match sequence.phase {
            Phase::Running => Stage::Ready,
            Phase::Onboarding if self.onboards.get(&sequence.id).is_some_and(Onboard::has_begun) => Stage::Arriving,
            Phase::Onboarding | Phase::Opening | Phase::Matching | Phase::Queued(_) => Stage::Waiting,
        };
        let sparse = self.around.settings.sparse.filter(|_| !sequence.request.dense_prefill);
        Candidate {
            stage,
            remaining: sequence.remaining(),
            grain: sparse.map_or(1, |sparse| sparse.block_tokens),
        }
    }

    fn give_pages(&mut self, shares: &[Share]) {
        for share in shares {
            let sequence = &mut self.running[share.index];
            let needed = (sequence.computed + share.tokens).div_ceil(self.around.settings.block_tokens);
            while sequence.pages.len() < needed {
                let page = self.tier.take(&mut sequence.promise);
                sequence.pages.push(Some(page));
            }
        }
    }

    /// Offers the blocks that this step completes, and with a sequence's first step those that the device tier had,
    /// which the store may never have got.
    fn offer(&mut self, shares: &[Share]) -> Vec<Offered> {
        let Some(store) = &self.around.store else {
            return Vec::new();
        };
        let mut offered = Vec::new();
        let names_sampled = self.model.names_sampled_tokens();
        for share in shares {
            let sequence = &mut self.running[share.index];
            if sequence.request.no_cache || self.links.contains_key(&sequence.id) {
                continue;
            }
            let found = 0..std::mem::take(&mut sequence.offer_first);
            note_unnamed(sequence, share, names_sampled, self.around.settings.sparse);
            let completed = completed_blocks(sequence, share, self.around.settings.block_tokens);
            for index in found.chain(completed) {
                let (hash, page) = (sequence.chain.hashes()[index], sequence.pages[index]);
                if let Some(page) = page
                    && store.offload.offer(hash) == Offer::Accepted
                {
                    sequence.bytes_pushed += store.offload.block_bytes() as u64;
                    let sequence = sequence.id;
                    offered.push(Offered { hash, page, sequence });
                }
            }
        }
        offered
    }

    /// Gives up what was offered for a step that was given up: the step that follows offers it again.
    fn take_back(&mut self, offered: &[Offered]) {
        let Some(store) = &self.around.store else { return };
        for block in offered {
            store.offload.abandon(block.hash);
            if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == block.sequence) {
                sequence.bytes_pushed -= store.offload.block_bytes() as u64;
            }
        }
    }

    fn compute(&mut self, shares: &[Share], offered: &[Offered]) -> (Result<StepOutput, StepError>, Option<Culprit>) {
        let logits: Vec<Logits> = shares
            .iter()
            .map(|share| {
                let sequence = &mut self.running[share.index];
                match share.tokens == sequence.remaining() {
                    true => sequence.wants(),
                    false => Logits::None,
                }
            })
            .collect();
        let batch: Vec<StepSequence<'_>> = shares
            .iter()
            .zip(logits)
            .map(|(share, logits)| {
                step_sequence(
                    &self.running[share.index],
                    share,
                    logits,
                    &self.links,
                    self.around.settings.sparse,
                )
            })
            .collect();
        let ids: Vec<SequenceId> = shares.iter().map(|share| self.running[share.index].id).collect();
        // The plan puts a loading sequence into a batch of its own.
        let loading = ids.iter().find(|id| self.onboards.contains_key(id)).copied();
        let positions = shares.iter().map(|share| self.running[share.index].computed);
        let mut hooks = Hooks {
            ids: &ids,
            spans: positions.zip(shares.iter().map(|share| share.tokens)).collect(),
            loading,
            wanted: offered.iter().map(|block| block.page).collect(),
            onboards: &mut self.onboards,
            links: &mut self.links,
            samples: &mut self.samples,
            offered,
            store: self.around.store.as_ref(),
            settings: self.around.settings,
            runtime: &self.around.runtime,
            layer: 0,
            culprit: None,
        };
        let result = self.model.step(&batch, &mut self.pool, &mut hooks);
        (result, hooks.culprit)
    }

    /// After a step: names what is whole, chooses tokens, ends what is at its end.
    fn advance(&mut self, shares: &[Share], output: &StepOutput) {
        self.settle_loads();
        let names_sampled = self.model.names_sampled_tokens();
        let mut ended = Vec::new();
        let mut to_open = Vec::new();
        for (share, (logits, drawn)) in shares.iter().zip(output.rows.iter().zip(&output.drawn)) {
            let block_tokens = self.around.settings.block_tokens;
            let sequence = &mut self.running[share.index];
            if !sequence.request.no_cache && !self.links.contains_key(&sequence.id) {
                note_unnamed(sequence, share, names_sampled, self.around.settings.sparse);
                for index in completed_blocks(sequence, share, block_tokens) {
                    let hash = sequence.chain.hashes()[index];
                    sequence.pages[index] = sequence.pages[index].map(|page| self.tier.register(page, hash, index));
                }
            }
            sequence.computed += share.tokens;
            sequence.tell_started();
            if sequence.remaining() > 0 {
                continue;
            }
            let before = sequence.times;
            let next = drawn.map_or(Next::Logits(logits), Next::Token);
            let reason = sequence.choose(next, self.around.tokenizer.stops());
            let metrics = &self.around.metrics;
            metrics.generation_tokens.increment(1);
            let now = sequence.times.last_token.unwrap_or(before.submitted);
            match before.last_token {
                Some(last) => metrics.inter_token.record((now - last).as_secs_f64()),
                None => metrics
                    .time_to_first_token
                    .record((now - before.submitted).as_secs_f64()),
            }
            match reason {
                Some(reason) => ended.push((sequence.id, reason)),
                None if sequence.wants_retrieval => to_open.push(share.index),
                None => {}
            }
        }
        // Indices hold until sequences are taken out.
        to_open.into_iter().for_each(|at| self.open_context(at));
        for (id, reason) in ended {
            self.finish(id, reason);
        }
    }

    /// After a step that was given up: nothing it computed is used. The one who is to blame changes its ways, everyone
    /// else takes part in the next step as if this one had not been.
    fn recover(&mut self, shares: &[Share], culprit: Option<Culprit>, error: &StepError) {
        match culprit {
            Some(Culprit::Load(id, why)) => {
                if let Some(at) = self.running_index(id) {
                    tracing::warn!(parent: &self.running[at].span, why, "loading came to an end early, computing the rest");
                }
                self.settle_loads();
            }
            Some(Culprit::Retrieval(id, why)) => self.fall_back(id, why),
            None => {
                tracing::error!(%error, "a step failed, ending its requests");
                let ids: Vec<SequenceId> = shares.iter().map(|share| self.running[share.index].id).collect();
                for id in ids {
                    self.fail(id, &format!("a step failed: {error}"));
                }
            }
        }
    }

    /// Offers blocks that were dropped or lost, straight from their pages, all layers at once.
    pub(super) fn offer_again(&mut self, id: SequenceId, blocks: &[usize]) {
        let (Some(store), Some(at)) = (&self.around.store, self.running_index(id)) else {
            return;
        };
        let sequence = &mut self.running[at];
        let mut step = PushStep::new(&store.offload);
        for index in blocks {
            let hash = sequence.chain.hashes().get(*index).copied();
            let page = sequence.pages.get(*index).copied().flatten();
            let (Some(hash), Some(page)) = (hash, page) else {
                continue;
            };
            if step.offer(hash, page) == Offer::Accepted {
                sequence.bytes_pushed += store.offload.block_bytes() as u64;
            }
        }
        if let Err(error) = self.model.send_pages(&mut self.pool, &mut step) {
            tracing::error!(%error, "pages could not be sent, their blocks are not pushed");
        }
    }
}

/// Notes that blocks from the token on that is sampled from get no name, where the device computes it otherwise; and neither do
/// those from the first on of which the step computes a part alone, where only whole ones are computed as their name says.
fn note_unnamed(sequence: &mut Sequence, share: &Share, names_sampled: bool, sparse: Option<Blocks>) {
    if let Some(sparse) = sparse
        && let Some(from) = sparse.unnamed_from(sequence.computed, share.tokens)
    {
        sequence.unnamed_from = sequence.unnamed_from.min(from);
    }
    if !names_sampled && share.tokens == sequence.remaining() {
        let sampled = sequence.computed + share.tokens - 1;
        sequence.unnamed_from = sequence.unnamed_from.min(sampled);
    }
}

/// Indices of blocks that the step completes and that get a name.
fn completed_blocks(sequence: &Sequence, share: &Share, block_tokens: usize) -> std::ops::Range<usize> {
    let end = (sequence.computed + share.tokens).min(sequence.unnamed_from);
    sequence.computed / block_tokens..end / block_tokens
}

fn step_sequence<'a>(
    sequence: &'a Sequence,
    share: &Share,
    logits: Logits,
    links: &HashMap<SequenceId, Link>,
    sparse: Option<Blocks>,
) -> StepSequence<'a> {
    let position = sequence.computed;
    let sparse = sparse.filter(|_| !sequence.request.dense_prefill);
    let attention = match links.get(&sequence.id) {
        Some(link) => Attention::Local(link.split().local(position)),
        None if sparse.is_some_and(|sparse| sparse.any(position, share.tokens)) => Attention::Sparse,
        None => Attention::Full,
    };
    StepSequence {
        tokens: &sequence.tokens[position..position + share.tokens],
        position,
        pages: &sequence.pages,
        attention,
        logits,
    }
}

/// A whole block that is pushed layer by layer.
#[derive(Clone, Copy, Debug)]
struct Offered {
    hash: BlockHash,
    page: PageId,
    sequence: SequenceId,
}

/// Who made a step fail.
#[derive(Debug)]
enum Culprit {
    Load(SequenceId, String),
    Retrieval(SequenceId, String),
}

/// What the worker does between the layers of a step.
struct Hooks<'a> {
    /// By index in the batch.
    ids: &'a [SequenceId],
    /// First position and number of tokens of each.
    spans: Vec<(usize, usize)>,
    /// The sequence of the batch whose prefix is still on its way.
    loading: Option<SequenceId>,
    /// Pages of what is offered.
    wanted: Vec<PageId>,
    onboards: &'a mut HashMap<SequenceId, Onboard>,
    links: &'a mut HashMap<SequenceId, Link>,
    samples: &'a mut HashMap<SequenceId, QuerySamples>,
    offered: &'a [Offered],
    store: Option<&'a Store>,
    settings: Settings,
    runtime: &'a Handle,
    /// The layer at work.
    layer: usize,
    culprit: Option<Culprit>,
}

impl Hooks<'_> {
    /// The link of a sequence of the batch, for `act`; what goes wrong is its sequence's fault.
    fn with_link<T>(
        &mut self,
        sequence: usize,
        act: impl FnOnce(&mut Link, &Settings) -> Result<T, String>,
    ) -> Result<T, StepAborted> {
        let id = self.ids[sequence];
        let result = match self.links.get_mut(&id) {
            Some(link) => act(link, &self.settings),
            None => Err("the sequence has no retrieval stream".to_owned()),
        };
        result.map_err(|why| {
            self.culprit = Some(Culprit::Retrieval(id, why.clone()));
            StepAborted(why)
        })
    }
}

impl StepHooks for Hooks<'_> {
    fn before_layer(&mut self, layer: usize, pool: &mut PagePool) -> Result<(), StepAborted> {
        self.layer = layer;
        for onboard in self.onboards.values_mut() {
            onboard.pump(pool);
        }
        let Some((id, onboard)) = self.loading.and_then(|id| Some((id, self.onboards.get_mut(&id)?))) else {
            return Ok(());
        };
        onboard
            .wait(layer, pool, self.settings.onboard_timeout, self.runtime)
            .map_err(|cut| {
                self.culprit = Some(Culprit::Load(id, cut.0.clone()));
                StepAborted(cut.0)
            })
    }

    fn wanted_pages(&self) -> &[PageId] {
        &self.wanted
    }

    fn after_layer(&mut self, layer: usize, pool: &PagePool) {
        if let Some(store) = self.store {
            for block in self.offered {
                store.offload.push_page(pool, layer, block.hash, block.page);
            }
        }
    }

    fn waited_for_room(&mut self, time: Duration) {
        if let Some(store) = self.store {
            store.offload.waited(time);
        }
    }

    fn remote_begin(&mut self, layer: usize, sequence: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.with_link(sequence, |link, settings| {
            link.begin(layer, q, settings.retrieval_timeout)
        })
    }

    fn wants_queries(&self, sequence: usize) -> bool {
        let (position, tokens) = self.spans[sequence];
        let samples = self.samples.get(&self.ids[sequence]);
        samples.is_some_and(|samples| samples.wants(position, tokens))
    }

    fn queries(&mut self, layer: usize, sequence: usize, q: &[f32]) -> Result<(), StepAborted> {
        if let Some(samples) = self.samples.get_mut(&self.ids[sequence]) {
            samples.take(layer, self.spans[sequence].0, q);
        }
        Ok(())
    }

    fn wants_predicted(&self, sequence: usize) -> bool {
        let link = self.links.get(&self.ids[sequence]);
        link.is_some_and(|link| link.wants_hint(self.layer + 1))
    }

    fn predicted(&mut self, layer: usize, sequence: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.with_link(sequence, |link, _| link.hint(layer, q))
    }

    fn attended_locally(&mut self, layer: usize, sequence: usize, lse: &[f32]) {
        if let Some(link) = self.links.get_mut(&self.ids[sequence]) {
            link.attended(layer, lse);
        }
    }

    fn remote_finish(&mut self, _layer: usize, sequence: usize) -> Result<Option<Partial>, StepAborted> {
        self.with_link(sequence, |link, settings| {
            link.finish(settings.retrieval_timeout).map(Some)
        })
    }
}
