//! The requests of a trace: one line of JSON each, bounded in length.

use std::{
    collections::HashSet,
    io::{BufRead, Read},
    path::Path,
};

use anyhow::{Context, Result, bail};
use kvasir_runtime::units::ByteSize;
use serde::Deserialize;

use super::BLOCK_TOKENS;

/// Longest line of a trace; the published ones stay below 10 KiB.
const LINE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Deserialize)]
pub(super) struct Request {
    pub(super) input_length: u64,
    /// Names of its blocks, the last of which may be partial.
    pub(super) hash_ids: Vec<u64>,
}

impl Request {
    /// Ids of whole blocks; the last may be partial.
    pub(super) fn whole(&self) -> &[u64] {
        let whole = (self.input_length / u64::from(BLOCK_TOKENS)) as usize;
        &self.hash_ids[..whole.min(self.hash_ids.len())]
    }
}

/// Reads the first `most` requests of a trace, or all.
pub(super) fn read(path: &Path, most: Option<usize>) -> Result<Vec<Request>> {
    let file = std::fs::File::open(path).with_context(|| {
        format!(
            "cannot open {}: a trace is a file of JSON lines with input_length and hash_ids, as Mooncake publishes (FAST '25 release)",
            path.display()
        )
    })?;
    let mut reader = std::io::BufReader::new(file);
    let mut requests = Vec::new();
    let mut line = String::new();
    while most.is_none_or(|most| requests.len() < most) {
        line.clear();
        let read = (&mut reader).take(LINE_BYTES_MAX).read_line(&mut line);
        if read.with_context(|| format!("cannot read {}", path.display()))? == 0 {
            break;
        }
        let at = requests.len() + 1;
        if !line.ends_with('\n') && line.len() as u64 == LINE_BYTES_MAX {
            bail!(
                "{}: line {at} is longer than {}",
                path.display(),
                ByteSize::bytes(LINE_BYTES_MAX)
            );
        }
        requests
            .push(serde_json::from_str(&line).with_context(|| format!("{}: line {at} is no request", path.display()))?);
    }
    Ok(requests)
}

/// Whole blocks that were seen before, in an unbroken run from the first: hits of a store that never forgets.
pub(super) fn unbounded(requests: &[Request]) -> u64 {
    let mut seen: HashSet<u64> = HashSet::new();
    let mut hits = 0;
    for request in requests {
        hits += request.whole().iter().take_while(|id| seen.contains(id)).count() as u64;
        seen.extend(request.whole());
    }
    hits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(input_length: u64, hash_ids: &[u64]) -> Request {
        Request {
            input_length,
            hash_ids: hash_ids.to_vec(),
        }
    }

    #[test]
    fn whole_blocks_and_hits_without_bounds() {
        assert_eq!(request(1025, &[1, 2, 3]).whole(), [1, 2]);
        assert_eq!(request(511, &[1]).whole(), [] as [u64; 0]);
        assert_eq!(request(u64::MAX, &[1]).whole(), [1]);
        let requests = [
            request(1536, &[1, 2, 3]),
            request(1536, &[1, 2, 4]),
            // The second block is new, so the third, though seen, is behind a gap.
            request(1536, &[1, 5, 3]),
        ];
        assert_eq!(unbounded(&requests), 2 + 1);
    }

    #[test]
    fn traces_are_read_or_refused_by_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("trace.jsonl");
        let good = "{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 1]}\n";
        std::fs::write(&path, good.repeat(3)).expect("written");
        assert_eq!(read(&path, None).expect("a trace").len(), 3);
        assert_eq!(read(&path, Some(2)).expect("a trace").len(), 2);
        std::fs::write(&path, format!("{good}{{\"input_length\": -1}}\n")).expect("written");
        let error = format!("{:#}", read(&path, None).expect_err("refused"));
        assert!(error.contains("line 2"), "{error}");
        std::fs::write(&path, "x".repeat(LINE_BYTES_MAX as usize + 1)).expect("written");
        assert!(read(&path, None).is_err());
        let error = format!("{:#}", read(&folder.path().join("none"), None).expect_err("refused"));
        assert!(error.contains("Mooncake"), "{error}");
    }
}
