//! Sparse prefill: the patterns of this model, and which of a step's tokens have the KV that their block's name stands for.

use std::{fs::File, io::Read, path::Path};

use anyhow::Context;
use kvasir_model::{Device, ModelFile, SparsePrefill};
use kvasir_sparse::{FILE_BYTES_MAX, HeadPatterns};

use crate::config::{InvalidConfig, WorkerConfig};

/// The patterns in the file at `path`, for the model in `file` on `device`.
///
/// # Errors
/// A file that cannot be read, or holds no patterns for this model and its blocks.
pub(crate) fn read(
    path: &Path,
    file: &ModelFile,
    device: &Device,
    config: &WorkerConfig,
) -> anyhow::Result<SparsePrefill> {
    let read = || {
        let mut bytes = Vec::new();
        // One more than may be, so that what is too long is seen to be.
        File::open(path)
            .context("cannot be opened")?
            .take(FILE_BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .context("cannot be read")?;
        let mut patterns = HeadPatterns::read(&bytes, file.shape().q_heads)?;
        if let Device::Gpu(_) = device {
            patterns.dense_up_to = patterns.dense_up_to.max(config.gpu.dense_up_to);
        }
        let schema = file.schema(config.block_tokens);
        anyhow::Ok(SparsePrefill::new(patterns, file.shape(), &schema, device.tile_rows())?)
    };
    let sparse = read()
        .map_err(|error| InvalidConfig::new("worker.sparse_prefill", format!("{}: {error:#}", path.display())))?;
    tracing::info!(
        path = %path.display(),
        from = sparse.from(),
        block_tokens = config.block_tokens,
        "prompts are attended sparsely"
    );
    Ok(sparse)
}

/// Where a sequence's tokens are computed sparsely, and in which pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Position of the first block that is sparse when it is computed whole.
    pub(crate) from: usize,
    pub(crate) block_tokens: usize,
}

impl Blocks {
    /// Whether `tokens` tokens from position `computed` on hold a whole sparse block.
    pub(crate) fn any(self, computed: usize, tokens: usize) -> bool {
        self.whole_end(computed, tokens) > self.from.max(computed)
    }

    /// The block from which on names would be wrong once these tokens are computed: the first that is sparse by its name and
    /// of which they hold a part alone, which attends densely. What lies behind it attended to it.
    pub(crate) fn unnamed_from(self, computed: usize, tokens: usize) -> Option<usize> {
        let part = self.whole_end(computed, tokens).max(self.from);
        (part < computed + tokens).then(|| part / self.block_tokens * self.block_tokens)
    }

    /// End of the whole blocks among these tokens; their beginning if there are none.
    fn whole_end(self, computed: usize, tokens: usize) -> usize {
        if computed.is_multiple_of(self.block_tokens) {
            computed + tokens / self.block_tokens * self.block_tokens
        } else {
            computed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_are_sparse_and_parts_end_the_names() {
        let blocks = Blocks {
            from: 128,
            block_tokens: 64,
        };
        // Position, tokens, whether a block is sparse, from where on nothing is named.
        let table = [
            (0, 64, false, None),
            (0, 128, false, None),
            // Parts of blocks that are dense anyway.
            (0, 100, false, None),
            (100, 1, false, None),
            (100, 28, false, None),
            (64, 128, true, None),
            (128, 64, true, None),
            (128, 320, true, None),
            (128, 65, true, Some(192)),
            (128, 63, false, Some(128)),
            (0, 130, false, Some(128)),
            (0, 200, true, Some(192)),
            // Begun in the middle of a block: dense to its end and beyond.
            (130, 1, false, Some(128)),
            (100, 100, false, Some(128)),
            (192, 1, false, Some(192)),
        ];
        for (computed, tokens, any, unnamed) in table {
            assert_eq!(blocks.any(computed, tokens), any, "{tokens} from {computed}");
            assert_eq!(
                blocks.unnamed_from(computed, tokens),
                unnamed,
                "{tokens} from {computed}"
            );
        }
    }
}
