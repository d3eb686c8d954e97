//! A store as its clients see it.

use std::{future::Future, time::Duration};

use anyhow::{Context, Result};
use kvasir_block::{BlockHash, Checksum, LayerBlockKey};
use kvasir_client::{ClientConfig, ClientError, GetOutcome, LayerBlock, Namespace, PutOutcome, StoreClient};

use crate::{Tally, Tier, corpus::Corpus, data::Read};

/// Runs `work` on a runtime of its own, so that a row is an ordinary function.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start a runtime")?
        .block_on(work)
}

/// A client of one corpus's namespace.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    pub(crate) client: StoreClient,
    pub(crate) namespace: Namespace,
}

/// Layer blocks and what became of them.
pub(crate) type Outcomes<T> = Vec<(LayerBlockKey, T)>;

impl Remote {
    pub(crate) async fn connect(url: &str, corpus: &Corpus) -> Result<Self, ClientError> {
        let config = ClientConfig {
            call_timeout: Duration::from_secs(10),
            jitter_seed: 1,
            ..ClientConfig::to(url)
        };
        Self::with(config, corpus).await
    }

    pub(crate) async fn with(config: ClientConfig, corpus: &Corpus) -> Result<Self, ClientError> {
        let client = StoreClient::new(config)?;
        let namespace = client.open_namespace(&corpus.tenant, &corpus.schema).await?;
        Ok(Self { client, namespace })
    }

    /// Puts all layers of `blocks`; says what became of each.
    pub(crate) async fn put(&self, corpus: &Corpus, blocks: &[BlockHash]) -> Result<Outcomes<PutOutcome>, ClientError> {
        let mut stream = self.client.put_blocks(&self.namespace).await?;
        for key in blocks.iter().flat_map(|&hash| corpus.layers_of(hash)) {
            let payload = corpus.payload(key);
            stream
                .put(LayerBlock {
                    hash: key.hash,
                    layer: key.layer,
                    checksum: Checksum::of(&payload),
                    payload,
                })
                .await?;
        }
        let named = |(hash, layer, outcome)| {
            (
                LayerBlockKey {
                    namespace: corpus.namespace,
                    hash,
                    layer,
                },
                outcome,
            )
        };
        Ok(stream.finish().await?.into_iter().map(named).collect())
    }

    /// Reads all layers of `blocks`, counts what comes, and gives it until the stream ends or breaks.
    pub(crate) async fn read(
        &self,
        tally: &mut Tally,
        corpus: &Corpus,
        blocks: &[BlockHash],
    ) -> (Outcomes<Read>, Option<ClientError>) {
        let mut got = Vec::new();
        let layers = 0..corpus.schema.layers;
        let mut stream = match self
            .client
            .get_blocks(&self.namespace, blocks, layers, None, None)
            .await
        {
            Ok(stream) => stream,
            Err(error) => return (got, Some(error)),
        };
        loop {
            let block = match stream.next().await {
                Ok(Some(block)) => block,
                Ok(None) => return (got, None),
                Err(error) => {
                    tally.shed += 1;
                    return (got, Some(error));
                }
            };
            let key = LayerBlockKey {
                namespace: corpus.namespace,
                hash: block.hash,
                layer: block.layer,
            };
            let read = match (block.outcome, block.payload) {
                (GetOutcome::Hit, Some(payload)) if corpus.is_right(key, &payload) => {
                    tally.hit(Tier::Store);
                    Read::Hit(Tier::Store)
                }
                (GetOutcome::Hit, _) => {
                    tally.wrong(|| format!("{key:?}, over the wire"));
                    Read::Wrong
                }
                (GetOutcome::Corrupt, _) => {
                    tally.corrupt += 1;
                    Read::Corrupt
                }
                (GetOutcome::Miss, _) => {
                    tally.misses += 1;
                    Read::Miss
                }
                _ => {
                    tally.shed += 1;
                    Read::Shed
                }
            };
            got.push((key, read));
        }
    }
}
