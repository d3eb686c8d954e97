//! Long texts for measurements on real queries and keys: which text, and which parts of it.

use std::{fs::File, io::Read, ops::Range, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail, ensure};
use kvasir_model::ModelFile;

/// Most bytes of text; hours of forward on a processor.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// Prints the reference topics of Python's own help, 470 KB of technical prose and code under the PSF licence, which lie
/// beside every Python 3.
const PYTHON_TOPICS: &str = r#"
import sys
from pydoc_data import topics
sys.stdout.reconfigure(encoding="utf-8", newline="\n")
for name in sorted(topics.topics):
    sys.stdout.write(topics.topics[name] + "\n\n")
"#;

/// A text as token ids.
pub(crate) struct Corpus {
    /// Where it is from, for reports.
    pub(crate) source: String,
    tokens: Vec<u32>,
    /// What the model wants every text to begin with; the whole text does already.
    start: Option<u32>,
}

impl Corpus {
    /// The text of `files`, end to end; of Python's reference topics if there is none.
    pub(crate) fn read(files: &[PathBuf], file: &ModelFile) -> Result<Self> {
        let mut text = String::new();
        let source = if files.is_empty() {
            text = python_topics()?;
            "the reference topics of python3 (pydoc_data, PSF licence)".to_owned()
        } else {
            for path in files {
                let left = TEXT_BYTES_MAX - text.len() as u64;
                // One byte more than allowed, to tell a text that fits from one that was cut.
                let read = File::open(path).and_then(|file| file.take(left + 1).read_to_string(&mut text));
                read.with_context(|| format!("cannot read the text {} as UTF-8 (--text)", path.display()))?;
                text.push('\n');
                ensure!(
                    text.len() as u64 <= TEXT_BYTES_MAX,
                    "the texts have more than 64 MiB (--text): give less, a few megabytes are plenty"
                );
            }
            let names = files
                .iter()
                .filter_map(|path| path.file_name())
                .map(|name| name.to_string_lossy());
            names.collect::<Vec<_>>().join(", ")
        };
        Ok(Self {
            source,
            tokens: file.tokenizer().encode(&text, false)?,
            start: file.tokenizer().encode("", false)?.first().copied(),
        })
    }

    /// Tokens there are.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn tokens(&self, range: Range<usize>) -> &[u32] {
        &self.tokens[range]
    }

    /// The tokens in `range` as a text of their own: the first gives way to what a text begins with where the model wants that
    /// (Gemma's sink; without it no head attends as it would).
    pub(crate) fn window(&self, range: Range<usize>) -> Vec<u32> {
        let mut tokens = self.tokens[range].to_vec();
        if let (Some(start), Some(first)) = (self.start, tokens.first_mut()) {
            *first = start;
        }
        tokens
    }

    /// `count` ranges of `len` tokens, each in the middle of its share of the text. The text's first tokens are left to
    /// others (a dump begins there) where it is long enough.
    pub(crate) fn windows(&self, count: usize, len: usize) -> Vec<Range<usize>> {
        windows(self.tokens.len(), count, len)
    }
}

fn windows(total: usize, count: usize, len: usize) -> Vec<Range<usize>> {
    let middle = |share: usize| share.saturating_sub(len) / 2;
    let whole = total / count.max(1);
    // Where the middle of the first share reaches into a dump of as many tokens, the shares begin behind that, if they can.
    let behind = total.saturating_sub(len);
    let (from, share) = match behind / count.max(1) {
        share if middle(whole) < len && share >= len => (len, share),
        _ => (0, whole),
    };
    (0..count)
        .map(|at| from + at * share + middle(share))
        .map(|start| start..start + len.min(share))
        .collect()
}

fn python_topics() -> Result<String> {
    let otherwise = "give a long text with --text FILE, or run `make system`, which installs python3";
    let output = Command::new("python3")
        .args(["-c", PYTHON_TOPICS])
        .output()
        .with_context(|| format!("cannot run python3, whose reference topics are the default text: {otherwise}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or("nothing").to_owned();
        bail!("python3 has no reference topics (it said: {last}): {otherwise}");
    }
    String::from_utf8(output.stdout).with_context(|| format!("python3 did not print UTF-8: {otherwise}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_over_the_text() {
        // Tokens, windows, tokens of each, where they are.
        let table = [
            (100, 2, 10, "[20..30, 70..80]"),
            (100, 1, 100, "[0..100]"),
            (100, 2, 50, "[0..50, 50..100]"),
            (100, 3, 33, "[0..33, 33..66, 66..99]"),
            // The first 30 are left alone only because there is enough behind them.
            (100, 2, 30, "[32..62, 67..97]"),
            (89, 2, 30, "[7..37, 51..81]"),
            // Asked for more than there is: what there is.
            (40, 1, 50, "[0..40]"),
            (0, 1, 10, "[0..0]"),
        ];
        for (total, count, len, expected) in table {
            let found = format!("{:?}", windows(total, count, len));
            assert_eq!(found, expected, "{count} of {len} in {total}");
        }
    }
}
