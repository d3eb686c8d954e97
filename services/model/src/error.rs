//! Why a model cannot be opened or loaded.

use std::{io, path::PathBuf};

/// Why a model cannot be opened or loaded: what is wrong, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read the model file {path}: {source}")]
    Read {
        /// The model file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no GGUF file, or a damaged one.
    #[error("{path} is no readable GGUF file: {reason}; give a whole GGUF file, or fetch this one again")]
    Format {
        /// The model file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A metadata key is missing or has a value that cannot be.
    #[error("{path}: metadata key {key} {problem}; convert the model again, or choose another file")]
    Metadata {
        /// The model file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// A tensor is missing, cut off, or has the wrong shape.
    #[error("{path}: tensor {name} {problem}; convert or fetch the model again, or choose another file")]
    Tensor {
        /// The model file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// The file is sound, and asks for something this forward does not do.
    #[error("{path}: {what} is not supported: {instead}")]
    Unsupported {
        /// The model file.
        path: PathBuf,
        /// What the file asks for.
        what: String,
        /// What would work.
        instead: String,
    },
    /// The file was written to after [`crate::ModelFile::open`] took its identity.
    #[error("{path} changed since it was opened: open it again, and replace model files by renaming, not in place")]
    Changed {
        /// The model file.
        path: PathBuf,
    },
    /// The model was to be computed on a GPU, which cannot be.
    #[error("the GPU cannot be used: {0}")]
    Gpu(String),
    /// Patterns of sparse prefill that do not fit the model, its blocks or its device.
    #[error("sparse prefill: {0}")]
    Sparse(String),
    /// An option of [`crate::LoadOptions`] that cannot be.
    #[error("load option {option} is {found}: {expected}")]
    Option {
        /// The option.
        option: &'static str,
        /// What it is.
        found: String,
        /// What it must be.
        expected: &'static str,
    },
}
