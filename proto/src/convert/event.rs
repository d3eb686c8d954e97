//! Block events: what a holder has, and how that changes.

use bytes::Bytes;
use kvasir_block::{BlockHash, NamespaceId};

use super::{InvalidMessage, hash_at, hash_bytes, namespace_bytes, optional_namespace};
use crate::v1;

/// What an event says about its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// Part of the consistent snapshot that opens a watch.
    Snapshot,
    /// The snapshot is complete.
    SnapshotEnd,
    /// The blocks became available.
    Stored,
    /// The blocks ceased to be available.
    Removed,
}

/// Where a block is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Memory of an accelerator, or a worker's page pool.
    Device,
    /// Memory of a store.
    Host,
    /// Disk of a store.
    Disk,
    /// Object storage.
    Object,
}

/// One event: several blocks of one namespace at one holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockEvents {
    /// Changes when the holder starts anew.
    pub epoch: u64,
    /// Rises by one per event inside an epoch.
    pub sequence: u64,
    /// What happened.
    pub kind: EventKind,
    /// Namespace of the blocks; `None` where the event has no blocks.
    pub namespace: Option<NamespaceId>,
    /// Names of the blocks.
    pub hashes: Vec<BlockHash>,
    /// Where they are held; `None` when the holder does not say.
    pub tier: Option<Tier>,
}

impl From<BlockEvents> for v1::BlockEvent {
    fn from(event: BlockEvents) -> Self {
        let BlockEvents {
            epoch,
            sequence,
            kind,
            namespace,
            hashes,
            tier,
        } = event;
        let kind = match kind {
            EventKind::Snapshot => v1::block_event::Kind::Snapshot,
            EventKind::SnapshotEnd => v1::block_event::Kind::SnapshotEnd,
            EventKind::Stored => v1::block_event::Kind::Stored,
            EventKind::Removed => v1::block_event::Kind::Removed,
        };
        Self {
            epoch,
            sequence,
            kind: kind.into(),
            namespace: namespace.map_or_else(Bytes::new, namespace_bytes),
            hashes: hash_bytes(&hashes),
            tier: tier.map_or(v1::Tier::Unspecified, v1::Tier::from).into(),
        }
    }
}

impl TryFrom<v1::BlockEvent> for BlockEvents {
    type Error = InvalidMessage;

    fn try_from(event: v1::BlockEvent) -> Result<Self, InvalidMessage> {
        let kind = match event.kind() {
            v1::block_event::Kind::Snapshot => EventKind::Snapshot,
            v1::block_event::Kind::SnapshotEnd => EventKind::SnapshotEnd,
            v1::block_event::Kind::Stored => EventKind::Stored,
            v1::block_event::Kind::Removed => EventKind::Removed,
            v1::block_event::Kind::Unspecified => {
                return Err(InvalidMessage::new(
                    "kind",
                    format!("{} is no kind of event", event.kind),
                ));
            }
        };
        let tier = match event.tier() {
            v1::Tier::Unspecified => None,
            v1::Tier::Device => Some(Tier::Device),
            v1::Tier::Host => Some(Tier::Host),
            v1::Tier::Disk => Some(Tier::Disk),
            v1::Tier::Object => Some(Tier::Object),
        };
        let namespace = optional_namespace(&event.namespace)?;
        if namespace.is_none() && !event.hashes.is_empty() {
            return Err(InvalidMessage::new("namespace", "empty, but the event names blocks"));
        }
        let hashes = event
            .hashes
            .iter()
            .enumerate()
            .map(|(index, bytes)| hash_at("hashes", index, bytes))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            epoch: event.epoch,
            sequence: event.sequence,
            kind,
            namespace,
            hashes,
            tier,
        })
    }
}

impl From<Tier> for v1::Tier {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Device => Self::Device,
            Tier::Host => Self::Host,
            Tier::Disk => Self::Disk,
            Tier::Object => Self::Object,
        }
    }
}
