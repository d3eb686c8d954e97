//! What is made of blocks so that they are searched faster, and how it lives: made in the background, kept beside the blocks.
//!
//! *Sketches* are made after each put (`sketcher.rs`), and those of open contexts put in *clusters* (`clusterer.rs`). *Built indexes* (`roar`, `wave`) are made when they are asked for
//! (`builder.rs`), over the first blocks of a chain, from query samples where they need them (`samples.rs`), and read when a search
//! first wants them (`library.rs`). All of it is derived: blocks are the truth, and a sketch or an index that is
//! missing, damaged or of another basis is made again, or done without.
//!
//! Invariants:
//! - Nobody waits for the threads here, and they wait for everybody: the lowest priority of the system, and nothing is begun while
//!   callers wait for the store's threads ([`BlockCache::set_busy`]).
//! - What is made is named by what it was made of (`derived.rs`), and lies in the tiers like a block: verified when read, bounded
//!   and reclaimed with the rest.

mod background;
mod builder;
mod built;
mod clusterer;
mod derived;
mod library;
mod samples;
mod sketcher;

use std::sync::Arc;

use kvasir_block::NamespaceId;

#[cfg(test)]
pub(crate) use self::built::IndexName;
use self::{
    background::Busy, builder::Builder, clusterer::Clusterer, derived::Derived, library::Library, samples::Samples,
    sketcher::Sketcher,
};
pub use self::{builder::BuildState, built::BuiltIndex, samples::QuerySamples};
pub(crate) use self::{
    built::HeadIndex,
    library::{Covering, LayerIndex},
};
use crate::{BlockCache, CacheConfig, cache::Shared};

/// All that is made of blocks.
pub(crate) struct Indexes {
    pub(crate) derived: Derived,
    pub(crate) sketcher: Sketcher,
    pub(crate) clusterer: Clusterer,
    pub(crate) samples: Samples,
    pub(crate) loaded: Library,
    pub(crate) builder: Builder,
    busy: Busy,
}

impl Indexes {
    pub(crate) fn new(config: &CacheConfig) -> Self {
        Self {
            derived: Derived::default(),
            sketcher: Sketcher::new(config.sketch_bytes_max, config.sketch_queue_max),
            clusterer: Clusterer::new(config.cluster_queue_max),
            samples: Samples::new(config.query_bytes_max),
            loaded: Library::new(config.index_bytes_max),
            builder: Builder::new(config.build_queue_max),
            busy: Busy::default(),
        }
    }

    pub(crate) fn start(&self, shared: &Arc<Shared>) -> std::io::Result<()> {
        if shared.sketches_ahead() {
            let work = |shared: &Arc<Shared>, key| shared.sketch_ahead(key);
            self.sketcher.queue.start(Arc::downgrade(shared), work)?;
        }
        if shared.clusters() {
            let work = |shared: &Arc<Shared>, job| shared.cluster(&job);
            self.clusterer.queue.start(Arc::downgrade(shared), work)?;
        }
        let work = |shared: &Arc<Shared>, job| shared.build(job);
        self.builder.queue.start(Arc::downgrade(shared), work)
    }

    pub(crate) fn stop(&self) {
        self.sketcher.queue.stop();
        self.clusterer.queue.stop();
        self.builder.queue.stop();
    }
}

impl Shared {
    /// Makes known where things made of a namespace's blocks lie.
    pub(crate) fn open_derived(&self, namespace: NamespaceId) {
        let basis = self.namespaces.basis(namespace).map(|basis| basis.id());
        self.indexes.derived.note(namespace, basis);
        if let Some(object) = &self.object {
            // What other stores built is found here; sketches are made here.
            object.open_namespace(derived::indexes_of(namespace));
        }
    }
}

impl BlockCache {
    /// Says how to find out whether callers wait for threads: work in the background is not begun while they do. Asked often, so
    /// it is to be quick; without it only the system's priorities hold the work back.
    pub fn set_busy(&self, probe: impl Fn() -> bool + Send + Sync + 'static) {
        self.shared.indexes.busy.set(Arc::new(probe));
    }
}
