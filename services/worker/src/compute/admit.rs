//! From the queue into the batch: what is found in the tiers, and pages for the rest.

use kvasir_block::BlockHash;
use tokio::sync::mpsc;
use tracing::Instrument;

use super::{Command, Compute, SequenceId, Store, Submission};
use crate::{
    config::IndexWanted,
    onboard::{ARRIVALS_MAX, Onboard, StoreHit, Wanted, load, match_prefix},
    retrieval::QuerySamples,
    sequence::{Phase, Sequence},
};

impl Compute {
    pub(super) fn submit(&mut self, submission: Submission) {
        self.next_id += 1;
        let id = SequenceId(self.next_id);
        let block_tokens = self.around.settings.block_tokens;
        let mut sequence = Sequence::new(id, submission, block_tokens, &self.around.tokenizer);
        if let Some(sparse) = self.around.settings.sparse.filter(|_| sequence.request.dense_prefill) {
            // What it computes from there on is not what the names stand for.
            sequence.names_end = sparse.from;
            sequence.unnamed_from = sparse.from;
        }
        if self.around.store.is_some()
            && sequence.wants_retrieval
            && sequence.request.attention.index == IndexWanted::Roar
        {
            let (tokens, bytes_max) = (sequence.request.prompt.len(), self.around.settings.query_sample_bytes);
            let samples = QuerySamples::new(self.link_shape, tokens, bytes_max);
            self.samples.extend(samples.map(|samples| (id, samples)));
        }
        self.look_up(&mut sequence);
        self.waiting.push_back(sequence);
    }

    /// Starts asking the store, where it could add to what the device tier has; else the sequence is ready to be
    /// admitted.
    pub(super) fn look_up(&self, sequence: &mut Sequence) {
        sequence.phase = Phase::Queued(StoreHit { blocks: 0, lease: None });
        let chain = &sequence.chain.hashes()[..sequence.cacheable_blocks(self.around.settings.block_tokens)];
        let Some(store) = &self.around.store else { return };
        let held = self.tier.hit(chain);
        if held == chain.len() || store.session.namespace().is_none() {
            return;
        }
        let asked = (chain.len() - held) * self.around.settings.block_tokens;
        self.around.metrics.store_queries.increment(asked as u64);
        sequence.phase = Phase::Matching;
        let (id, chain) = (sequence.id, chain.to_vec());
        let (session, offload) = (store.session.clone(), store.offload.clone());
        let client = session.client_for(&sequence.request.id);
        let (lease, timeout) = (self.around.settings.lease, self.around.settings.onboard_timeout);
        let handle = self.around.handle.clone();
        let asking = async move {
            let hit = match_prefix(&session, &client, &offload, &chain, lease, timeout).await;
            handle.send(Command::Matched(id, hit)).await;
        };
        let span = tracing::info_span!(parent: &sequence.span, "match");
        store.session.spawn(asking.instrument(span));
    }

    /// Admits from the front while there are places and pages. A sequence that still waits for the store is passed by,
    /// which its deadline bounds; one that waits for pages is not, so that large ones get their turn.
    pub(super) fn admit(&mut self) {
        while self.running.len() < self.around.settings.sequences_max {
            let next = self
                .waiting
                .iter()
                .position(|sequence| matches!(sequence.phase, Phase::Queued(_)));
            match next {
                Some(at) if self.admit_one(at) => {}
                _ => break,
            }
        }
    }

    fn admit_one(&mut self, at: usize) -> bool {
        let block_tokens = self.around.settings.block_tokens;
        let sequence = &self.waiting[at];
        let cacheable = sequence.cacheable_blocks(block_tokens);
        let chain = &sequence.chain.hashes()[..cacheable];
        let hit = self.tier.hit(chain);
        let total = sequence.request.pages(block_tokens);
        let Some((pages, promise)) = self.tier.admit(&chain[..hit], total) else {
            return false;
        };
        let Some(mut sequence) = self.waiting.remove(at) else {
            return false;
        };
        sequence.ticket = None;
        sequence.times.admitted.get_or_insert_with(std::time::Instant::now);
        sequence.pages = pages.into_iter().map(Some).collect();
        sequence.promise = promise;
        sequence.computed = hit * block_tokens;
        sequence.offer_first = hit;
        let phase = std::mem::replace(&mut sequence.phase, Phase::Running);
        if !sequence.is_resumed() {
            sequence.started.cached_device = hit * block_tokens;
            let metrics = &self.around.metrics;
            metrics.prompt_tokens.increment(sequence.request.prompt.len() as u64);
            if !sequence.request.no_cache {
                metrics.prefix_queries.increment(sequence.request.prompt.len() as u64);
                metrics.prefix_hits.increment((hit * block_tokens) as u64);
            }
        }
        if let Phase::Queued(found) = phase {
            self.begin_load(&mut sequence, found, cacheable);
        }
        self.running.push(sequence);
        true
    }

    /// Starts loading what the store holds beyond the device tier.
    fn begin_load(&mut self, sequence: &mut Sequence, found: StoreHit, cacheable: usize) {
        let Some(store) = &self.around.store else { return };
        let first = sequence.pages.len();
        let end = found.blocks.min(cacheable);
        let Some(namespace) = store.session.namespace().filter(|_| first < end) else {
            return;
        };
        let pages: Vec<_> = (first..end).map(|_| self.tier.take(&mut sequence.promise)).collect();
        sequence.pages.extend(pages.iter().copied().map(Some));
        sequence.computed = end * self.around.settings.block_tokens;
        sequence.phase = Phase::Onboarding;
        let wanted = Wanted {
            client: store.session.client_for(&sequence.request.id),
            namespace,
            chain: sequence.chain.hashes()[first..end].to_vec(),
            lease: found.lease,
            timeout: self.around.settings.onboard_timeout,
        };
        let (sender, arrivals) = mpsc::channel(ARRIVALS_MAX);
        let span = tracing::info_span!(parent: &sequence.span, "onboard", blocks = end - first);
        let loading = load(store.session.clone(), wanted, sender, self.around.handle.clone());
        store.session.spawn(loading.instrument(span));
        let layers = self.model.shape().layers;
        self.onboards
            .insert(sequence.id, Onboard::new(first, pages, layers, arrivals));
    }

    /// Fills pages with what has arrived and lets sequences go on whose load is over.
    pub(super) fn pump(&mut self) {
        for onboard in self.onboards.values_mut() {
            onboard.pump(&mut self.pool);
        }
        self.settle_loads();
    }

    /// Ends loads that are over: what is whole gets its name, what is not will be computed.
    pub(super) fn settle_loads(&mut self) {
        let over: Vec<SequenceId> = self
            .onboards
            .iter()
            .filter(|(_, onboard)| onboard.is_over())
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            let (Some(mut onboard), Some(at)) = (self.onboards.remove(&id), self.running_index(id)) else {
                continue;
            };
            let sequence = &mut self.running[at];
            let bytes = onboard.take_bytes();
            let (first, pages) = onboard.loaded();
            let end = first + pages.len();
            for (index, page) in (first..end).zip(pages) {
                let hash = sequence.chain.hashes()[index];
                sequence.pages[index] = Some(self.tier.register(*page, hash, index));
            }
            sequence.bytes_loaded += bytes;
            sequence.phase = Phase::Running;
            let block_tokens = self.around.settings.block_tokens;
            if onboard.is_cut() {
                sequence.computed = end * block_tokens;
            }
            if !sequence.is_resumed() {
                sequence.started.cached_store = pages.len() * block_tokens;
            }
            if let Some(store) = &self.around.store {
                let wanted = &sequence.chain.hashes()[first..first + onboard.wanted()];
                count_load(store, wanted, pages.len(), bytes);
                self.around
                    .metrics
                    .store_hits
                    .increment((pages.len() * block_tokens) as u64);
            }
        }
    }
}

fn count_load(store: &Store, wanted: &[BlockHash], whole: usize, bytes: u64) {
    store.metrics.loaded_bytes.increment(bytes);
    if whole < wanted.len() {
        store.metrics.loads_cut.increment(1);
        // Whatever the reason, the store is not known to hold these any more; pushing them is answered as present if
        // it does.
        store.offload.note_missing(&wanted[whole..]);
    }
}
