//! Layer blocks on their way to the bucket: open packs that fill, closed packs that wait, packs being written.
//!
//! A pack holds one namespace, in the order in which its blocks came. That is the order in which a worker computed them,
//! and in which another one will want them: neighbours of a chain end up beside each other.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_block::{BlockHash, BlockKey, Checksum, LayerBlockKey, NamespaceId};

use super::format::PACK_RECORDS_MAX;

pub(super) type Record = (LayerBlockKey, Bytes, Checksum);

/// A pack that takes no more.
#[derive(Debug)]
pub(super) struct ClosedPack {
    /// Rises in the order of closing.
    pub(super) id: u64,
    pub(super) namespace: NamespaceId,
    pub(super) records: Vec<Record>,
}

#[derive(Debug)]
struct OpenPack {
    records: Vec<Record>,
    bytes: u64,
    since: Instant,
}

#[derive(Debug)]
pub(super) struct Queue {
    object_bytes: u64,
    open_age_max: Duration,
    open: HashMap<NamespaceId, OpenPack>,
    closed: VecDeque<Arc<ClosedPack>>,
    /// Closed and not settled: waiting or being written.
    unsettled: BTreeMap<u64, usize>,
    payloads: BTreeMap<LayerBlockKey, (Bytes, Checksum)>,
    bytes: u64,
    next_id: u64,
}

impl Queue {
    pub(super) fn new(object_bytes: u64, open_age_max: Duration) -> Self {
        Self {
            object_bytes,
            open_age_max,
            open: HashMap::new(),
            closed: VecDeque::new(),
            unsettled: BTreeMap::new(),
            payloads: BTreeMap::new(),
            bytes: 0,
            next_id: 0,
        }
    }

    pub(super) fn payload(&self, key: LayerBlockKey) -> Option<&(Bytes, Checksum)> {
        self.payloads.get(&key)
    }

    /// Layers of `block` that are on their way, rising.
    pub(super) fn layers(&self, block: &BlockKey) -> impl Iterator<Item = u16> + '_ {
        let layers = self.payloads.range(block.layer(0)..=block.layer(u16::MAX));
        layers.map(|(key, _)| key.layer)
    }

    /// Blocks of `namespace` with a layer on its way, rising, each as often as it has layers here.
    pub(super) fn blocks(&self, namespace: NamespaceId) -> impl Iterator<Item = BlockKey> + '_ {
        let first = namespace.block(BlockHash::from_bytes([0; 32])).layer(0);
        let keys = self.payloads.range(first..).map(|(key, _)| key.block());
        keys.take_while(move |block| block.namespace == namespace)
    }

    /// Payload bytes that are not in the bucket yet.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.payloads.len()
    }

    /// Takes a layer block that is not here yet; answers whether a pack is ready to be written.
    pub(super) fn push(&mut self, record: Record, now: Instant) -> bool {
        let (namespace, payload_bytes) = (record.0.namespace, record.1.len() as u64);
        // A pack is closed before it would grow beyond its size, unless this one record alone does.
        let full =
            |pack: &OpenPack| pack.bytes + payload_bytes > self.object_bytes || pack.records.len() >= PACK_RECORDS_MAX;
        let was_full = self.open.get(&namespace).is_some_and(full);
        if was_full {
            self.close(namespace);
        }
        self.payloads.insert(record.0, (record.1.clone(), record.2));
        self.bytes += payload_bytes;
        let pack = self.open.entry(namespace).or_insert_with(|| OpenPack {
            records: Vec::new(),
            bytes: 0,
            since: now,
        });
        pack.records.push(record);
        pack.bytes += payload_bytes;
        let is_full = pack.bytes >= self.object_bytes;
        if is_full {
            self.close(namespace);
        }
        was_full || is_full
    }

    /// Whether nothing waits to be written or is being written.
    pub(super) fn nothing_closed(&self) -> bool {
        self.unsettled.is_empty()
    }

    /// Closes the largest open pack, to make room; false where none is open.
    pub(super) fn close_largest(&mut self) -> bool {
        let largest = self
            .open
            .iter()
            .max_by_key(|(_, pack)| pack.bytes)
            .map(|(namespace, _)| *namespace);
        largest.is_some_and(|namespace| {
            self.close(namespace);
            true
        })
    }

    /// Closes every open pack; answers the id that a wait should reach, see [`Self::is_settled`].
    pub(super) fn close_all(&mut self) -> u64 {
        for namespace in self.open.keys().copied().collect::<Vec<_>>() {
            self.close(namespace);
        }
        self.next_id
    }

    /// Closes packs that have been open for long; answers when the next one will be.
    pub(super) fn close_aged(&mut self, now: Instant) -> Option<Instant> {
        let age_max = self.open_age_max;
        let aged = |pack: &OpenPack| now.saturating_duration_since(pack.since) >= age_max;
        let namespaces: Vec<_> = self
            .open
            .iter()
            .filter(|(_, pack)| aged(pack))
            .map(|(namespace, _)| *namespace)
            .collect();
        for namespace in namespaces {
            self.close(namespace);
        }
        self.open.values().map(|pack| pack.since + age_max).min()
    }

    /// The next pack to write.
    pub(super) fn pop(&mut self) -> Option<Arc<ClosedPack>> {
        self.closed.pop_front()
    }

    /// Whether every pack closed before `id` is settled.
    pub(super) fn is_settled(&self, id: u64) -> bool {
        self.unsettled.range(..id).next().is_none()
    }

    /// Layer blocks in packs closed before `id` that are not settled.
    pub(super) fn unsettled(&self, id: u64) -> u64 {
        self.unsettled.range(..id).map(|(_, records)| *records as u64).sum()
    }

    /// A pack was written, or given up.
    pub(super) fn settle(&mut self, pack: &ClosedPack) {
        if self.unsettled.remove(&pack.id).is_none() {
            return;
        }
        for (key, payload, _) in &pack.records {
            if self.payloads.remove(key).is_some() {
                self.bytes -= payload.len() as u64;
            }
        }
    }

    fn close(&mut self, namespace: NamespaceId) {
        if let Some(pack) = self.open.remove(&namespace) {
            let id = self.next_id;
            self.next_id += 1;
            self.unsettled.insert(id, pack.records.len());
            self.closed.push_back(Arc::new(ClosedPack {
                id,
                namespace,
                records: pack.records,
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(namespace: u8, i: u8, bytes: usize) -> Record {
        let key = NamespaceId::from_bytes([namespace; 32])
            .block(BlockHash::from_bytes([i; 32]))
            .layer(0);
        let payload = Bytes::from(vec![i; bytes]);
        let checksum = Checksum::of(&payload);
        (key, payload, checksum)
    }

    /// Payload bytes of each record of each pack.
    type Packs = Vec<Vec<usize>>;

    fn shape(queue: &mut Queue) -> Packs {
        let packs = std::iter::from_fn(|| queue.pop());
        packs
            .map(|pack| pack.records.iter().map(|record| record.1.len()).collect())
            .collect()
    }

    #[test]
    fn packs_close_at_their_size_and_age() {
        let now = Instant::now();
        let age = Duration::from_secs(10);
        let table: [(&[usize], u64, Packs); 5] = [
            (&[40, 40], 0, vec![]),
            (&[40, 40], 10, vec![vec![40, 40]]),
            (&[40, 40, 40], 0, vec![vec![40, 40]]),
            (&[60, 40, 1], 0, vec![vec![60, 40]]),
            (&[10, 500, 20], 0, vec![vec![10], vec![500]]),
        ];
        for (sizes, seconds, packs) in table {
            let mut queue = Queue::new(100, age);
            for (i, bytes) in sizes.iter().enumerate() {
                queue.push(record(1, i as u8, *bytes), now);
            }
            let next = queue.close_aged(now + Duration::from_secs(seconds));
            assert_eq!(
                next.is_some(),
                packs.iter().flatten().count() < sizes.len(),
                "{sizes:?}"
            );
            assert_eq!(shape(&mut queue), packs, "{sizes:?} after {seconds} s");
            assert_eq!(queue.bytes(), sizes.iter().sum::<usize>() as u64);
        }
    }

    #[test]
    fn namespaces_do_not_share_a_pack_and_settling_gives_back_all() {
        let mut queue = Queue::new(100, Duration::from_secs(10));
        for i in 0..6 {
            queue.push(record(i % 2, i, 20), Instant::now());
        }
        let target = queue.close_all();
        assert_eq!((queue.unsettled(target), queue.is_settled(target)), (6, false));
        let packs: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(packs.len(), 2);
        for pack in &packs {
            assert!(pack.records.iter().all(|record| record.0.namespace == pack.namespace));
            queue.settle(pack);
            queue.settle(pack);
        }
        assert!(queue.is_settled(target));
        assert_eq!((queue.bytes(), queue.len()), (0, 0));
    }

    #[test]
    fn the_largest_open_pack_makes_room() {
        let mut queue = Queue::new(100, Duration::from_secs(10));
        assert!(!queue.close_largest());
        for (namespace, bytes) in [(1, 20), (2, 60), (3, 30)] {
            queue.push(record(namespace, namespace, bytes), Instant::now());
        }
        assert!(queue.close_largest());
        assert_eq!(shape(&mut queue), [[60]]);
    }
}
