//! `PutQueries` and `BuildIndex`: what indexes are built from, and that they are built.

use half::f16;
use kvasir_block::{BlockHash, NamespaceId};
use kvasir_cache::indexes::{BuildState, BuiltIndex, QuerySamples};
use kvasir_proto::{InvalidMessage, convert, v1};
use tonic::Status;

use super::status::{of_cache, of_message};
use crate::served::Served;

/// Samples of a layer of a block, as the wire has rules for them; the cache checks the rest.
struct Samples {
    hash: BlockHash,
    layer: u16,
    tokens: Vec<u16>,
    q: Vec<f16>,
}

/// Keeps samples; the first that does not fit ends the call, those before it are kept.
pub(super) async fn put_queries(
    served: &Served,
    request: v1::PutQueriesRequest,
) -> Result<v1::PutQueriesReply, Status> {
    let q_heads = request.q_heads as usize;
    let (namespace, blocks) = samples(request).map_err(|error| of_message(&error))?;
    let taken = served.with_cache(move |cache| {
        let mut new_samples = 0;
        for block in &blocks {
            let samples = QuerySamples {
                layer: block.layer,
                q_heads,
                tokens: &block.tokens,
                q: &block.q,
            };
            new_samples += cache.put_queries(namespace, block.hash, &samples)?;
        }
        Ok(new_samples)
    });
    let new_samples = taken.await?.map_err(|error| of_cache(&error))?;
    Ok(v1::PutQueriesReply {
        new_samples: u32::try_from(new_samples).unwrap_or(u32::MAX),
    })
}

/// Asks for an index, or only how it stands.
pub(super) async fn build_index(
    served: &Served,
    request: v1::BuildIndexRequest,
) -> Result<v1::BuildIndexReply, Status> {
    let only_ask = request.only_ask;
    let (namespace, hashes, kind) = wanted(&request, served.config.hashes_max).map_err(|error| of_message(&error))?;
    let asked = served.with_cache(move |cache| {
        if only_ask {
            cache.index_state(namespace, &hashes, kind)
        } else {
            cache.build_index(namespace, &hashes, kind)
        }
    });
    let state = asked.await?.map_err(|error| of_cache(&error))?;
    Ok(reply(state))
}

fn samples(request: v1::PutQueriesRequest) -> Result<(NamespaceId, Vec<Samples>), InvalidMessage> {
    let namespace = convert::namespace(&request.namespace)?;
    let blocks = request.blocks.into_iter().enumerate();
    let blocks = blocks.map(|(at, block)| of_block(block).map_err(|error| error.inside(&format!("blocks[{at}]"))));
    Ok((namespace, blocks.collect::<Result<_, _>>()?))
}

fn of_block(block: v1::BlockQueries) -> Result<Samples, InvalidMessage> {
    let narrow = |field: &str, value: u32| {
        let fits = u16::try_from(value);
        fits.map_err(|_| InvalidMessage::new(field, format!("{value} is more than any model has")))
    };
    let (pairs, odd) = block.q.as_chunks::<2>();
    if !odd.is_empty() {
        let problem = format!("{} bytes are not halves", block.q.len());
        return Err(InvalidMessage::new("q", problem));
    }
    let tokens = block.tokens.iter().map(|token| narrow("tokens", *token));
    Ok(Samples {
        hash: convert::hash("hash", &block.hash)?,
        layer: narrow("layer", block.layer)?,
        tokens: tokens.collect::<Result<_, _>>()?,
        q: pairs.iter().map(|pair| f16::from_le_bytes(*pair)).collect(),
    })
}

fn wanted(
    request: &v1::BuildIndexRequest,
    hashes_max: usize,
) -> Result<(NamespaceId, Vec<BlockHash>, BuiltIndex), InvalidMessage> {
    let kind = match request.index.as_str() {
        "roar" => BuiltIndex::Roar,
        "wave" => BuiltIndex::Wave,
        other => {
            let shown: String = other.chars().take(40).collect();
            let problem = format!("{shown:?} is not built: say \"roar\" or \"wave\"");
            return Err(InvalidMessage::new("index", problem));
        }
    };
    let namespace = convert::namespace(&request.namespace)?;
    Ok((namespace, convert::hashes("hashes", &request.hashes, hashes_max)?, kind))
}

fn reply(state: BuildState) -> v1::BuildIndexReply {
    use v1::build_index_reply::State as Wire;
    let of = |state: Wire| v1::BuildIndexReply {
        state: state.into(),
        ..v1::BuildIndexReply::default()
    };
    match state {
        BuildState::Absent(reason) => v1::BuildIndexReply {
            reason,
            ..of(Wire::Absent)
        },
        BuildState::Queued => of(Wire::Queued),
        BuildState::Building { done, of: heads } => v1::BuildIndexReply {
            heads_done: done,
            heads,
            ..of(Wire::Building)
        },
        BuildState::Ready { tokens } => v1::BuildIndexReply {
            tokens,
            ..of(Wire::Ready)
        },
    }
}
