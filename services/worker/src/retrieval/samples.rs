//! Query samples: what a request that asks for `roar` leaves the store to draw the index by.
//!
//! While the prompt is computed, the queries of evenly spread tokens are copied, in halves, up to a limit of bytes; once its context is
//! open they are sent, and the index is asked for. All of it is a favour to later requests over the same context: nobody waits for
//! it, and what goes wrong is said in the log.

use std::{collections::BTreeMap, sync::Arc};

use bytes::{BufMut, Bytes, BytesMut};
use half::f16;
use kvasir_block::BlockHash;
use kvasir_client::{BlockQueries, BuiltIndex, ClientError, StoreClient};

use super::LinkShape;
use crate::store_session::StoreSession;

/// Bytes of samples in a message, about; more only where one block's are more.
const MESSAGE_BYTES: usize = 512 << 10;

/// Samples of one prompt.
#[derive(Debug)]
pub(crate) struct QuerySamples {
    shape: LinkShape,
    /// Tokens from one that is taken to the next.
    stride: usize,
    /// Positions that may be taken.
    prompt_tokens: usize,
    /// By layer and position, `[q_heads, head_dim]` as little-endian halves.
    rows: BTreeMap<(usize, usize), Bytes>,
}

impl QuerySamples {
    /// Of a prompt, in at most `bytes_max`; `None` if there is no room for one token in all layers.
    pub(crate) fn new(shape: LinkShape, prompt_tokens: usize, bytes_max: usize) -> Option<Self> {
        let token_bytes = shape.layers * shape.q_heads * shape.head_dim * size_of::<f16>();
        let tokens = bytes_max / token_bytes.max(1);
        (tokens > 0 && prompt_tokens > 0).then(|| Self {
            shape,
            stride: prompt_tokens.div_ceil(tokens),
            prompt_tokens,
            rows: BTreeMap::new(),
        })
    }

    /// Whether a step over these positions has any that is taken.
    pub(crate) fn wants(&self, position: usize, tokens: usize) -> bool {
        self.taken(position, tokens).next().is_some()
    }

    /// Takes from the queries `[tokens, q_heads, head_dim]` of a step in one layer. Those of a step that is computed again replace
    /// the first.
    pub(crate) fn take(&mut self, layer: usize, position: usize, q: &[f32]) {
        let width = self.shape.q_heads * self.shape.head_dim;
        let taken: Vec<usize> = self.taken(position, q.len() / width.max(1)).collect();
        for at in taken {
            let row = &q[(at - position) * width..][..width];
            let mut halves = BytesMut::with_capacity(width * size_of::<f16>());
            row.iter().for_each(|x| halves.put_u16_le(f16::from_f32(*x).to_bits()));
            self.rows.insert((layer, at), halves.freeze());
        }
    }

    fn taken(&self, position: usize, tokens: usize) -> impl Iterator<Item = usize> + use<> {
        let end = (position + tokens).min(self.prompt_tokens);
        (position.next_multiple_of(self.stride)..end).step_by(self.stride)
    }

    /// As messages, for the blocks of `chain`.
    fn messages(&self, chain: &[BlockHash], block_tokens: usize) -> Vec<Vec<BlockQueries>> {
        let mut blocks: Vec<BlockQueries> = Vec::new();
        for ((layer, position), row) in &self.rows {
            let Some(hash) = chain.get(position / block_tokens) else {
                continue;
            };
            let (layer, token) = (*layer as u16, (position % block_tokens) as u16);
            match blocks.last_mut() {
                Some(last) if last.hash == *hash && last.layer == layer => {
                    last.tokens.push(token);
                    last.q = [&last.q[..], &row[..]].concat().into();
                }
                _ => blocks.push(BlockQueries {
                    hash: *hash,
                    layer,
                    tokens: vec![token],
                    q: row.clone(),
                }),
            }
        }
        let mut messages: Vec<Vec<BlockQueries>> = Vec::new();
        let mut bytes = usize::MAX;
        for block in blocks {
            if bytes.saturating_add(block.q.len()) > MESSAGE_BYTES {
                messages.push(Vec::new());
                bytes = 0;
            }
            bytes += block.q.len();
            if let Some(message) = messages.last_mut() {
                message.push(block);
            }
        }
        messages
    }
}

/// What is to be built over a context, and from what.
#[derive(Debug)]
pub(crate) struct Wish {
    pub(crate) index: BuiltIndex,
    pub(crate) samples: Option<QuerySamples>,
    pub(crate) chain: Vec<BlockHash>,
    pub(crate) block_tokens: usize,
}

/// Sends samples and asks for the index.
pub(crate) async fn ask_for_index(wish: Wish, client: StoreClient, session: Arc<StoreSession>) {
    match send(&wish, &client, &session).await {
        Ok(()) => {}
        Err(error) => {
            tracing::warn!(%error, index = ?wish.index, "the store was not asked to build an index");
            session.lost(&error);
        }
    }
}

async fn send(wish: &Wish, client: &StoreClient, session: &StoreSession) -> Result<(), ClientError> {
    let Some(namespace) = session.namespace() else {
        return Ok(());
    };
    if let Some(samples) = &wish.samples {
        for message in samples.messages(&wish.chain, wish.block_tokens) {
            client.put_queries(namespace.id, samples.shape.q_heads, message).await?;
        }
    }
    let state = client.build_index(namespace.id, &wish.chain, wish.index).await?;
    tracing::debug!(?state, index = ?wish.index, blocks = wish.chain.len(), "asked for an index");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: LinkShape = LinkShape {
        layers: 2,
        q_heads: 3,
        kv_heads: 1,
        head_dim: 4,
        softmax_scale: 0.5,
    };

    /// Queries that say whose they are.
    fn queries(layer: usize, positions: std::ops::Range<usize>) -> Vec<f32> {
        let row = |at: usize| (0..12).map(move |i| (layer * 1000 + at * 12 + i) as f32 / 16.0);
        positions.flat_map(row).collect()
    }

    #[test]
    fn tokens_are_spread_over_the_prompt_within_the_bytes() {
        // (prompt, bytes): 48 bytes a token in both layers.
        for (prompt, bytes, expected) in [
            (10, 480, Some((0..10).collect::<Vec<_>>())),
            (10, 479, Some(vec![0, 2, 4, 6, 8])),
            (10, 144, Some(vec![0, 4, 8])),
            (10, 48, Some(vec![0])),
            (10, 47, None),
            (0, 480, None),
        ] {
            let samples = QuerySamples::new(SHAPE, prompt, bytes);
            let taken = samples.map(|samples| samples.taken(0, 100).collect::<Vec<_>>());
            assert_eq!(taken, expected, "{prompt} tokens in {bytes} bytes");
        }
    }

    #[test]
    fn chunks_give_what_one_step_gives_and_every_row_is_its_own() {
        let new = || QuerySamples::new(SHAPE, 20, 48 * 7).expect("room for seven");
        let (mut whole, mut chunks) = (new(), new());
        for layer in 0..2 {
            whole.take(layer, 0, &queries(layer, 0..20));
            for positions in [0..4, 4..5, 5..13, 13..20] {
                assert_eq!(
                    chunks.wants(positions.start, positions.len()),
                    positions.clone().any(|at| at % 3 == 0),
                    "{positions:?}"
                );
                chunks.take(layer, positions.start, &queries(layer, positions));
            }
        }
        assert!(!chunks.wants(20, 5), "what is generated is no prefill");
        let chain: Vec<BlockHash> = (0..4).map(|i| BlockHash::from_bytes([i; 32])).collect();
        let (whole, chunks) = (whole.messages(&chain, 5), chunks.messages(&chain, 5));
        assert_eq!(format!("{whole:?}"), format!("{chunks:?}"));
        let tokens: Vec<_> = whole
            .concat()
            .iter()
            .map(|block| (block.hash.as_bytes()[0], block.layer, block.tokens.clone()))
            .collect();
        let of = |layer: u16| {
            [
                (0, layer, vec![0, 3]),
                (1, layer, vec![1, 4]),
                (2, layer, vec![2]),
                (3, layer, vec![0, 3]),
            ]
        };
        assert_eq!(tokens, [of(0), of(1)].concat());
        let third = &whole.concat()[6];
        let expected: Vec<u8> = queries(1, 12..13)
            .iter()
            .flat_map(|x| f16::from_f32(*x).to_le_bytes())
            .collect();
        assert_eq!((third.hash, &third.q[..]), (chain[2], &expected[..]));
    }
}
