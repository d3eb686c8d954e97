//! Patterns of all heads of a model, as a file: ours, and MInference's.

mod minference;

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{BadPattern, Pattern};

/// What the first field of our files holds.
const FORMAT: &str = "kvasir-sparse-prefill/1";

/// Version of what planners do with a pattern. Changes whenever any mask of any planner changes, because cached KV is
/// interchangeable with recomputed KV only while it stays the same.
pub const PLANNERS: &str = "kvasir-sparse/1";

/// Most bytes of a file; one of a 405B model has 2 MB.
pub const FILE_BYTES_MAX: usize = 16 << 20;

/// Prompts of up to this many tokens are attended densely unless a file says otherwise. Chosen by counting, not by the clock: the
/// README says how.
pub const DENSE_UP_TO: usize = 2048;

/// The pattern of each query head of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadPatterns {
    /// `KvSchema::model_fingerprint` of the model they were searched for, in hex; `None` in MInference's files, which do not
    /// say.
    pub model_fingerprint: Option<String>,
    /// Queries at positions below this attend densely.
    pub dense_up_to: usize,
    layers: Vec<Vec<Pattern>>,
    /// How they were found, for people.
    found_by: Option<FoundBy>,
}

/// How patterns were found; says nothing that changes a mask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FoundBy {
    /// Name of the model.
    pub model: String,
    /// What was minimised or maximised.
    pub criterion: String,
    /// The text that was run.
    pub text: String,
    /// Tokens of it.
    pub tokens: usize,
    /// What every candidate was made to cost, as `initial+local` of an A-shape.
    pub budget: String,
    /// Rows of queries per tile for which that cost was counted.
    pub tile_rows: usize,
    /// Mean over heads of what the criterion says of the chosen patterns.
    pub score: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    model_fingerprint: Option<String>,
    dense_up_to: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    found_by: Option<FoundBy>,
    /// By layer, by query head.
    layers: Vec<Vec<Pattern>>,
}

/// Why a file's patterns cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadPatterns {
    /// More bytes than any such file has.
    #[error("{0} bytes: a file of patterns has at most 16 MiB")]
    TooLong(usize),
    /// Neither format.
    #[error("neither a file of `kvasir search-heads` nor one of MInference's configurations: {0}")]
    Json(#[from] serde_json::Error),
    /// Ours, of another version.
    #[error("format {0:?}: this program reads {FORMAT:?}; make the file again with `kvasir search-heads`")]
    Format(String),
    /// Layers that cannot be.
    #[error("{0}")]
    Layers(String),
    /// A parameter out of range.
    #[error("layer {layer}, head {head}: {problem}")]
    Pattern {
        /// Layer.
        layer: usize,
        /// Query head.
        head: usize,
        /// What is wrong.
        problem: BadPattern,
    },
}

/// Heads of a layer and layers of a model: beyond any, and small enough to bound what is held.
const HEADS_MAX: usize = 1024;
const LAYERS_MAX: usize = 1024;

impl HeadPatterns {
    /// Patterns by layer and query head.
    ///
    /// # Errors
    /// If there is no layer, layers differ in their heads, or a parameter is out of range.
    pub fn new(layers: Vec<Vec<Pattern>>) -> Result<Self, BadPatterns> {
        let heads = layers.first().map_or(0, Vec::len);
        if heads == 0 || heads > HEADS_MAX || layers.len() > LAYERS_MAX {
            let problem = format!(
                "{} layers of {heads} heads: from 1 to {LAYERS_MAX} layers and {HEADS_MAX} heads can be",
                layers.len()
            );
            return Err(BadPatterns::Layers(problem));
        }
        for (layer, patterns) in layers.iter().enumerate() {
            if patterns.len() != heads {
                let problem = format!("layer {layer} has {} heads and layer 0 has {heads}", patterns.len());
                return Err(BadPatterns::Layers(problem));
            }
            for (head, pattern) in patterns.iter().enumerate() {
                pattern
                    .validate()
                    .map_err(|problem| BadPatterns::Pattern { layer, head, problem })?;
            }
        }
        Ok(Self {
            model_fingerprint: None,
            dense_up_to: DENSE_UP_TO,
            layers,
            found_by: None,
        })
    }

    /// The same pattern for every head.
    ///
    /// # Errors
    /// As [`HeadPatterns::new`].
    pub fn uniform(pattern: Pattern, layers: usize, q_heads: usize) -> Result<Self, BadPatterns> {
        Self::new(vec![
            vec![pattern; q_heads.min(HEADS_MAX + 1)];
            layers.min(LAYERS_MAX + 1)
        ])
    }

    /// With a note on how they were found.
    #[must_use]
    pub fn found_by(self, note: FoundBy) -> Self {
        Self {
            found_by: Some(note),
            ..self
        }
    }

    /// By layer, by query head.
    pub fn layers(&self) -> &[Vec<Pattern>] {
        &self.layers
    }

    /// Reads a file: ours, or MInference's (`minference/configs/*.json`) for a model of `q_heads` query heads.
    ///
    /// # Errors
    /// [`BadPatterns`] says what is wrong with it.
    pub fn read(bytes: &[u8], q_heads: usize) -> Result<Self, BadPatterns> {
        if bytes.len() > FILE_BYTES_MAX {
            return Err(BadPatterns::TooLong(bytes.len()));
        }
        // Ours is an object and theirs an array.
        if bytes.trim_ascii_start().first() == Some(&b'[') {
            return minference::read(bytes, q_heads);
        }
        let stored: Stored = match serde_json::from_slice(bytes) {
            Ok(stored) => stored,
            Err(error) => {
                // Another version may have other fields; its number says more than the first of them.
                #[derive(Deserialize)]
                struct Format {
                    format: String,
                }
                return Err(match serde_json::from_slice::<Format>(bytes) {
                    Ok(Format { format }) if format != FORMAT => BadPatterns::Format(format),
                    _ => BadPatterns::Json(error),
                });
            }
        };
        if stored.format != FORMAT {
            return Err(BadPatterns::Format(stored.format));
        }
        let mut patterns = Self::new(stored.layers)?;
        patterns.model_fingerprint = stored.model_fingerprint;
        patterns.dense_up_to = stored.dense_up_to;
        patterns.found_by = stored.found_by;
        Ok(patterns)
    }

    /// Our file, with a line per layer.
    ///
    /// # Errors
    /// None in practice: numbers and strings are JSON.
    pub fn write(&self) -> Result<Vec<u8>, serde_json::Error> {
        let head = Stored {
            format: FORMAT.to_owned(),
            model_fingerprint: self.model_fingerprint.clone(),
            dense_up_to: self.dense_up_to,
            found_by: self.found_by.clone(),
            layers: Vec::new(),
        };
        let head = serde_json::to_string_pretty(&head)?;
        let layers: Result<Vec<String>, _> = self.layers.iter().map(serde_json::to_string).collect();
        let layers = layers?.join(",\n    ");
        // The one empty list of the text is the place of the layers.
        let text = head.replacen("\"layers\": []", &format!("\"layers\": [\n    {layers}\n  ]"), 1);
        Ok((text + "\n").into_bytes())
    }

    /// Names everything that changes a mask: the planners' version, where sparsity begins, and every pattern. Part of the name
    /// of the KV that is made under it.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut text = format!("{PLANNERS}\ndense_up_to {}\n", self.dense_up_to);
        for layer in &self.layers {
            for pattern in layer {
                // Bits, not decimals: two shares that print alike are two shares.
                let _ = match *pattern {
                    Pattern::Dense => write!(text, "dense;"),
                    Pattern::AShape { initial, local } => write!(text, "a {initial} {local};"),
                    Pattern::VerticalSlash {
                        verticals,
                        slashes,
                        sink,
                        near,
                    } => write!(text, "vs {verticals} {slashes} {sink} {near};"),
                    Pattern::BlockSparse { blocks } => write!(text, "bs {blocks};"),
                    Pattern::FlexPrefill { gamma, tau, budget_min } => {
                        write!(text, "f {:08x} {:08x} {budget_min};", gamma.to_bits(), tau.to_bits())
                    }
                    Pattern::XAttention { stride, threshold } => {
                        write!(text, "x {stride} {:08x};", threshold.to_bits())
                    }
                };
            }
            text.push('\n');
        }
        Sha256::digest(text.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests;
