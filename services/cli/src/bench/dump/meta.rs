//! `meta.json` of a dump: what its files are.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Version of the files and of this description.
const FORMAT: &str = "kvasir-qkv/1";
/// Longest description that is read.
const BYTES_MAX: u64 = 1 << 20;
/// Most elements of a file: 16 GiB of halves.
const ELEMENTS_MAX: usize = 8 << 30;

/// Written last: where it is, the dump is whole.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::bench) struct Meta {
    pub(in crate::bench) format: String,
    pub(in crate::bench) dtype: String,
    /// Of each `.q` and `.p`; keys and values have KV heads. `[heads, tokens, head_dim]`
    pub(in crate::bench) q_shape: [usize; 3],
    pub(in crate::bench) kv_shape: [usize; 3],
    pub(in crate::bench) model: String,
    /// `KvSchema::model_fingerprint`, which a basis names too; of what no model made there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::bench) model_fingerprint: Option<String>,
    pub(in crate::bench) layers: Vec<usize>,
    pub(in crate::bench) layers_total: usize,
    /// What scores are multiplied by before the softmax.
    pub(in crate::bench) softmax_scale: f32,
    pub(in crate::bench) rope_theta: f32,
    pub(in crate::bench) text: String,
    /// Of all tokens but the first, and of those in the second half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::bench) perplexity: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::bench) perplexity_second_half: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::bench) seconds: Option<f64>,
}

impl Meta {
    /// A description of files of `heads` query heads and `kv_heads` KV heads; the rest is the caller's to fill in.
    pub(in crate::bench) fn new(heads: usize, kv_heads: usize, tokens: usize, head_dim: usize) -> Self {
        Self {
            format: FORMAT.to_owned(),
            dtype: "f16".to_owned(),
            q_shape: [heads, tokens, head_dim],
            kv_shape: [kv_heads, tokens, head_dim],
            model: String::new(),
            model_fingerprint: None,
            layers: Vec::new(),
            layers_total: 0,
            softmax_scale: 1.0 / (head_dim as f32).sqrt(),
            rope_theta: 0.0,
            text: String::new(),
            perplexity: None,
            perplexity_second_half: None,
            seconds: None,
        }
    }

    /// Reads the description in `folder` and checks that its sizes can be.
    pub(in crate::bench) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("meta.json");
        let size = std::fs::metadata(&path).map(|file| file.len()).with_context(|| {
            format!(
                "{} cannot be read: `kvasir bench dump` writes it when a dump is whole",
                path.display()
            )
        })?;
        ensure!(size <= BYTES_MAX, "{} has {size} bytes, no dump's has", path.display());
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let meta: Self =
            serde_json::from_str(&text).with_context(|| format!("{} is not that of a dump", path.display()))?;
        meta.check()
            .with_context(|| format!("{} cannot be used", path.display()))?;
        Ok(meta)
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.format == FORMAT && self.dtype == "f16",
            "its format is {} of {}, and {FORMAT} of f16 is wanted: dump anew",
            self.format,
            self.dtype
        );
        let [heads, tokens, head_dim] = self.q_shape;
        let [kv_heads, kv_tokens, kv_dim] = self.kv_shape;
        ensure!(
            tokens == kv_tokens && head_dim == kv_dim && kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads),
            "q_shape {:?} and kv_shape {:?} are not of one attention",
            self.q_shape,
            self.kv_shape
        );
        let elements = heads.checked_mul(tokens).and_then(|rows| rows.checked_mul(head_dim));
        ensure!(
            elements.is_some_and(|elements| (1..=ELEMENTS_MAX).contains(&elements)),
            "q_shape {:?} is empty or larger than any dump",
            self.q_shape
        );
        let usual = 1.0 / (head_dim as f32).sqrt();
        ensure!(
            (self.softmax_scale - usual).abs() <= 1e-6 * usual,
            "softmax_scale is {}, and only 1/sqrt({head_dim}) is known here",
            self.softmax_scale
        );
        Ok(())
    }

    /// Writes the description into `folder`.
    pub(in crate::bench) fn write(&self, folder: &Path) -> Result<std::path::PathBuf> {
        let path = folder.join("meta.json");
        std::fs::write(&path, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let missing = Meta::read(folder.path()).expect_err("nothing there");
        assert!(
            format!("{missing:#}").contains("`kvasir bench dump` writes it"),
            "{missing:#}"
        );
        let good = Meta::new(9, 3, 100, 64);
        good.write(folder.path()).expect("written");
        let read = Meta::read(folder.path()).expect("read");
        assert_eq!((read.q_shape, read.kv_shape), ([9, 100, 64], [3, 100, 64]));
        type Change = fn(&mut Meta);
        let changes: [(Change, &str); 5] = [
            (|it| it.format = "kvasir-qkv/2".to_owned(), "dump anew"),
            (|it| it.kv_shape[0] = 2, "are not of one attention"),
            (|it| it.q_shape[1] = 99, "are not of one attention"),
            (
                |it| (it.q_shape[1], it.kv_shape[1]) = (usize::MAX / 8, usize::MAX / 8),
                "larger than any dump",
            ),
            (|it| it.softmax_scale = 1.0, "only 1/sqrt(64) is known"),
        ];
        for (change, expected) in changes {
            let mut meta = Meta::new(9, 3, 100, 64);
            change(&mut meta);
            meta.write(folder.path()).expect("written");
            let error = format!("{:#}", Meta::read(folder.path()).expect_err(expected));
            assert!(error.contains(expected), "{error}");
        }
    }
}
