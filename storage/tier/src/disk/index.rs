//! The durable index: key -> where, in RocksDB. It may lag behind the segments, never run ahead of them, because it is told
//! only of synced records; what it lost is found again by reading segments.
//!
//! Keys: `r` + layer-block key -> location (16 bytes); `s` + segment id -> how far this segment has been indexed, and its
//! generation (8 bytes each; format 1 had no generation); `n` -> the next free segment id (8 bytes); `v` -> the last segment that
//! the scrub has verified (8 bytes).
//! The write-ahead log is not synced: both kinds go into one atomic batch, so a lost batch only means a longer scan.

use std::path::Path;

use kvasir_block::LayerBlockKey;
use rocksdb::{DB, IteratorMode, Options, WriteBatch};

use super::{
    format::{Identity, SegmentId},
    table::{Location, SegmentRef},
};

const RECORD: u8 = b'r';
const SEGMENT: u8 = b's';
const NEXT: &[u8] = b"n";
const VERIFIED: &[u8] = b"v";

pub(crate) struct Index {
    db: DB,
}

/// What an index held when it was opened.
#[derive(Default)]
pub(crate) struct Contents {
    pub(crate) records: Vec<(LayerBlockKey, Location)>,
    /// Up to where each segment is indexed.
    pub(crate) segments: Vec<(Identity, u64)>,
    /// No segment from here on was ever begun; 0 where that is not known.
    pub(crate) next_segment: SegmentId,
    /// Up to which segment the scrub had come; 0 where it is to begin.
    pub(crate) scrubbed_to: SegmentId,
    /// Entries that could not be understood.
    pub(crate) broken: u64,
}

impl Index {
    /// Opens or makes the index of disk number `disk` in `dir` and reads it whole.
    pub(crate) fn open(dir: &Path, disk: u8) -> Result<(Self, Contents), rocksdb::Error> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_paranoid_checks(true);
        options.set_max_open_files(64);
        options.set_write_buffer_size(16 << 20);
        options.set_keep_log_file_num(2);
        options.set_max_total_wal_size(64 << 20);
        options.set_compression_type(rocksdb::DBCompressionType::Lz4);
        // Nobody reads its statistics.
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        let index = Self {
            db: DB::open(&options, dir)?,
        };
        let contents = index.read_all(disk)?;
        Ok((index, contents))
    }

    /// Publishes synced records of one segment, which is now indexed up to `indexed_to`.
    pub(crate) fn publish<'a>(
        &self,
        segment: Identity,
        indexed_to: u64,
        records: impl Iterator<Item = &'a (LayerBlockKey, Location)>,
    ) -> Result<(), rocksdb::Error> {
        let mut batch = WriteBatch::default();
        for (key, location) in records {
            batch.put(record_key(*key), location.encode());
        }
        let mut value = [0; 16];
        value[..8].copy_from_slice(&indexed_to.to_le_bytes());
        value[8..].copy_from_slice(&segment.generation.to_le_bytes());
        batch.put(segment_key(segment.id), value);
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

    /// Notes that all ids before `next` are used up: also when its segment is gone by the next start.
    pub(crate) fn use_up(&self, next: SegmentId) -> Result<(), rocksdb::Error> {
        self.db.put(NEXT, next.to_le_bytes())
    }

    /// Notes that the scrub has verified everything up to a segment; 0 when it begins anew.
    pub(crate) fn scrubbed(&self, to: SegmentId) -> Result<(), rocksdb::Error> {
        self.db.put(VERIFIED, to.to_le_bytes())
    }

    fn read_all(&self, disk: u8) -> Result<Contents, rocksdb::Error> {
        let mut contents = Contents::default();
        for entry in self.db.iterator(IteratorMode::Start) {
            let (key, value) = entry?;
            match key.first() {
                Some(&RECORD) => match (LayerBlockKey::from_bytes(&key[1..]), Location::decode(&value, disk)) {
                    (Ok(key), Some(location)) => contents.records.push((key, location)),
                    _ => contents.broken += 1,
                },
                Some(&SEGMENT) => match (key[1..].try_into(), segment_value(&value)) {
                    (Ok(id), Some((to, generation))) => {
                        let id = u64::from_be_bytes(id);
                        contents.segments.push((Identity { id, generation }, to));
                    }
                    _ => contents.broken += 1,
                },
                _ if key.as_ref() == NEXT => match value.as_ref().try_into() {
                    Ok(next) => contents.next_segment = u64::from_le_bytes(next),
                    Err(_) => contents.broken += 1,
                },
                _ if key.as_ref() == VERIFIED => match value.as_ref().try_into() {
                    Ok(to) => contents.scrubbed_to = u64::from_le_bytes(to),
                    Err(_) => contents.broken += 1,
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
        bytes[..8].copy_from_slice(&self.segment.id().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.offset.to_le_bytes());
        bytes[12..].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8], disk: u8) -> Option<Self> {
        let bytes: &[u8; 16] = bytes.try_into().ok()?;
        let (segment, rest) = bytes.split_first_chunk::<8>()?;
        let (offset, payload_bytes) = rest.split_first_chunk::<4>()?;
        Some(Self {
            segment: SegmentRef::new(disk, u64::from_le_bytes(*segment))?,
            offset: u32::from_le_bytes(*offset),
            payload_bytes: u32::from_le_bytes(payload_bytes.try_into().ok()?),
        })
    }
}

/// Up to where, and the generation; format 1 had none.
fn segment_value(bytes: &[u8]) -> Option<(u64, u64)> {
    let (to, generation) = bytes.split_first_chunk::<8>()?;
    let generation = match generation {
        [] => 0,
        bytes => u64::from_le_bytes(bytes.try_into().ok()?),
    };
    Some((u64::from_le_bytes(*to), generation))
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
