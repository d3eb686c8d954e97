//! The sketch basis of a namespace: `<namespace id>.basis` beside the namespace's file, in the format of `kvasir-index`.
//!
//! Sketches are named by the basis that made them, so a namespace has one for good. A file that is damaged or for another model
//! is set aside: the namespace then has none until a worker brings it again.

use std::{fmt, fs, sync::Arc};

use kvasir_block::{KvSchema, NamespaceId};
use kvasir_index::{Basis, IndexError};

use super::Namespaces;
use crate::{CacheError, ErrorKind, small_file::write_durably};

/// Name of a basis: SHA-256 of its file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BasisId([u8; 32]);

/// A basis that was checked against the schema of its namespace.
pub(crate) struct NamespaceBasis {
    id: BasisId,
    file_bytes: u64,
    basis: Basis,
}

impl BasisId {
    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for BasisId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BasisId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BasisId({self})")
    }
}

impl NamespaceBasis {
    fn decode(file: &[u8], schema: &KvSchema) -> Result<Self, IndexError> {
        let basis = Basis::decode(file)?;
        basis.check(
            &schema.model_fingerprint(),
            schema.layers.into(),
            schema.kv_heads.into(),
            schema.head_dim.into(),
        )?;
        Ok(Self {
            id: BasisId(basis.id()),
            file_bytes: file.len() as u64,
            basis,
        })
    }

    pub(crate) fn id(&self) -> BasisId {
        self.id
    }

    pub(crate) fn basis(&self) -> &Basis {
        &self.basis
    }
}

impl fmt::Debug for NamespaceBasis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NamespaceBasis").field(&self.id).finish()
    }
}

impl Namespaces {
    /// Keeps a basis with a namespace that is known, durably.
    pub(crate) fn set_basis(&self, id: NamespaceId, file: &[u8]) -> Result<BasisId, CacheError> {
        let schema = self.get(id).ok_or_else(|| {
            let message = format!("namespace {id} is not open here: open it with its schema first");
            CacheError::new(ErrorKind::UnknownNamespace, message)
        })?;
        if file.len() as u64 > self.basis_bytes_max {
            return Err(self.too_many_bytes(file.len() as u64));
        }
        let basis = NamespaceBasis::decode(file, &schema)
            .map_err(|error| CacheError::because(ErrorKind::InvalidArgument, format!("basis: {error}"), error))?;
        let mut by_id = self.by_id.write();
        let same = by_id.values().find_map(|other| {
            let held = other.basis.as_ref()?;
            (held.id == basis.id).then(|| Arc::clone(held))
        });
        let bytes = bytes_of(by_id.values().filter_map(|held| held.basis.as_deref()));
        let Some(namespace) = by_id.get_mut(&id) else {
            return Err(CacheError::new(
                ErrorKind::UnknownNamespace,
                format!("namespace {id} went away"),
            ));
        };
        if let Some(held) = &namespace.basis {
            if held.id == basis.id {
                return Ok(basis.id);
            }
            let message = format!(
                "basis: namespace {id} has basis {} and keeps it, this is {}: open the namespace with that one, or with none",
                held.id, basis.id
            );
            return Err(CacheError::new(ErrorKind::BasisMismatch, message));
        }
        if same.is_none() && bytes + basis.file_bytes > self.basis_bytes_max {
            return Err(self.too_many_bytes(bytes + basis.file_bytes));
        }
        let path = self.dir.join(format!("{id}.basis"));
        write_durably(&path, file).map_err(|error| {
            CacheError::because(
                ErrorKind::Disk,
                format!("cannot write {}: {error}", path.display()),
                error,
            )
        })?;
        let basis_id = basis.id;
        namespace.basis = Some(same.unwrap_or_else(|| Arc::new(basis)));
        Ok(basis_id)
    }

    pub(crate) fn basis(&self, id: NamespaceId) -> Option<Arc<NamespaceBasis>> {
        self.by_id.read().get(&id)?.basis.clone()
    }

    pub(crate) fn has_basis(&self, id: NamespaceId) -> bool {
        self.by_id.read().get(&id).is_some_and(|held| held.basis.is_some())
    }

    /// Namespaces that have one, and bytes of the files of those that differ.
    pub(crate) fn bases(&self) -> (usize, u64) {
        let by_id = self.by_id.read();
        let held = || by_id.values().filter_map(|held| held.basis.as_deref());
        (held().count(), bytes_of(held()))
    }

    /// Reads the bases of all namespaces that are known.
    pub(super) fn read_bases(&self) -> Result<(), CacheError> {
        let mut by_id = self.by_id.write();
        let mut known: Vec<Arc<NamespaceBasis>> = Vec::new();
        for (id, namespace) in by_id.iter_mut() {
            let path = self.dir.join(format!("{id}.basis"));
            let failed = |error: std::io::Error| {
                CacheError::because(
                    ErrorKind::Disk,
                    format!("cannot read the basis in {}: {error}", path.display()),
                    error,
                )
            };
            let file = match fs::read(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            match NamespaceBasis::decode(&file, &namespace.schema) {
                Ok(basis) => {
                    let same = known.iter().find(|held| held.id == basis.id).cloned();
                    let basis = same.unwrap_or_else(|| {
                        let basis = Arc::new(basis);
                        known.push(Arc::clone(&basis));
                        basis
                    });
                    namespace.basis = Some(basis);
                }
                Err(error) => {
                    tracing::warn!(file = %path.display(), %error, "setting the basis of a namespace aside");
                    fs::rename(&path, path.with_extension("basis.broken")).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    fn too_many_bytes(&self, bytes: u64) -> CacheError {
        let message = format!(
            "basis: with this one all bases would have {bytes} bytes, basis_bytes_max is {}: raise it, or go without",
            self.basis_bytes_max
        );
        CacheError::new(ErrorKind::LimitReached, message)
    }
}

fn bytes_of<'a>(bases: impl Iterator<Item = &'a NamespaceBasis>) -> u64 {
    let mut seen: Vec<BasisId> = Vec::new();
    let mut bytes = 0;
    for basis in bases {
        if !seen.contains(&basis.id) {
            seen.push(basis.id);
            bytes += basis.file_bytes;
        }
    }
    bytes
}
