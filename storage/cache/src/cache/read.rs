//! The way down through the tiers: host, disk, object; verified at each.
//!
//! A layer block that is not in memory is read by one reader at a time (`flights.rs`). Before each batch the deadline is looked
//! at, and the line before the disk (`gate.rs`): what would come too late is answered so at once. What was read is kept in
//! memory if it is likely to be read again (`Shared::is_worth_promoting`).

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_block::{
    BlockKey, Checksum, LayerBlockKey,
    planted::{Bug, planted},
};
use kvasir_tier::{DiskRead, ObjectRead};

use super::{
    GetOptions, GetOutcome, Shared, Tier,
    flights::{Landed, Lead, Seat},
    gate::{Entry, Pass, Patience},
};

/// Payload bytes of a batch of disk reads, about: what its first reader waits for.
const BATCH_BYTES: u64 = 8 << 20;
/// How long a reader without a deadline waits for the object tier.
const OBJECT_READ_MAX: Duration = Duration::from_secs(30);

impl Shared {
    /// Reads one layer block as [`Self::read_many`] does, without a deadline.
    pub(crate) fn read(&self, key: LayerBlockKey) -> GetOutcome {
        let mut outcomes = self.read_many(&[key], &GetOptions::default());
        outcomes.pop().unwrap_or(GetOutcome::Miss)
    }

    /// Reads and verifies; one outcome per key, in their order.
    pub(crate) fn read_many(&self, keys: &[LayerBlockKey], options: &GetOptions) -> Vec<GetOutcome> {
        let mut reading = Reading {
            shared: self,
            keys,
            options,
            outcomes: vec![GetOutcome::Miss; keys.len()],
            corrupt: HashSet::new(),
        };
        let mut open = reading.look_in_host((0..keys.len()).collect());
        while !open.is_empty() {
            open = reading.look_below(open);
        }
        if let Some(lease) = options.lease {
            self.look_ahead(lease, keys);
        }
        reading.outcomes
    }

    /// Reads a batch from the disk, into the host tier's memory where it will stay there; counted, and its time taken for
    /// estimates.
    pub(super) fn read_disk(
        &self,
        keys: &[LayerBlockKey],
        deadline: Option<Instant>,
        promote: bool,
        pass: Pass<'_>,
    ) -> Vec<DiskRead> {
        let namespace = keys.first().filter(|_| promote).map(|key| key.namespace);
        let mut room = |bytes| self.reserve(namespace?, bytes);
        let reads = self.disk.get_many(keys, &mut room, deadline);
        self.counters.disk_reads.add(keys.len() as u64);
        pass.done();
        reads
    }

    /// Keeps in memory what was read below it, as far as there is room; answers with how many layer blocks were kept. Also tells
    /// of blocks that are no longer whole, since some of `gone` were wrong.
    pub(super) fn promote(&self, found: &[(LayerBlockKey, Bytes, Checksum)], gone: &[BlockKey]) -> usize {
        if found.is_empty() && gone.is_empty() {
            return 0;
        }
        let mut kept = 0;
        let mut state = self.state.lock();
        state.leases.expire(Instant::now());
        for (key, payload, checksum) in found {
            kept += usize::from(self.insert_host(&mut state, *key, payload.clone(), *checksum));
        }
        let mut blocks: Vec<BlockKey> = found.iter().map(|(key, ..)| key.block()).collect();
        blocks.extend_from_slice(gone);
        blocks.dedup();
        for block in blocks {
            self.refresh(&mut state, block, Tier::Host);
        }
        self.counters.promoted.add(kept as u64);
        kept
    }

    pub(super) fn layer_block_bytes(&self, key: LayerBlockKey) -> u64 {
        self.namespaces
            .get(key.namespace)
            .map_or(0, |schema| schema.layer_block_bytes() as u64)
    }

    fn drop_from_host(&self, key: LayerBlockKey) {
        tracing::warn!(?key, "layer block in memory is corrupt, dropping it");
        self.counters.host_corrupt.add(1);
        let mut state = self.state.lock();
        state.host.remove(key);
        self.refresh(&mut state, key.block(), Tier::Host);
    }
}

/// One call's answers on their way.
struct Reading<'a> {
    shared: &'a Shared,
    keys: &'a [LayerBlockKey],
    options: &'a GetOptions,
    outcomes: Vec<GetOutcome>,
    /// Found wrong in a tier, and not yet found right in another.
    corrupt: HashSet<usize>,
}

impl<'a> Reading<'a> {
    /// Answers what is in memory; returns the others.
    fn look_in_host(&mut self, wanted: Vec<usize>) -> Vec<usize> {
        let (mut below, mut unsaved) = (Vec::new(), Vec::new());
        let mut found = Vec::with_capacity(wanted.len());
        {
            let mut state = self.shared.state.lock();
            for at in wanted {
                let key = self.keys[at];
                match state.host.get(key) {
                    Some(slot) => {
                        state.ahead.used(key);
                        let only_here = !state.unsaved.is_empty() && state.unsaved.contains(&key);
                        found.push((at, slot, only_here));
                    }
                    None => below.push(at),
                }
            }
        }
        for (at, (payload, checksum), only_here) in found {
            if self.options.verify && !checksum.verifies(&payload) && !planted(Bug::HostChecksumSkipped) {
                self.shared.drop_from_host(self.keys[at]);
                self.corrupt.insert(at);
                below.push(at);
            } else {
                if only_here {
                    unsaved.push((self.keys[at], payload.clone(), checksum));
                }
                let tier = Tier::Host;
                self.outcomes[at] = GetOutcome::Hit {
                    payload,
                    checksum,
                    tier,
                };
            }
        }
        self.shared.save(unsaved);
        below.sort_unstable();
        below
    }

    /// Answers from disk and object, or with what another reader finds there; returns those to be looked for again, since the
    /// reader that was waited for gave up.
    fn look_below(&mut self, wanted: Vec<usize>) -> Vec<usize> {
        let (held, gone): (Vec<usize>, Vec<usize>) =
            wanted.into_iter().partition(|&at| self.shared.is_below(self.keys[at]));
        self.absent(&gone);
        if held.is_empty() {
            return held;
        }
        if self.deadline().is_some_and(|deadline| Instant::now() >= deadline) {
            self.answer(&held, &GetOutcome::TooLate);
            return Vec::new();
        }
        let (mut leads, mut follows) = (Vec::new(), Vec::new());
        let shared = self.shared;
        for at in held {
            match shared.flights.board(self.keys[at]) {
                Seat::Lead(lead) => leads.push((at, lead)),
                Seat::Follow(flight) => follows.push((at, flight)),
            }
        }
        self.lead(leads);
        let mut again = Vec::new();
        for (at, flight) in follows {
            match flight.wait(self.deadline()) {
                Some(Landed::With(outcome)) => {
                    shared.counters.reads_shared.add(1);
                    if self.options.lease.is_some() {
                        // It may have been read ahead, for this reader.
                        shared.state.lock().ahead.used(self.keys[at]);
                    }
                    self.settle(at, outcome);
                }
                Some(Landed::GaveUp) => again.push(at),
                None => self.outcomes[at] = GetOutcome::TooLate,
            }
        }
        again
    }

    /// Reads what this call leads, in batches.
    fn lead(&mut self, leads: Vec<(usize, Lead<'a>)>) {
        if leads.is_empty() {
            return;
        }
        // Another reader may have landed and promoted between the look into memory and the seat.
        let open: HashSet<usize> = self
            .look_in_host(leads.iter().map(|(at, _)| *at).collect())
            .into_iter()
            .collect();
        let (leads, landed): (Vec<_>, Vec<_>) = leads.into_iter().partition(|(at, _)| open.contains(at));
        for (at, lead) in landed {
            lead.land(self.outcomes[at].clone());
        }
        let keys: Vec<LayerBlockKey> = leads.iter().map(|(_, lead)| lead.key()).collect();
        let worth = self.shared.are_worth_promoting(&keys);
        let mut split = [Vec::new(), Vec::new()];
        for (lead, worth) in leads.into_iter().zip(worth) {
            split[usize::from(worth)].push(lead);
        }
        let [passing, staying] = split;
        self.lead_in_batches(passing, false);
        self.lead_in_batches(staying, true);
    }

    fn lead_in_batches(&mut self, leads: Vec<(usize, Lead<'a>)>, promote: bool) {
        let mut leads = leads.into_iter().peekable();
        while leads.peek().is_some() {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while let Some((_, lead)) = leads.peek()
                && batch.len() < self.shared.disk_gate.reads_max()
                && bytes < BATCH_BYTES
            {
                bytes += self.shared.layer_block_bytes(lead.key());
                batch.extend(leads.next());
            }
            self.lead_batch(batch, bytes, promote);
        }
    }

    fn lead_batch(&mut self, batch: Vec<(usize, Lead<'a>)>, bytes: u64, promote: bool) {
        let shared = self.shared;
        let keys: Vec<LayerBlockKey> = batch.iter().map(|(_, lead)| lead.key()).collect();
        let mut reads = vec![DiskRead::Miss; keys.len()];
        if keys.iter().any(|key| shared.disk.contains(*key)) {
            let patience = Patience {
                deadline: self.deadline(),
                worth: self.worth(&batch),
            };
            match shared.disk_gate.enter(batch.len(), bytes, patience) {
                Entry::In(pass) => reads = shared.read_disk(&keys, self.deadline(), promote, pass),
                refused => {
                    let outcome = if matches!(refused, Entry::Full) {
                        GetOutcome::Busy
                    } else {
                        GetOutcome::TooLate
                    };
                    if matches!(refused, Entry::Estimated) {
                        shared.counters.misses_late_estimated.add(batch.len() as u64);
                    }
                    let places: Vec<usize> = batch.iter().map(|(at, _)| *at).collect();
                    self.answer(&places, &outcome);
                    return;
                }
            }
        }
        let gone: Vec<BlockKey> = (keys.iter().zip(&reads))
            .filter(|(_, read)| matches!(read, DiskRead::Corrupt))
            .map(|(key, _)| key.block())
            .collect();
        let mut found = Vec::new();
        let answers = self.below_disk(&keys, reads);
        for ((at, _), outcome) in batch.iter().zip(answers) {
            if promote && let GetOutcome::Hit { payload, checksum, .. } = &outcome {
                found.push((self.keys[*at], payload.clone(), *checksum));
            }
            self.settle(*at, outcome);
        }
        shared.promote(&found, &gone);
        for (at, lead) in batch {
            match &self.outcomes[at] {
                // Its own deadline: another reader may have more time.
                GetOutcome::TooLate | GetOutcome::Busy => drop(lead),
                outcome => lead.land(outcome.clone()),
            }
        }
    }

    /// What the disk answered, with what the object tier has of the rest.
    fn below_disk(&self, keys: &[LayerBlockKey], reads: Vec<DiskRead>) -> Vec<GetOutcome> {
        let answer = |read| match read {
            DiskRead::Hit { payload, checksum } => GetOutcome::Hit {
                payload,
                checksum,
                tier: Tier::Disk,
            },
            DiskRead::Miss => GetOutcome::Miss,
            DiskRead::Corrupt => GetOutcome::Corrupt,
            DiskRead::TooLate => GetOutcome::TooLate,
        };
        let mut answers: Vec<GetOutcome> = reads.into_iter().map(answer).collect();
        let Some(object) = &self.shared.object else {
            return answers;
        };
        let lacks = |answer: &GetOutcome| matches!(answer, GetOutcome::Miss | GetOutcome::Corrupt);
        let places: Vec<usize> = (0..keys.len())
            .filter(|&i| lacks(&answers[i]) && object.contains(keys[i]))
            .collect();
        if places.is_empty() {
            return answers;
        }
        let wanted: Vec<LayerBlockKey> = places.iter().map(|&i| keys[i]).collect();
        let deadline = self.deadline().unwrap_or_else(|| Instant::now() + OBJECT_READ_MAX);
        for (i, read) in places.into_iter().zip(object.get_many(&wanted, deadline)) {
            answers[i] = match read {
                ObjectRead::Hit { payload, checksum } => GetOutcome::Hit {
                    payload,
                    checksum,
                    tier: Tier::Object,
                },
                // What the disk had was wrong, whatever the bucket has.
                ObjectRead::Miss => answers[i].clone(),
                ObjectRead::Corrupt => GetOutcome::Corrupt,
                ObjectRead::TooLate => GetOutcome::TooLate,
                ObjectRead::Unavailable => GetOutcome::Busy,
            };
        }
        answers
    }

    /// When the caller gives up.
    fn deadline(&self) -> Option<Instant> {
        self.options.deadline.filter(|_| !planted(Bug::DeadlineIgnored))
    }

    /// How long a batch may take until computing its blocks is quicker.
    fn worth(&self, batch: &[(usize, Lead<'_>)]) -> Option<Duration> {
        let (block, (_, first)) = (self.options.recompute?, batch.first()?);
        let layers = self.shared.namespaces.layers(first.key().namespace)?.max(1);
        Some(block.mul_f64(batch.len() as f64 / layers as f64))
    }

    /// An answer; what was found wrong above stays wrong unless it is found right.
    fn settle(&mut self, at: usize, outcome: GetOutcome) {
        self.outcomes[at] = match outcome {
            GetOutcome::Miss if self.corrupt.contains(&at) => GetOutcome::Corrupt,
            outcome => outcome,
        };
    }

    fn absent(&mut self, places: &[usize]) {
        for &at in places {
            self.settle(at, GetOutcome::Miss);
        }
    }

    fn answer(&mut self, places: &[usize], outcome: &GetOutcome) {
        for &at in places {
            self.outcomes[at] = outcome.clone();
        }
    }
}
