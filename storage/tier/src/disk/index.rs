//! The durable index: key -> where, in RocksDB. It may lag behind the segments, never run ahead of them, because it is told
//! only of synced records; what it lost is found again by reading segments.
//!
//! Keys: `r` + layer-block key -> location (16 bytes); `s` + segment id -> how far this segment has been indexed (8 bytes).
//! The write-ahead log is not synced: both kinds go into one atomic batch, so a lost batch only means a longer scan.

use std::path::Path;

use kvasir_block::LayerBlockKey;
use rocksdb::{DB, IteratorMode, Options, WriteBatch};

use super::{format::SegmentId, table::Location};

const RECORD: u8 = b'r';
const SEGMENT: u8 = b's';

pub(crate) struct Index {
    db: DB,
}

/// What an index held when it was opened.
#[derive(Default)]
pub(crate) struct Contents {
    pub(crate) records: Vec<(LayerBlockKey, Location)>,
    pub(crate) indexed_to: Vec<(SegmentId, u64)>,
    /// Entries that could not be understood.
    pub(crate) broken: u64,
}

impl Index {
    /// Opens or makes the index in `dir` and reads it whole.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Contents), rocksdb::Error> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_paranoid_checks(true);
        options.set_max_open_files(64);
        options.set_write_buffer_size(16 << 20);
        options.set_keep_log_file_num(2);
        options.set_max_total_wal_size(64 << 20);
        options.set_compression_type(rocksdb::DBCompressionType::Lz4);
        let index = Self {
            db: DB::open(&options, dir)?,
        };
        let contents = index.read_all()?;
        Ok((index, contents))
    }

    /// Publishes synced records of one segment, which is now indexed up to `indexed_to`.
    pub(crate) fn publish<'a>(
        &self,
        segment: SegmentId,
        indexed_to: u64,
        records: impl Iterator<Item = &'a (LayerBlockKey, Location)>,
    ) -> Result<(), rocksdb::Error> {
        let mut batch = WriteBatch::default();
        for (key, location) in records {
            batch.put(record_key(*key), location.encode());
        }
        batch.put(segment_key(segment), indexed_to.to_le_bytes());
        self.db.write(batch)
    }

    /// Forgets records, and a whole segment if one is named.
    pub(crate) fn forget(
        &self,
        segment: Option<SegmentId>,
        records: impl Iterator<Item = LayerBlockKey>,
    ) -> Result<(), rocksdb::Error> {
        let mut batch = WriteBatch::default();
        for key in records {
            batch.delete(record_key(key));
        }
        if let Some(segment) = segment {
            batch.delete(segment_key(segment));
        }
        self.db.write(batch)
    }

    fn read_all(&self) -> Result<Contents, rocksdb::Error> {
        let mut contents = Contents::default();
        for entry in self.db.iterator(IteratorMode::Start) {
            let (key, value) = entry?;
            match key.first() {
                Some(&RECORD) => match (LayerBlockKey::from_bytes(&key[1..]), Location::decode(&value)) {
                    (Ok(key), Some(location)) => contents.records.push((key, location)),
                    _ => contents.broken += 1,
                },
                Some(&SEGMENT) => match (key[1..].try_into(), value.as_ref().try_into()) {
                    (Ok(id), Ok(to)) => contents
                        .indexed_to
                        .push((u64::from_be_bytes(id), u64::from_le_bytes(to))),
                    _ => contents.broken += 1,
                },
                _ => contents.broken += 1,
            }
        }
        Ok(contents)
    }
}

impl Location {
    fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.segment.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.offset.to_le_bytes());
        bytes[12..].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 16] = bytes.try_into().ok()?;
        let (segment, rest) = bytes.split_first_chunk::<8>()?;
        let (offset, payload_bytes) = rest.split_first_chunk::<4>()?;
        Some(Self {
            segment: u64::from_le_bytes(*segment),
            offset: u32::from_le_bytes(*offset),
            payload_bytes: u32::from_le_bytes(payload_bytes.try_into().ok()?),
        })
    }
}

fn record_key(key: LayerBlockKey) -> [u8; 1 + LayerBlockKey::BYTES] {
    let mut bytes = [RECORD; 1 + LayerBlockKey::BYTES];
    bytes[1..].copy_from_slice(&key.to_bytes());
    bytes
}

fn segment_key(id: SegmentId) -> [u8; 9] {
    let mut bytes = [SEGMENT; 9];
    bytes[1..].copy_from_slice(&id.to_be_bytes());
    bytes
}
