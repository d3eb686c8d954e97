//! What the examples share: block names, schemas by size, a store on a folder of its own, and a child process that serves.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::Context;
use kvasir_block::{BlockHash, Dtype, KvSchema, RopeStyle, Tenant};
use kvasir_runtime::units::ByteSize;
use kvasir_store::StoreConfig;

/// A schema whose layer blocks have `16 * kv_heads << n` KiB.
pub(crate) fn schema(example: &str, kv_heads: u16, n: u16) -> KvSchema {
    KvSchema {
        model: format!("{example} {n}"),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 1,
        kv_heads,
        head_dim: 64,
        block_tokens: 64 << n,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e5,
        rope_dims: 64,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: format!("{example}/1"),
    }
}

pub(crate) fn tenant() -> anyhow::Result<Tenant> {
    Tenant::new("default").context("a name is not empty")
}

/// The name of block `i` of a round.
pub(crate) fn name(round: usize, i: usize) -> BlockHash {
    let mut name = [round as u8; 32];
    name[..8].copy_from_slice(&(i as u64).to_le_bytes());
    BlockHash::from_bytes(name)
}

/// A payload that is not all the same.
pub(crate) fn payload(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * 31 % 251) as u8).collect()
}

/// A store on free ports in `dir` that keeps and queues all that is put.
pub(crate) fn config(dir: &Path, bytes_max: ByteSize) -> StoreConfig {
    StoreConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        admin_listen: ([127, 0, 0, 1], 0).into(),
        data_dir: dir.join("store"),
        host_bytes_max: bytes_max,
        flush_queue_bytes_max: bytes_max,
        ..StoreConfig::default()
    }
}

/// Starts this program once more as `serve`; the child, and the two addresses that it says.
pub(crate) fn start_child() -> anyhow::Result<(Child, String, String)> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("serve")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
    let (first, second) = line.trim().split_once(' ').context("the child does not serve")?;
    Ok((child, first.to_owned(), second.to_owned()))
}

/// In the child: says where it serves, and waits until its parent has seen enough.
pub(crate) async fn serve_until_told(
    first: impl std::fmt::Display,
    second: impl std::fmt::Display,
) -> anyhow::Result<()> {
    println!("{first} {second}");
    std::io::stdout().flush()?;
    tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await??;
    Ok(())
}

/// Ends the child.
pub(crate) fn end_child(mut child: Child) -> anyhow::Result<()> {
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}
