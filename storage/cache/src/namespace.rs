//! Namespaces on disk: one small file each (and one more for the sketch basis, where there is one), with the whole schema, so that blocks found after a restart can be served.
//!
//! Invariant: a namespace in `by_id` has the id that its tenant and schema hash to, and its file is durable. A file that
//! says otherwise is set aside: the worker that comes back declares its namespace again, under the same id.

mod basis;
mod codec;

use std::{collections::HashMap, fs, path::PathBuf, sync::Arc};

use kvasir_block::{KvSchema, NamespaceId, Tenant};
use kvasir_tier::Owner;
use parking_lot::{Mutex, RwLock};

pub use self::basis::BasisId;
pub(crate) use self::basis::NamespaceBasis;
use crate::{CacheError, ErrorKind, small_file::write_durably};

pub(crate) struct Namespaces {
    dir: PathBuf,
    max: usize,
    basis_bytes_max: u64,
    by_id: RwLock<HashMap<NamespaceId, Namespace>>,
    owners: Owners,
}

#[derive(Debug)]
struct Namespace {
    schema: Arc<KvSchema>,
    owner: Owner,
    basis: Option<Arc<NamespaceBasis>>,
}

impl Namespace {
    fn new(schema: KvSchema, owner: Owner) -> Self {
        Self {
            schema: Arc::new(schema),
            owner,
            basis: None,
        }
    }
}

/// A number for each tenant, as the host tier counts them; as many as there are namespaces, at most.
#[derive(Default)]
struct Owners(Mutex<HashMap<Tenant, Owner>>);

impl Owners {
    fn of(&self, tenant: &Tenant) -> Owner {
        let mut owners = self.0.lock();
        let next = Owner::new(owners.len() as u32);
        *owners.entry(tenant.clone()).or_insert(next)
    }
}

impl Namespaces {
    /// Opens the folder and reads what is in it.
    pub(crate) fn open(dir: PathBuf, max: usize, basis_bytes_max: u64) -> Result<Self, CacheError> {
        let failed = |error: std::io::Error| {
            CacheError::because(
                ErrorKind::Disk,
                format!("cannot read the namespaces in {}: {error}", dir.display()),
                error,
            )
        };
        fs::create_dir_all(&dir).map_err(failed)?;
        let (mut by_id, owners) = (HashMap::new(), Owners::default());
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|extension| extension != "kvns") {
                continue;
            }
            let bytes = fs::read(&path).map_err(failed)?;
            let decoded = codec::decode(&bytes);
            let expected = path.file_stem().and_then(|stem| stem.to_str());
            match decoded {
                Ok((id, tenant, schema)) if expected == Some(id.to_string().as_str()) => {
                    by_id.insert(id, Namespace::new(schema, owners.of(&tenant)));
                }
                other => {
                    let reason = other
                        .err()
                        .map_or_else(|| "it describes another namespace".to_owned(), |e| e.to_string());
                    tracing::warn!(file = %path.display(), reason, "setting a namespace file aside");
                    fs::rename(&path, path.with_extension("broken")).map_err(failed)?;
                }
            }
        }
        let namespaces = Self {
            dir,
            max,
            basis_bytes_max,
            by_id: RwLock::new(by_id),
            owners,
        };
        namespaces.read_bases()?;
        Ok(namespaces)
    }

    /// Declares a namespace, durably; true if it is new here.
    pub(crate) fn declare(&self, tenant: &Tenant, schema: &KvSchema) -> Result<(NamespaceId, bool), CacheError> {
        schema.validate().map_err(|error| {
            CacheError::because(
                ErrorKind::InvalidArgument,
                format!("this schema cannot be served: {error}"),
                error,
            )
        })?;
        let id = NamespaceId::new(tenant, schema);
        self.admit(id, tenant, schema).map(|new| (id, new))
    }

    /// Takes `schema` under `id`, unless another has it.
    fn admit(&self, id: NamespaceId, tenant: &Tenant, schema: &KvSchema) -> Result<bool, CacheError> {
        let mut by_id = self.by_id.write();
        if let Some(known) = by_id.get(&id) {
            return match known.schema.first_difference(schema) {
                None => Ok(false),
                Some(field) => Err(CacheError::new(
                    ErrorKind::SchemaMismatch,
                    format!("namespace {id} is held with another {field}: open a namespace of its own for this schema"),
                )),
            };
        }
        if by_id.len() >= self.max {
            let message = format!(
                "{} namespaces are open, namespaces_max allows no more: raise it",
                self.max
            );
            return Err(CacheError::new(ErrorKind::LimitReached, message));
        }
        let path = self.dir.join(format!("{id}.kvns"));
        write_durably(&path, &codec::encode(tenant, schema)).map_err(|error| {
            CacheError::because(
                ErrorKind::Disk,
                format!("cannot write {}: {error}", path.display()),
                error,
            )
        })?;
        by_id.insert(id, Namespace::new(schema.clone(), self.owners.of(tenant)));
        Ok(true)
    }

    pub(crate) fn get(&self, id: NamespaceId) -> Option<Arc<KvSchema>> {
        self.by_id.read().get(&id).map(|held| Arc::clone(&held.schema))
    }

    /// Every tenant that has a namespace here, with its number.
    pub(crate) fn tenants(&self) -> Vec<(Tenant, Owner)> {
        let owners = self.owners.0.lock();
        owners.iter().map(|(tenant, &owner)| (tenant.clone(), owner)).collect()
    }

    /// Whose blocks a namespace's are.
    pub(crate) fn owner(&self, id: NamespaceId) -> Owner {
        self.by_id.read().get(&id).map(|held| held.owner).unwrap_or_default()
    }

    /// Layers of a namespace's schema.
    pub(crate) fn layers(&self, id: NamespaceId) -> Option<usize> {
        self.by_id.read().get(&id).map(|held| usize::from(held.schema.layers))
    }

    /// All of them.
    pub(crate) fn ids(&self) -> Vec<NamespaceId> {
        self.by_id.read().keys().copied().collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.read().len()
    }
}

#[cfg(test)]
mod tests;
