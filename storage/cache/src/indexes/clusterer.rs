//! The thread that clusters layers of open contexts ([`crate::retrieve::ClusterJob`]).

use std::sync::Arc;

use super::background::{Background, Load};
use crate::{
    cache::Shared,
    retrieve::{ClusterEnd, ClusterJob},
};

/// Layers that wait to be clustered.
#[derive(Debug)]
pub(crate) struct Clusterer {
    pub(super) queue: Arc<Background<ClusterJob>>,
}

impl Clusterer {
    pub(super) fn new(queue_max: usize) -> Self {
        Self {
            queue: Arc::new(Background::new("kv-cluster", queue_max)),
        }
    }

    pub(crate) fn load(&self) -> Load {
        self.queue.load()
    }
}

impl Shared {
    pub(crate) fn clusters(&self) -> bool {
        self.config.cluster_queue_max > 0
    }

    /// Queues a layer; false if the queue is full.
    pub(crate) fn cluster_later(&self, job: ClusterJob) -> bool {
        let queued = self.indexes.clusterer.queue.push(job);
        if !queued {
            self.counters.clusters_dropped.add(1);
        }
        queued
    }

    /// Clusters a layer.
    pub(super) fn cluster(&self, job: &ClusterJob) {
        let begun = kvasir_device::thread::cpu_time();
        let goes_on = || self.indexes.clusterer.queue.step_aside(&self.indexes.busy);
        match job.run(self, &goes_on) {
            ClusterEnd::Clustered => self.counters.clustered_layers.add(1),
            ClusterEnd::NoRoom => self.counters.clusters_without_room.add(1),
            ClusterEnd::Dropped | ClusterEnd::Changed | ClusterEnd::Missing => self.counters.clusters_dropped.add(1),
        }
        let used = kvasir_device::thread::cpu_time().saturating_sub(begun);
        self.counters
            .cluster_cpu_micros
            .add(u64::try_from(used.as_micros()).unwrap_or(u64::MAX));
    }
}
