//! MInference's own configurations: per layer an object from head to `[kind, a, b, score]`.
//!
//! What its code does with them is done here: a Vertical-Slash head keeps at least 30 columns and 50 diagonals, of which the
//! first 30 and the nearest 100; `stream_llm` is an A-shape; `block_sparse` takes 100 blocks whatever its numbers say; a head
//! that is missing is Vertical-Slash (1000, 6096).

use std::collections::BTreeMap;

use serde::de::IgnoredAny;

use super::{BadPatterns, HEADS_MAX, HeadPatterns};
use crate::Pattern;

/// Kind, two numbers, and a score that is not needed.
type Head = (String, f64, f64, IgnoredAny);

pub(super) fn read(bytes: &[u8], q_heads: usize) -> Result<HeadPatterns, BadPatterns> {
    let stored: Vec<BTreeMap<String, Head>> = serde_json::from_slice(bytes)?;
    if q_heads == 0 || q_heads > HEADS_MAX {
        let problem = format!("a model of {q_heads} query heads: from 1 to {HEADS_MAX} can be");
        return Err(BadPatterns::Layers(problem));
    }
    let mut layers = Vec::new();
    for (layer, heads) in stored.iter().enumerate() {
        let mut patterns = vec![Pattern::vertical_slash(1000, 6096); q_heads];
        for (name, head) in heads {
            let place = name.parse().ok().and_then(|head: usize| patterns.get_mut(head));
            let Some(place) = place else {
                let problem = format!("layer {layer} has a head {name:?}, and the model {q_heads} query heads");
                return Err(BadPatterns::Layers(problem));
            };
            *place = pattern(head).ok_or_else(|| {
                let (kind, a, b, _) = head;
                BadPatterns::Layers(format!(
                    "layer {layer}, head {name}: {kind:?} with {a} and {b} is not known: vertical_and_slash, stream_llm and \
                     block_sparse with whole numbers below 2^24 are"
                ))
            })?;
        }
        layers.push(patterns);
    }
    HeadPatterns::new(layers)
}

fn pattern((kind, a, b, _): &Head) -> Option<Pattern> {
    let whole = |number: f64| ((0.0..16_777_216.0).contains(&number) && number.fract() == 0.0).then_some(number as u32);
    let (a, b) = (whole(*a)?, whole(*b)?);
    match kind.as_str() {
        "vertical_and_slash" => Some(Pattern::vertical_slash(a, b)),
        "stream_llm" => Some(Pattern::AShape { initial: a, local: b }),
        "block_sparse" => Some(Pattern::BlockSparse { blocks: 100 }),
        _ => None,
    }
}
