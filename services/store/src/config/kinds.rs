//! Values of keys that are neither numbers nor places alone.

use std::path::PathBuf;

use kvasir_cache::{Admission, DiskPath};
use kvasir_runtime::units::ByteSize;
use serde::{Deserialize, Serialize};

/// Which puts are written to disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskAdmission {
    /// All.
    #[default]
    Always,
    /// Those of blocks that were asked for before, and what is hit again in memory.
    Reuse,
}

impl From<DiskAdmission> for Admission {
    fn from(admission: DiskAdmission) -> Self {
        match admission {
            DiskAdmission::Always => Self::Always,
            DiskAdmission::Reuse => Self::Reuse,
        }
    }
}

/// One of several disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPlace {
    /// Folder on it that the store has for itself.
    pub dir: PathBuf,
    /// Most bytes of segment files there; at least two segments.
    pub bytes_max: ByteSize,
}

impl DiskPlace {
    pub(super) fn path(&self) -> DiskPath {
        DiskPath {
            dir: self.dir.clone(),
            bytes_max: self.bytes_max.as_u64(),
            io: None,
        }
    }
}

/// A host policy as its name.
pub(super) mod host_policy {
    use kvasir_cache::HostPolicy;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(policy: &HostPolicy, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(policy.name())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HostPolicy, D::Error> {
        let name = String::deserialize(deserializer)?;
        HostPolicy::from_name(&name).ok_or_else(|| {
            let known = HostPolicy::ALL.map(HostPolicy::name).join(", ");
            D::Error::custom(format!("unknown host_policy `{name}`: choose one of {known}"))
        })
    }
}
