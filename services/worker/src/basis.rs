//! The basis that a store sketches this model's keys with: found, checked, and then only carried.

use std::{fs::File, io::Read, path::Path};

use anyhow::Context;
use bytes::Bytes;
use kvasir_index::Basis;
use kvasir_model::{ModelFile, built_in_basis};

use crate::config::InvalidConfig;

/// The file of the basis for `file`, empty where there is none: that of `configured` if it is not empty, else the one beside the
/// model, else the one that comes with the program. Says in the log which.
///
/// # Errors
/// A configured file that cannot be read or is not a basis for this model. What was not asked for by name is passed by with
/// a warning.
pub(crate) fn find(configured: &Path, file: &ModelFile) -> anyhow::Result<Bytes> {
    if configured != Path::new("") {
        let found = read(configured)
            .and_then(|bytes| checked(bytes, file))
            .map_err(|error| InvalidConfig::new("worker.basis", format!("{}: {error:#}", configured.display())))?;
        return Ok(say(found, "worker.basis"));
    }
    let beside = file.basis_path();
    if beside.exists() {
        match read(&beside).and_then(|bytes| checked(bytes, file)) {
            Ok(found) => return Ok(say(found, "beside the model")),
            Err(error) => {
                tracing::warn!(path = %beside.display(), error = format!("{error:#}"), "the basis beside the model is passed by");
            }
        }
    }
    if let Some(bytes) = built_in_basis(file) {
        match checked(Bytes::from_static(bytes), file) {
            Ok(found) => return Ok(say(found, "built in")),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "the basis that is built in is passed by"),
        }
    }
    tracing::info!("no basis for this model, keys are not sketched: `kvasir calibrate` makes one");
    Ok(Bytes::new())
}

fn read(path: &Path) -> anyhow::Result<Bytes> {
    let file = File::open(path).context("cannot be opened")?;
    let mut bytes = Vec::new();
    // One more than may be, so that what is too long is seen to be.
    file.take(Basis::BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .context("cannot be read")?;
    Ok(bytes.into())
}

fn checked(bytes: Bytes, file: &ModelFile) -> anyhow::Result<(Bytes, Basis)> {
    let basis = Basis::decode(&bytes)?;
    let shape = file.shape();
    let model = file.schema(1).model_fingerprint();
    basis.check(&model, shape.layers, shape.kv_heads, shape.head_dim)?;
    Ok((bytes, basis))
}

fn say((bytes, basis): (Bytes, Basis), from: &'static str) -> Bytes {
    tracing::info!(
        from,
        rank = basis.rank,
        streaming_heads = basis.streaming_heads(),
        "basis of this model's sketches"
    );
    bytes
}
