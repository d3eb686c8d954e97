//! llama.cpp in a Python process of its own, asked line by line.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;

use super::Case;
use crate::tree::cache_folder;

/// Loads the model, then answers each line of JSON with one.
const SCRIPT: &str = include_str!("llama_cpp.py");

pub(super) struct Peer {
    child: Child,
    /// Closed first, which ends the process.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    version: String,
}

#[derive(Deserialize)]
struct Hello {
    version: String,
}

#[derive(Deserialize)]
struct Timed {
    seconds: f64,
}

impl Peer {
    pub(super) fn start(python: Option<&Path>, model: &Path, threads: usize, tokens_max: usize) -> Result<Self> {
        let python = python.map_or_else(|| cache_folder().join("peers/bin/python"), PathBuf::from);
        if !python.exists() {
            bail!(
                "there is no llama.cpp to compare with at {}: run `make peers`, which builds it (minutes, once), name \
                 another Python that has llama-cpp-python with --python, or measure Kvasir --alone",
                python.display()
            );
        }
        let mut child = Command::new(&python)
            .args(["-c", SCRIPT])
            .arg(model)
            .args([threads.to_string(), tokens_max.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", python.display()))?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("the peer has no output")?;
        let mut peer = Self {
            child,
            input,
            output: BufReader::new(output),
            version: String::new(),
        };
        peer.version = peer.read::<Hello>()?.version;
        Ok(peer)
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// Seconds for the timed part of a case.
    pub(super) fn run(&mut self, case: &Case, tokens: &[u32]) -> Result<f64> {
        let (context, timed) = tokens[..case.context + case.tokens].split_at(case.context);
        let question = json!({"context": context, "timed": timed, "decode": case.decode}).to_string();
        let input = self.input.as_mut().context("the peer's input is closed")?;
        writeln!(input, "{question}")
            .and_then(|()| input.flush())
            .context("the peer does not listen any more")?;
        Ok(self.read::<Timed>()?.seconds)
    }

    fn read<T: for<'de> Deserialize<'de>>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("cannot read from the peer")?;
        if line.is_empty() {
            bail!("llama.cpp ended before it answered (its words are above): does `make peers` need to be run again?");
        }
        serde_json::from_str(&line).with_context(|| format!("the peer said {:?}", line.trim()))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ended = self.child.wait();
    }
}
