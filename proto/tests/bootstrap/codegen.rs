//! Generates Rust and the descriptor set from `kvasir/v1/*.proto`, with protox in place of protoc.

use std::{error::Error, fs, path::Path};

/// The files that make up the API, in the order a reader should meet them.
const PROTOS: [&str; 4] = [
    "kvasir/v1/common.proto",
    "kvasir/v1/block_store.proto",
    "kvasir/v1/retrieval.proto",
    "kvasir/v1/worker.proto",
];

/// What generation writes, by name inside `src/gen`.
pub(crate) const OUTPUTS: [&str; 2] = ["kvasir.v1.rs", "kvasir.v1.bin"];

/// Writes [`OUTPUTS`] into `out`.
pub(crate) fn generate(out: &Path) -> Result<(), Box<dyn Error>> {
    let root = env!("CARGO_MANIFEST_DIR");
    let descriptors = protox::compile(PROTOS, [root])?;
    fs::create_dir_all(out)?;
    fs::write(
        out.join("kvasir.v1.bin"),
        protox::prost::Message::encode_to_vec(&descriptors),
    )?;
    tonic_prost_build::configure()
        // Payloads and hashes are shared slices of the received buffer, never copies of it.
        .bytes(".")
        .out_dir(out)
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)?;
    Ok(())
}
