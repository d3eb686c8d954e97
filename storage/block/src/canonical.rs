//! Length-prefixed canonical encoding, hashed into fingerprints.
//!
//! Fields are never joined by delimiters: two different field lists cannot encode to the same bytes.

use sha2::{Digest, Sha256};

/// Hashes named fields, each as `len(name) name len(value) value` with u64 little-endian lengths.
pub(crate) struct FieldHasher {
    sha: Sha256,
}

impl FieldHasher {
    pub(crate) fn new(domain: &str) -> Self {
        let mut hasher = Self { sha: Sha256::new() };
        hasher.part(domain.as_bytes());
        hasher
    }

    pub(crate) fn field(&mut self, name: &str, value: &[u8]) {
        self.part(name.as_bytes());
        self.part(value);
    }

    pub(crate) fn finish(self) -> [u8; 32] {
        self.sha.finalize().into()
    }

    fn part(&mut self, bytes: &[u8]) {
        self.sha.update((bytes.len() as u64).to_le_bytes());
        self.sha.update(bytes);
    }
}
