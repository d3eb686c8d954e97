//! One error with a kind: what a caller can do about it, and the words for a person.

use std::{error::Error, fmt};

/// What went wrong, as far as a caller would act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The namespace was never opened here: open it.
    UnknownNamespace,
    /// A namespace id that is taken by another schema.
    SchemaMismatch,
    /// The namespace has another sketch basis: what its keys are sketched with does not change.
    BasisMismatch,
    /// The call itself is wrong; repeating it changes nothing.
    InvalidArgument,
    /// A block that a context needs is not held: compute it.
    NotHeld,
    /// The schema asks for something this version does not do.
    Unsupported,
    /// A configured bound is reached: give something back, or try later.
    LimitReached,
    /// The configuration cannot work.
    Config,
    /// Another process uses the data folder.
    Locked,
    /// The disk or the index failed.
    Disk,
}

/// An error of the cache.
#[derive(Debug)]
pub struct CacheError {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl CacheError {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    pub(crate) fn because(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            message: message.into(),
            source: Some(source.into()),
        }
    }

    /// What a caller would act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for CacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for CacheError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

impl From<kvasir_tier::OpenError> for CacheError {
    fn from(error: kvasir_tier::OpenError) -> Self {
        use kvasir_tier::OpenError;
        let kind = match &error {
            OpenError::Config { .. } => ErrorKind::Config,
            OpenError::Locked { .. } => ErrorKind::Locked,
            OpenError::NewerFormat { .. } => ErrorKind::Unsupported,
            OpenError::Io { .. } | OpenError::Index { .. } => ErrorKind::Disk,
        };
        let source = error.source().map(ToString::to_string);
        let message = match source {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        Self::because(kind, message, error)
    }
}
