//! Keys: a block's complete identity in a fixed number of bytes.

use std::fmt;

use crate::{
    BlockHash, NamespaceId,
    planted::{Bug, planted},
};

/// A token block inside a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey {
    /// Tenant, model and schema.
    pub namespace: NamespaceId,
    /// The block's chained hash.
    pub hash: BlockHash,
}

impl BlockKey {
    /// Key of one layer of this block.
    pub const fn layer(self, layer: u16) -> LayerBlockKey {
        LayerBlockKey {
            namespace: self.namespace,
            hash: self.hash,
            layer,
        }
    }
}

/// The K and V of one block in one layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerBlockKey {
    /// Tenant, model and schema.
    pub namespace: NamespaceId,
    /// The block's chained hash.
    pub hash: BlockHash,
    /// Layer index from 0.
    pub layer: u16,
}

/// Bytes that are not a [`LayerBlockKey`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a layer-block key has {} bytes, these are {found}", LayerBlockKey::BYTES)]
pub struct InvalidKey {
    /// Bytes that were given.
    pub found: usize,
}

impl LayerBlockKey {
    /// Bytes of an encoded key: namespace, hash, layer in big-endian so that keys sort by block, then layer.
    pub const BYTES: usize = 32 + 32 + 2;

    /// The block this layer belongs to.
    pub const fn block(&self) -> BlockKey {
        BlockKey {
            namespace: self.namespace,
            hash: self.hash,
        }
    }

    /// The key as bytes.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(self.namespace.as_bytes());
        bytes[32..64].copy_from_slice(self.hash.as_bytes());
        if !planted(Bug::LayerIgnored) {
            bytes[64..].copy_from_slice(&self.layer.to_be_bytes());
        }
        bytes
    }

    /// The key in `bytes`.
    ///
    /// # Errors
    /// [`InvalidKey`] unless there are exactly [`Self::BYTES`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, InvalidKey> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().map_err(|_| InvalidKey { found: bytes.len() })?;
        let mut namespace = [0; 32];
        let mut hash = [0; 32];
        namespace.copy_from_slice(&bytes[..32]);
        hash.copy_from_slice(&bytes[32..64]);
        Ok(Self {
            namespace: NamespaceId::from_bytes(namespace),
            hash: BlockHash::from_bytes(hash),
            layer: u16::from_be_bytes([bytes[64], bytes[65]]),
        })
    }
}

impl fmt::Debug for LayerBlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{:?}/{}", self.namespace, self.hash, self.layer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_round_trip_and_sort_like_keys(a: ([u8; 32], [u8; 32], u16), b: ([u8; 32], [u8; 32], u16)) {
            let key = |(namespace, hash, layer)| LayerBlockKey {
                namespace: NamespaceId::from_bytes(namespace), hash: BlockHash::from_bytes(hash), layer,
            };
            let (a, b) = (key(a), key(b));
            prop_assert_eq!(LayerBlockKey::from_bytes(&a.to_bytes()), Ok(a));
            prop_assert_eq!(a.to_bytes().cmp(&b.to_bytes()), a.cmp(&b));
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        for found in [0, 1, 65, 67, 1000] {
            assert_eq!(LayerBlockKey::from_bytes(&vec![0; found]), Err(InvalidKey { found }));
        }
    }
}
