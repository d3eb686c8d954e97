//! What a test may count on being installed. Nothing here skips: a test that did not run must not look like one that passed.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use kvasir_model::ModelFile;

/// The model that `make model` installs.
///
/// # Panics
/// When it is not there, with what to do.
pub fn model_path() -> PathBuf {
    installed("models/SmolLM2-135M-Instruct.Q4_1.gguf", "make model")
}

/// The model, opened once per process.
///
/// # Panics
/// When it is not there or cannot be read.
pub fn model() -> Arc<ModelFile> {
    static FILE: OnceLock<Arc<ModelFile>> = OnceLock::new();
    let open = || match ModelFile::open(&model_path()) {
        Ok(file) => Arc::new(file),
        Err(error) => panic!("the model cannot be opened: {error}"),
    };
    Arc::clone(FILE.get_or_init(open))
}

/// A Python that has the `openai` package.
///
/// # Panics
/// When it is not there, with what to do.
pub fn openai_python() -> PathBuf {
    installed("openai/bin/python", "make openai")
}

fn installed(name: &str, remedy: &str) -> PathBuf {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let cache = set("XDG_CACHE_HOME").unwrap_or_else(|| set("HOME").unwrap_or_default().join(".cache"));
    let path = cache.join("kvasir").join(name);
    assert!(
        path.exists(),
        "{} is missing: run `{remedy}` first (`make test` does)",
        path.display()
    );
    path
}
