//! SmolLM2-135M-Instruct from the cache folder.

use std::{path::PathBuf, sync::OnceLock};

use kvasir_index::Basis;
use kvasir_model::{LoadOptions, Model, ModelFile, built_in_basis};

use crate::made_up::Gguf;

/// Where `make model` puts it.
pub(crate) fn path() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .expect("a home folder");
    cache.join("kvasir/models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// The file, opened once.
pub(crate) fn file() -> &'static ModelFile {
    static FILE: OnceLock<ModelFile> = OnceLock::new();
    FILE.get_or_init(|| ModelFile::open(&path()).expect("the model file: run `make model`"))
}

/// The model with pages of 64 tokens.
pub(crate) fn model(threads: usize) -> Model {
    Model::load(
        file(),
        &LoadOptions {
            threads,
            block_tokens: 64,
        },
    )
    .expect("the model file is sound")
}

#[test]
fn everything_comes_from_the_metadata() {
    let file = file();
    assert_eq!(file.name(), "smollm2-135m-instruct");
    let shape = file.shape();
    assert_eq!(
        (shape.layers, shape.hidden, shape.feed_forward, shape.vocab),
        (30, 576, 1536, 49152)
    );
    assert_eq!((shape.q_heads, shape.kv_heads, shape.head_dim), (9, 3, 64));
    assert_eq!(
        (shape.context_tokens_max, shape.rope_dims, shape.rope_theta),
        (8192, 64, 100_000.0)
    );
    let schema = file.schema(64);
    assert_eq!(schema.validate(), Ok(()));
    assert_eq!(
        (schema.layer_block_bytes(), schema.block_bytes()),
        (49_152, 30 * 49_152)
    );
    assert_eq!(schema.numerics, format!("{}+llama/1", kvasir_simd::NUMERICS));
    // As `sha256sum` prints it.
    let hex: String = schema.weights_sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, WEIGHTS_SHA256);
}

const WEIGHTS_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

#[test]
fn a_basis_comes_with_it() {
    let (shape, schema) = (file().shape(), file().schema(64));
    let basis = built_in_basis(file()).expect("one is built in");
    let basis = Basis::decode(basis).expect("a sound basis");
    let fits = basis.check(
        &schema.model_fingerprint(),
        shape.layers,
        shape.kv_heads,
        shape.head_dim,
    );
    assert_eq!(fits, Ok(()));
    assert_eq!((basis.rank, basis.streaming_heads()), (Basis::RANK, 0));
    let path = file().basis_path();
    assert!(path.ends_with("SmolLM2-135M-Instruct.Q4_1.gguf.basis"), "{path:?}");

    let other = Gguf::small().open().expect("the small model is sound");
    assert_eq!(built_in_basis(&other), None);
}
