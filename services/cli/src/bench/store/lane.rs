//! A blocking connection under load. By the bulk path blocks are received into memory that was made before; by the local path they
//! are looked at where they lie in the store's memory, and given back. Either sends them from where they lie.

use std::sync::atomic::Ordering;

use anyhow::Result;
use kvasir_block::BlockHash;
use kvasir_client::{
    BulkConnection, ClientConfig, ClientError, DataPath, GetOutcome, LocalConnection, Namespace, PutBlock, PutOutcome,
};
use rand::{Rng, rngs::SmallRng};

use super::{
    DataSet,
    load::{Done, Operation, Shared},
};

/// A connection.
pub(super) enum Lane {
    /// And the memory that it receives into.
    Bulk(BulkConnection, Vec<u8>),
    Local(LocalConnection),
}

impl Lane {
    /// Connects to the store that offered the path when `namespace` was opened, and makes memory for a context of `data` where the
    /// path needs it.
    pub(super) fn new(namespace: &Namespace, config: &ClientConfig, data: &DataSet) -> Result<Self> {
        if config.path == DataPath::Local {
            return Ok(Self::Local(LocalConnection::connect(namespace, config)?));
        }
        let connection = BulkConnection::connect(namespace, config)?;
        // Written once, so that no measurement pays for the system's first touch.
        Ok(Self::Bulk(
            connection,
            vec![0xA5; namespace.layer_block_bytes * data.blocks],
        ))
    }

    /// One request.
    pub(super) fn once(&mut self, shared: &Shared, rng: &mut SmallRng) -> Result<Done> {
        let context = shared.zipf.draw(rng) as u64;
        match shared.operation {
            Operation::Get => self.get(shared, context),
            Operation::Put => self.put(shared),
            Operation::Match => {
                let chain = shared.data.chain(context);
                let matched = match self {
                    Self::Bulk(connection, _) => connection.match_prefix(&shared.namespace, &chain, None),
                    Self::Local(connection) => connection.match_prefix(&shared.namespace, &chain, None),
                };
                Ok(found(matched?.hit_blocks, chain.len()))
            }
            Operation::Exists => {
                let chain = shared.data.chain(context);
                let held = match self {
                    Self::Bulk(connection, _) => connection.exists(&shared.namespace, &chain),
                    Self::Local(connection) => connection.exists(&shared.namespace, &chain),
                }?;
                Ok(found(held.iter().filter(|held| **held).count(), chain.len()))
            }
            Operation::Mix { read_share } => {
                if rng.random::<f64>() < read_share {
                    self.get(shared, context)
                } else {
                    self.put(shared)
                }
            }
        }
    }

    fn get(&mut self, shared: &Shared, context: u64) -> Result<Done> {
        let keys: Vec<_> = shared.data.chain(context).into_iter().map(|hash| (hash, 0)).collect();
        let hits = self.hits(&shared.namespace, &keys)?;
        Ok(moved(shared, hits, keys.len()))
    }

    /// How many of `keys` came; what came by the local path is given back.
    fn hits(&mut self, namespace: &Namespace, keys: &[(BlockHash, u16)]) -> Result<usize, ClientError> {
        let hit = |outcome: GetOutcome| usize::from(outcome == GetOutcome::Hit);
        match self {
            Self::Bulk(connection, memory) => {
                let outcomes = connection.get_into(namespace, keys, memory)?;
                Ok(outcomes.into_iter().map(hit).sum())
            }
            Self::Local(connection) => {
                let got = connection.get(namespace, keys)?;
                Ok(got.into_iter().map(|(outcome, _)| hit(outcome)).sum())
            }
        }
    }

    fn put(&mut self, shared: &Shared) -> Result<Done> {
        let context = shared.next_new.fetch_add(1, Ordering::Relaxed);
        let chain = shared.data.new_chain(context);
        let blocks: Vec<_> = chain.iter().map(|&name| shared.data.payloads.block(name)).collect();
        let puts: Vec<_> = blocks
            .iter()
            .map(|block| PutBlock {
                hash: block.hash,
                layer: block.layer,
                checksum: block.checksum,
                payload: &block.payload,
            })
            .collect();
        let outcomes = match self {
            Self::Bulk(connection, _) => connection.put_from(&shared.namespace, &puts),
            Self::Local(connection) => connection.put_from(&shared.namespace, &puts),
        }?;
        let stored = outcomes
            .iter()
            .filter(|outcome| matches!(outcome, PutOutcome::Stored | PutOutcome::Present))
            .count();
        Ok(moved(shared, stored, puts.len()))
    }
}

/// Of `asked` blocks `held` are there; no bytes travelled.
fn found(held: usize, asked: usize) -> Done {
    Done {
        blocks: held as u64,
        bytes: 0,
        refused: (asked - held) as u64,
    }
}

/// Of `asked` blocks `came` travelled.
fn moved(shared: &Shared, came: usize, asked: usize) -> Done {
    Done {
        blocks: came as u64,
        bytes: (came * shared.namespace.layer_block_bytes) as u64,
        refused: (asked - came) as u64,
    }
}
