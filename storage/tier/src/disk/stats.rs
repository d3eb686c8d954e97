//! Plain numbers about the disk tier.

use std::path::PathBuf;

/// Counts and sizes at one moment, of all disks together. Counts are since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Bytes of all segment files.
    pub bytes: u64,
    /// Their limit.
    pub bytes_max: u64,
    /// Segment files.
    pub segments: u64,
    /// Layer blocks on disk.
    pub layer_blocks: u64,
    /// Layer blocks accepted, not yet durable.
    pub queued_layer_blocks: u64,
    /// Their payload bytes.
    pub queue_bytes: u64,
    /// Limit of the payload bytes.
    pub queue_bytes_max: u64,
    /// Offers not taken.
    pub refused: u64,
    /// Records found corrupt or unreadable by reads.
    pub corrupt: u64,
    /// Reads that the disk failed, among them.
    pub read_errors: u64,
    /// Reads that were not begun because their deadline had passed.
    pub too_late: u64,
    /// Segments dropped to make room.
    pub reclaimed_segments: u64,
    /// Layer blocks forgotten with them.
    pub reclaimed_layer_blocks: u64,
    /// Layer blocks of them that were written again, because they were leased or hot.
    pub readmitted_layer_blocks: u64,
    /// Layer blocks of them that a slower tier took.
    pub demoted_layer_blocks: u64,
    /// Layer blocks that were forgotten although they were asked for of late: more of them wanted to stay than half a segment
    /// holds, and no slower tier took them. The disk is too small for what is hot.
    pub forgotten_warm_layer_blocks: u64,
    /// Segments that take nothing more because a write, a sync or three reads of them failed.
    pub retired_segments: u64,
    /// Batches synced.
    pub syncs: u64,
    /// Failed attempts to write.
    pub failures: u64,
    /// Payload bytes written and synced, those written again included.
    pub payload_bytes_written: u64,
    /// Bytes that were written for them: headers and padding too.
    pub bytes_written: u64,
    /// Bytes that the scrub has read and verified.
    pub scrubbed_bytes: u64,
    /// Wrong records that the scrub found and dropped.
    pub scrub_corrupt: u64,
    /// Why nothing is taken at the moment: every disk has a reason, this is one of them.
    pub degraded: Option<String>,
    /// Each disk, in the order of the configuration.
    pub disks: Vec<OneDiskStats>,
}

/// One disk at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OneDiskStats {
    /// Its folder.
    pub dir: PathBuf,
    /// Bytes of its segment files.
    pub bytes: u64,
    /// Their limit.
    pub bytes_max: u64,
    /// Its segment files.
    pub segments: u64,
    /// How it is read and written: `io_uring` or `psync`.
    pub io: &'static str,
    /// Whether its files go past the page cache.
    pub direct: bool,
    /// Left out at the start, with the reason; all else is then zero.
    pub absent: Option<String>,
    /// Why it takes nothing at the moment.
    pub degraded: Option<String>,
    /// Microseconds that a read takes, of late.
    pub read_micros: u64,
    /// Bytes per second of a read, of late.
    pub read_bytes_per_second: u64,
}

pub(super) fn of(shared: &super::Shared, state: &super::State) -> DiskStats {
    let super::State {
        table, health, counts, ..
    } = state;
    let present = shared.volumes.iter().zip(health).map(|(volume, health)| OneDiskStats {
        dir: volume.dir.clone(),
        bytes: table.disk_bytes(volume.number),
        bytes_max: volume.bytes_max,
        segments: table.segments_of(volume.number),
        io: volume.io.name(),
        direct: volume.direct,
        absent: None,
        degraded: health.degraded.clone(),
        read_micros: volume.pace.micros(),
        read_bytes_per_second: volume.pace.bytes_per_second(),
    });
    let absent = shared.absent.iter().map(|(dir, reason)| OneDiskStats {
        dir: dir.clone(),
        absent: Some(reason.clone()),
        ..OneDiskStats::default()
    });
    let mut disks: Vec<OneDiskStats> = present.chain(absent).collect();
    disks.sort_by_key(|one| shared.config.disks.iter().position(|disk| disk.dir == one.dir));
    DiskStats {
        bytes: disks.iter().map(|disk| disk.bytes).sum(),
        bytes_max: shared.volumes.iter().map(|volume| volume.bytes_max).sum(),
        segments: table.segments.len() as u64,
        layer_blocks: table.stored,
        queued_layer_blocks: table.queued,
        queue_bytes: table.queue_bytes,
        queue_bytes_max: shared.config.queue_bytes_max,
        refused: counts.refused,
        corrupt: counts.corrupt,
        read_errors: counts.read_errors,
        too_late: counts.too_late,
        reclaimed_segments: counts.reclaimed_segments,
        reclaimed_layer_blocks: counts.reclaimed_layer_blocks,
        readmitted_layer_blocks: counts.readmitted_layer_blocks,
        demoted_layer_blocks: counts.demoted_layer_blocks,
        forgotten_warm_layer_blocks: counts.forgotten_warm_layer_blocks,
        retired_segments: counts.retired_segments,
        syncs: counts.syncs,
        failures: counts.failures,
        payload_bytes_written: counts.payload_bytes_written,
        bytes_written: counts.bytes_written,
        scrubbed_bytes: counts.scrubbed_bytes,
        scrub_corrupt: counts.scrub_corrupt,
        degraded: state.degraded(),
        disks,
    }
}
