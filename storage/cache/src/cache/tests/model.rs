//! Random operations over memory, disk and bucket, against a model that knows what was put and what is leased.
//!
//! What is checked, whatever the operations were:
//! - bytes of a hit are the right ones, and nothing is hit that was never put;
//! - a leased block is read whole until its lease ends;
//! - a block is said to be available if and only if all its layers are read;
//! - subscribers were told exactly that;
//! - memory and disk keep to their limits;
//! - after a restart exactly what disk and bucket had is there.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    flow::{eventually, tiers},
    reclaim::folder,
    *,
};
use crate::EventKind;

/// Chains of the universe, and blocks of each.
const CHAINS: u32 = 60;
const LENGTH: u32 = 6;
const STEPS: usize = 700;
/// Six segments: a third of the universe.
const DISK_BYTES: u64 = 6 << 16;
const HOUR: Duration = Duration::from_secs(3600);

/// What varies between runs.
#[derive(Clone, Copy)]
struct Shape {
    seed: u64,
    object: bool,
    admission: Admission,
    promote_after_reads: u32,
    host_bytes_max: u64,
}

/// What a run went through: a test that never got there would prove nothing.
#[derive(Debug, Default)]
struct Seen {
    host: u64,
    disk: u64,
    object: u64,
    evicted: u64,
    reclaimed: u64,
    readmitted: u64,
    demoted: u64,
    restarts: u64,
}

struct Run {
    shape: Shape,
    rng: StdRng,
    dir: PathBuf,
    bucket: PathBuf,
    /// `None` only while it is opened again.
    cache: Option<BlockCache>,
    namespace: NamespaceId,
    watch: Subscription,
    /// What subscribers believe.
    told: BTreeSet<BlockHash>,
    put: BTreeSet<(BlockHash, u16)>,
    leases: Vec<(LeaseId, Vec<BlockHash>)>,
    seen: Seen,
}

fn chain_of(chain: u32) -> Vec<BlockHash> {
    (0..LENGTH).map(|i| hash(chain * 100 + i)).collect()
}

fn universe() -> Vec<BlockHash> {
    (0..CHAINS).flat_map(chain_of).collect()
}

impl Run {
    fn new(shape: Shape, dir: &Path, bucket: &Path) -> Self {
        let (cache, namespace, watch) = Self::open(shape, dir, bucket);
        Self {
            shape,
            rng: StdRng::seed_from_u64(shape.seed),
            dir: dir.to_owned(),
            bucket: bucket.to_owned(),
            cache: Some(cache),
            namespace,
            watch,
            told: BTreeSet::new(),
            put: BTreeSet::new(),
            leases: Vec::new(),
            seen: Seen::default(),
        }
    }

    fn open(shape: Shape, dir: &Path, bucket: &Path) -> (BlockCache, NamespaceId, Subscription) {
        let (cache, namespace) = open_with(CacheConfig {
            host_bytes_max: shape.host_bytes_max,
            disk_bytes_max: DISK_BYTES,
            object: shape.object.then(|| folder(bucket)),
            disk_admission: shape.admission,
            promote_after_reads: shape.promote_after_reads,
            prefetch_layers: 1,
            lease_max: HOUR,
            ..config(dir)
        });
        if let Some(object) = &cache.shared.object {
            assert!(object.refresh(namespace, Instant::now() + HOUR));
        }
        let watch = cache.subscribe(Some(namespace)).unwrap();
        (cache, namespace, watch)
    }

    fn cache(&self) -> &BlockCache {
        self.cache.as_ref().unwrap()
    }

    fn key(&self, hash: BlockHash, layer: u16) -> LayerBlockKey {
        self.namespace.block(hash).layer(layer)
    }

    /// A chain; some are asked for far more often than others.
    fn any_chain(&mut self) -> u32 {
        let spread = self.rng.random_range(1..=CHAINS);
        self.rng.random_range(0..spread)
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..40 => self.put_chain(),
            40..60 => self.read_some(),
            60..75 => self.ask(),
            75..83 => self.lease(),
            83..89 => self.release(),
            89..99 => self.cache().flush().unwrap(),
            _ => self.restart(),
        }
        self.leased_are_whole();
        let stats = self.cache().stats();
        assert!(stats.host_bytes <= self.shape.host_bytes_max, "{stats:?}");
        assert!(stats.disk.bytes <= DISK_BYTES, "{stats:?}");
    }

    /// Puts a chain from its head on, often not to its end, sometimes with a hole.
    fn put_chain(&mut self) {
        // What is queued at a time is less than half a segment, so that what must stay always finds room on disk.
        self.cache().flush().unwrap();
        let chain = chain_of(self.any_chain());
        let blocks = self.rng.random_range(1..=chain.len());
        for hash in &chain[..blocks] {
            for layer in 0..LAYERS {
                if self.rng.random_range(0..20) == 0 {
                    continue;
                }
                let outcome = put(self.cache(), self.key(*hash, layer));
                assert_ne!(outcome, PutOutcome::ChecksumMismatch);
                if outcome != PutOutcome::Busy {
                    self.put.insert((*hash, layer));
                }
            }
        }
    }

    /// Reads keys of all kinds in one call.
    fn read_some(&mut self) {
        let universe = universe();
        let count = self.rng.random_range(1..20);
        let keys: Vec<LayerBlockKey> = (0..count)
            .map(|_| {
                let hash = universe[self.rng.random_range(0..universe.len())];
                let layer = self.rng.random_range(0..LAYERS);
                self.key(hash, layer)
            })
            .collect();
        let options = GetOptions {
            lease: self.leases.first().map(|(lease, _)| *lease),
            verify: self.rng.random_bool(0.5),
            ..GetOptions::default()
        };
        self.read(&keys, &options);
    }

    /// Reads, with the judgement that holds always; which were hit.
    fn read(&mut self, keys: &[LayerBlockKey], options: &GetOptions) -> Vec<bool> {
        let mut hits = Vec::new();
        for (key, tier) in keys.iter().zip(tiers(self.cache(), keys, options)) {
            let count = match &tier {
                Ok(Tier::Host) => &mut self.seen.host,
                Ok(Tier::Disk) => &mut self.seen.disk,
                Ok(Tier::Object) => &mut self.seen.object,
                Err(GetOutcome::Miss) => {
                    hits.push(false);
                    continue;
                }
                Err(other) => panic!("{key:?}: {other:?}, and nothing here is slow, wrong or full"),
            };
            *count += 1;
            assert!(self.put.contains(&(key.hash, key.layer)), "{key:?} was never put");
            hits.push(true);
        }
        hits
    }

    fn ask(&mut self) {
        let chain = chain_of(self.any_chain());
        let found = self.cache().match_prefix(self.namespace, &chain, None).unwrap();
        let parts = found.host_blocks + found.disk_blocks + found.object_blocks;
        assert_eq!(found.hit_blocks, parts, "{found:?}");
    }

    fn lease(&mut self) {
        if self.leases.len() == 2 {
            return;
        }
        let chain = chain_of(self.any_chain());
        let found = self.cache().match_prefix(self.namespace, &chain, Some(HOUR)).unwrap();
        if let Some(lease) = found.lease {
            self.leases.push((lease, chain[..found.hit_blocks].to_vec()));
        }
    }

    fn release(&mut self) {
        if !self.leases.is_empty() {
            let (lease, _) = self.leases.remove(0);
            self.cache().release(lease);
        }
    }

    fn leased_are_whole(&mut self) {
        for (_, blocks) in self.leases.clone() {
            let layer = self.rng.random_range(0..LAYERS);
            let keys: Vec<LayerBlockKey> = blocks.iter().map(|hash| self.key(*hash, layer)).collect();
            let hits = self.read(&keys, &GetOptions::default());
            assert!(hits.iter().all(|hit| *hit), "a leased block is gone: {hits:?}");
        }
    }

    /// Waits until nothing moves by itself.
    fn settle(&self) {
        self.cache().flush().unwrap();
        let prefetch = &self.cache().shared.prefetch;
        eventually("what is brought ahead is there", || prefetch.load() == (0, 0));
    }

    /// What is said against what is.
    fn check(&mut self) {
        self.settle();
        let universe = universe();
        for hash in &universe {
            let keys: Vec<LayerBlockKey> = (0..LAYERS).map(|layer| self.key(*hash, layer)).collect();
            // A hit may be worth a place on disk, for which another block goes while this one is read: then it is looked at anew.
            let agrees = (0..3).any(|_| {
                self.settle();
                let said = self.cache().contains_blocks(self.namespace, &[*hash]).unwrap()[0];
                said == self.read(&keys, &GetOptions::default()).iter().all(|hit| *hit)
            });
            assert!(agrees, "{hash:?}");
        }
        self.settle();
        let said = self.cache().contains_blocks(self.namespace, &universe).unwrap();
        let available: BTreeSet<BlockHash> = (universe.iter().zip(said))
            .filter_map(|(hash, said)| said.then_some(*hash))
            .collect();
        self.hear();
        assert_eq!(self.told, available);
        assert_eq!(self.cache().stats().blocks, available.len() as u64);
    }

    fn hear(&mut self) {
        while let Some(EventStep::Event(event)) = self.watch.next(Duration::ZERO) {
            for hash in event.hashes {
                match event.kind {
                    EventKind::Snapshot | EventKind::Stored => assert!(self.told.insert(hash), "said twice"),
                    EventKind::Removed => assert!(self.told.remove(&hash), "never said"),
                    EventKind::SnapshotEnd => {}
                }
            }
        }
    }

    fn restart(&mut self) {
        self.settle();
        self.tally();
        let shared = &self.cache().shared;
        let durable: BTreeSet<(BlockHash, u16)> = (universe().into_iter())
            .flat_map(|hash| (0..LAYERS).map(move |layer| (hash, layer)))
            .filter(|(hash, layer)| shared.is_below(self.namespace.block(*hash).layer(*layer)))
            .collect();
        self.cache.take().unwrap().close().unwrap();
        let (cache, _, watch) = Self::open(self.shape, &self.dir, &self.bucket);
        (self.cache, self.watch) = (Some(cache), watch);
        self.told.clear();
        self.leases.clear();
        for hash in universe() {
            for layer in 0..LAYERS {
                let hit = self.read(&[self.key(hash, layer)], &GetOptions::default())[0];
                assert_eq!(
                    hit,
                    durable.contains(&(hash, layer)),
                    "{hash:?} layer {layer} after a restart"
                );
            }
        }
        self.put = durable;
    }

    /// Takes over the counts of a cache that will be closed.
    fn tally(&mut self) {
        let stats = self.cache().stats();
        self.seen.evicted += stats.host_evicted_blocks;
        self.seen.reclaimed += stats.disk.reclaimed_segments;
        self.seen.readmitted += stats.disk.readmitted_layer_blocks;
        self.seen.demoted += stats.demoted;
        self.seen.restarts += 1;
    }
}

fn run(shape: Shape) -> Seen {
    let (dir, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut run = Run::new(shape, dir.path(), bucket.path());
    for step in 0..STEPS {
        run.step();
        if step % 70 == 0 {
            run.check();
        }
    }
    run.check();
    run.restart();
    run.check();
    run.seen
}

#[test]
fn memory_disk_and_bucket_agree_with_the_model() {
    let shape = Shape {
        seed: 1,
        object: true,
        admission: Admission::Always,
        promote_after_reads: 1,
        host_bytes_max: 400_000,
    };
    let shapes = [
        shape,
        Shape {
            seed: 2,
            promote_after_reads: 2,
            host_bytes_max: 120_000,
            ..shape
        },
        Shape {
            seed: 3,
            admission: Admission::Reuse,
            ..shape
        },
        // Nothing rests in memory.
        Shape {
            seed: 4,
            host_bytes_max: 0,
            ..shape
        },
    ];
    for shape in shapes {
        let seen = run(shape);
        assert!(seen.disk > 0 && seen.object > 0, "{seen:?}");
        assert_eq!(seen.host > 0 && seen.evicted > 0, shape.host_bytes_max > 0, "{seen:?}");
        assert!(
            seen.reclaimed > 0 && seen.readmitted > 0 && seen.demoted > 0,
            "{seen:?}"
        );
        assert!(seen.restarts > 0, "{seen:?}");
    }
}

#[test]
fn memory_and_disk_alone_agree_with_the_model() {
    for (seed, admission) in [(5, Admission::Always), (6, Admission::Reuse)] {
        let seen = run(Shape {
            seed,
            object: false,
            admission,
            promote_after_reads: 1,
            host_bytes_max: 400_000,
        });
        assert!(seen.host > 0 && seen.disk > 0 && seen.evicted > 0, "{seen:?}");
        // By reuse little is written: what must stay is seldom in the way there.
        assert!(seen.reclaimed > 0, "{seen:?}");
        assert!(seen.readmitted > 0 || admission == Admission::Reuse, "{seen:?}");
        assert_eq!((seen.object, seen.demoted), (0, 0));
    }
}
