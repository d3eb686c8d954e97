//! Query samples, and the indexes that are built from them and from blocks.

use bytes::Bytes;
use kvasir_block::{BlockHash, NamespaceId};
use kvasir_proto::{convert, v1};

use crate::{ClientError, StoreClient};

/// An index that the store builds over a context when it is asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuiltIndex {
    /// A graph over keys, drawn by query samples.
    Roar,
    /// Clusters of keys.
    Wave,
}

/// Prefill queries of one layer of one block.
#[derive(Clone, Debug)]
pub struct BlockQueries {
    /// The block whose tokens asked them.
    pub hash: BlockHash,
    /// Layer index from 0.
    pub layer: u16,
    /// Which of its tokens, counted from its first.
    pub tokens: Vec<u16>,
    /// Rotated, little-endian f16, `[tokens, q_heads, head_dim]`.
    pub q: Bytes,
}

/// How an index stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildState {
    /// Not there, and nobody builds it; why, for a person.
    Absent(String),
    /// Waits to be built.
    Queued,
    /// Is being built.
    Building {
        /// Heads done.
        done: u32,
        /// Of so many.
        of: u32,
    },
    /// Serves contexts that begin with its blocks.
    Ready {
        /// Tokens that it covers.
        tokens: u32,
    },
}

impl StoreClient {
    /// Sends query samples for indexes that are drawn by them; answers how many (a token in a layer each) were new. One message: the
    /// store takes about 1 MiB.
    ///
    /// # Errors
    /// `Invalid` naming the field that does not fit the namespace's schema or is not finite; `NotFound` when the namespace must be
    /// opened (again); else as any call.
    pub async fn put_queries(
        &self,
        namespace: NamespaceId,
        q_heads: usize,
        blocks: Vec<BlockQueries>,
    ) -> Result<u32, ClientError> {
        let blocks = blocks.into_iter().map(|block| v1::BlockQueries {
            hash: Bytes::copy_from_slice(block.hash.as_bytes()),
            layer: block.layer.into(),
            tokens: block.tokens.into_iter().map(u32::from).collect(),
            q: block.q,
        });
        let request = v1::PutQueriesRequest {
            namespace: convert::namespace_bytes(namespace),
            q_heads: u32::try_from(q_heads).unwrap_or(u32::MAX),
            blocks: blocks.collect(),
        };
        let name = self.name("put_queries");
        let reply = self.unary(&name, request, |_, request| {
            let mut retrieval = self.retrieval();
            async move { retrieval.put_queries(request).await }
        });
        Ok(reply.await?.new_samples)
    }

    /// Asks for an index over a chain of held blocks; answers how it stands.
    ///
    /// # Errors
    /// `NotFound` naming a block that is not held, `Exhausted` when too many builds wait; else as any call.
    pub async fn build_index(
        &self,
        namespace: NamespaceId,
        chain: &[BlockHash],
        index: BuiltIndex,
    ) -> Result<BuildState, ClientError> {
        self.ask_for_index(namespace, chain, index, false).await
    }

    /// How an index stands.
    ///
    /// # Errors
    /// As any call.
    pub async fn index_state(
        &self,
        namespace: NamespaceId,
        chain: &[BlockHash],
        index: BuiltIndex,
    ) -> Result<BuildState, ClientError> {
        self.ask_for_index(namespace, chain, index, true).await
    }

    async fn ask_for_index(
        &self,
        namespace: NamespaceId,
        chain: &[BlockHash],
        index: BuiltIndex,
        only_ask: bool,
    ) -> Result<BuildState, ClientError> {
        use v1::build_index_reply::State as Wire;
        let request = v1::BuildIndexRequest {
            namespace: convert::namespace_bytes(namespace),
            hashes: convert::hash_bytes(chain),
            index: match index {
                BuiltIndex::Roar => "roar",
                BuiltIndex::Wave => "wave",
            }
            .to_owned(),
            only_ask,
        };
        let name = self.name("build_index");
        let reply = self.unary(&name, request, |_, request| {
            let mut retrieval = self.retrieval();
            async move { retrieval.build_index(request).await }
        });
        let reply = reply.await?;
        match Wire::try_from(reply.state) {
            Ok(Wire::Absent) => Ok(BuildState::Absent(reply.reason)),
            Ok(Wire::Queued) => Ok(BuildState::Queued),
            Ok(Wire::Building) => Ok(BuildState::Building {
                done: reply.heads_done,
                of: reply.heads,
            }),
            Ok(Wire::Ready) => Ok(BuildState::Ready { tokens: reply.tokens }),
            Ok(Wire::Unspecified) | Err(_) => Err(name.broken(format_args!("state {} of an index", reply.state))),
        }
    }
}
