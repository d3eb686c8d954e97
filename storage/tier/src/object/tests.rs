//! The object tier against a real S3 server and a folder, and through a proxy that spoils what passes. Every payload is
//! made from its key, so any reader can tell wrong bytes.

mod hostile;
mod proxy;
mod server;
mod shared;

use std::path::Path;

use kvasir_block::BlockHash;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tempfile::TempDir;

use self::server::{BUCKET, KEY_ID, SECRET, Server};
use super::*;

const NAMESPACE: NamespaceId = NamespaceId::from_bytes([9; 32]);
const OTHER: NamespaceId = NamespaceId::from_bytes([8; 32]);

/// Somewhere to keep objects, and where they lie as files.
enum Home {
    Server(Server),
    Folder(TempDir),
}

impl Home {
    fn config(&self, store: u64) -> ObjectConfig {
        match self {
            Self::Server(server) => s3_config(server.address, store),
            Self::Folder(dir) => small(ObjectConfig::new(
                format!("file://{}", dir.path().display()),
                StoreId::from_u64(store),
            )),
        }
    }

    fn folder(&self) -> std::path::PathBuf {
        match self {
            Self::Server(server) => server.folder(),
            Self::Folder(dir) => dir.path().to_owned(),
        }
    }

    fn open(&self, store: u64) -> ObjectTier {
        open(self.config(store))
    }
}

/// The same for a real S3 server and for a folder.
fn in_each_home(check: impl Fn(&Home)) {
    check(&Home::Folder(TempDir::new().unwrap()));
    check(&Home::Server(Server::start()));
}

fn s3_config(address: std::net::SocketAddr, store: u64) -> ObjectConfig {
    let mut config = small(ObjectConfig::new(
        format!("s3://{BUCKET}/kv/cache"),
        StoreId::from_u64(store),
    ));
    config.endpoint = Some(format!("http://{address}"));
    config.allow_http = true;
    config.path_style = true;
    config.credentials = credentials(SECRET);
    config
}

fn credentials(secret: &str) -> Credentials {
    Credentials::Key {
        id: KEY_ID.to_owned(),
        secret: secret.to_owned(),
        token: None,
    }
}

/// Packs of 16 KiB, and no scan but those that are asked for.
fn small(mut config: ObjectConfig) -> ObjectConfig {
    config.object_bytes = 16 << 10;
    config.queue_bytes_max = 1 << 20;
    config.open_age_max = Duration::from_secs(600);
    config.scan_interval = Duration::from_secs(600);
    config.gap_bytes_max = 1 << 10;
    config.range_bytes_max = 8 << 10;
    config
}

fn open(config: ObjectConfig) -> ObjectTier {
    let tier = ObjectTier::open(config).unwrap();
    assert!(tier.open_namespace(NAMESPACE));
    tier
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Two layers to a block: `key(0)` and `key(1)` are layers of one block.
fn key_in(namespace: NamespaceId, i: u32) -> LayerBlockKey {
    let mut hash = [7; 32];
    hash[..4].copy_from_slice(&(i / 2).to_le_bytes());
    namespace.block(BlockHash::from_bytes(hash)).layer((i % 2) as u16)
}

fn key(i: u32) -> LayerBlockKey {
    key_in(NAMESPACE, i)
}

/// The one right payload of `key(i)`, 1 to 2000 bytes.
fn payload(i: u32) -> Bytes {
    let bytes = StdRng::seed_from_u64(u64::from(i)).random_range(1..=2000);
    let mut out = vec![0; bytes];
    StdRng::seed_from_u64(!u64::from(i)).fill(&mut out[..]);
    Bytes::from(out)
}

fn offer(tier: &ObjectTier, i: u32) -> Offer {
    tier.offer(key(i), payload(i), Checksum::of(&payload(i)))
}

fn put(tier: &ObjectTier, keys: impl IntoIterator<Item = u32>) {
    for i in keys {
        assert_eq!(offer(tier, i), Offer::Queued, "key {i}");
    }
    tier.flush(soon()).unwrap();
}

fn get(tier: &ObjectTier, keys: impl IntoIterator<Item = u32>) -> Vec<ObjectRead> {
    let keys: Vec<_> = keys.into_iter().map(key).collect();
    tier.get_many(&keys, soon())
}

fn hit(i: u32) -> ObjectRead {
    let payload = payload(i);
    let checksum = Checksum::of(&payload);
    ObjectRead::Hit { payload, checksum }
}

#[track_caller]
fn assert_hits(tier: &ObjectTier, keys: impl IntoIterator<Item = u32> + Clone, what: &str) {
    for (i, read) in keys.clone().into_iter().zip(get(tier, keys)) {
        assert_eq!(read, hit(i), "{what}: key {i}");
    }
}
