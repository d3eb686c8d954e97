//! Segment files: appending, reading and scanning. Knows nothing of the index or the queue.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use kvasir_block::{
    Checksum, LayerBlockKey,
    planted::{Bug, planted, point},
};
use kvasir_device::{BlockFile, Buffer, FileIo, ReadAt, ReadOutcome, WriteAt};

use super::{
    format::{Identity, PAGE, RECORD_ALIGN, RECORD_HEADER_BYTES, RecordHeader, SegmentHeader, SegmentId, record_bytes},
    table::{Location, SegmentRef},
    volume::Volume,
};

/// A layer block on its way to disk.
pub(crate) type Record = (LayerBlockKey, Bytes, Checksum);

/// Ending of the names of spare files.
const SPARE: &str = "spare";
/// Bytes that a scan reads at a time, where records are smaller.
const SCAN_BYTES: u64 = 4 << 20;

pub(crate) fn segment_path(dir: &Path, id: SegmentId) -> PathBuf {
    dir.join(format!("{id:016x}.seg"))
}

/// Where a segment's file waits to become another one. What lies there at the start is of no use and removed.
pub(crate) fn spare_path(segment: &Path) -> PathBuf {
    segment.with_extension(SPARE)
}

/// Whether a file is such a one.
pub(crate) fn is_spare(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == SPARE)
}

/// The id in a segment's file name.
pub(crate) fn segment_id(path: &Path) -> Option<SegmentId> {
    let name = path.file_name()?.to_str()?.strip_suffix(".seg")?;
    (name.len() == 16)
        .then(|| SegmentId::from_str_radix(name, 16).ok())
        .flatten()
}

/// Makes a folder's own entries durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The one segment of a disk that is appended to.
///
/// Invariant: everything before `end` was synced, or was read back and verified and then synced; `end` is a multiple of a
/// page, so that no later write touches a sector that was synced.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    pub(crate) at: SegmentRef,
    pub(crate) identity: Identity,
    pub(crate) file: Arc<BlockFile>,
    pub(crate) end: u64,
    /// Bytes of the file, allocated.
    pub(crate) bytes: u64,
}

impl SegmentWriter {
    /// A new segment file of `bytes` bytes, its space allocated and its name durable; made of a spare file where there is one. What
    /// that has in it names another segment, and so counts for nothing here.
    pub(crate) fn create(
        volume: &Volume,
        at: SegmentRef,
        identity: Identity,
        bytes: u64,
        spare: Option<&Path>,
    ) -> io::Result<Self> {
        let dir = volume.segments_dir();
        let path = segment_path(&dir, identity.id);
        let file = match spare {
            Some(spare) => {
                std::fs::rename(spare, &path)?;
                point("segment: made of a spare");
                BlockFile::open(&path, volume.direct).inspect_err(|_| {
                    let _ = std::fs::remove_file(&path);
                })?
            }
            None => BlockFile::create(&path, volume.direct)?,
        };
        let made = Self::begin(&*volume.io, &file, identity, bytes).and_then(|()| sync_dir(&dir));
        if let Err(error) = made {
            // A half-made segment would only be tidied up at the next start.
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        Ok(Self {
            at,
            identity,
            file: Arc::new(file),
            end: PAGE,
            bytes,
        })
    }

    fn begin(io: &dyn FileIo, file: &BlockFile, identity: Identity, bytes: u64) -> io::Result<()> {
        io.preallocate(file, bytes)?;
        let mut page = Buffer::heap(PAGE as usize);
        let header = SegmentHeader::encode(identity);
        page.as_mut_slice()[..header.len()].copy_from_slice(&header);
        let write = WriteAt {
            offset: 0,
            bytes: page.as_slice(),
        };
        // Synced with the first batch: until then there is nothing in it to be lost.
        io.write_many(file, &[write])
    }

    /// Bytes that records may still take.
    pub(crate) fn room(&self) -> u64 {
        self.bytes.saturating_sub(self.end)
    }

    /// Appends `records` and syncs them; answers where they lie. On an error nothing counts as written.
    pub(crate) fn append(
        &mut self,
        io: &dyn FileIo,
        records: &[Record],
        staging: &mut Buffer,
    ) -> io::Result<Vec<Location>> {
        let bytes: u64 = records.iter().map(|(_, payload, _)| record_bytes(payload.len())).sum();
        let bytes = bytes.next_multiple_of(PAGE);
        if (staging.len() as u64) < bytes {
            *staging = Buffer::heap(bytes as usize);
        }
        let mut locations = Vec::with_capacity(records.len());
        let mut headers = Vec::with_capacity(records.len());
        let mut offset = self.end;
        for (key, payload, checksum) in records {
            let header = RecordHeader {
                segment: self.identity,
                offset,
                key: *key,
                payload_bytes: payload.len() as u32,
                payload_checksum: *checksum,
            };
            headers.push(header.encode());
            locations.push(Location {
                segment: self.at,
                offset: offset as u32,
                payload_bytes: header.payload_bytes,
            });
            offset += record_bytes(payload.len());
        }
        let mut packer = Packer {
            records: records.iter().zip(&headers),
            current: None,
        };
        let staged = &mut staging.as_mut_slice()[..bytes as usize];
        io.write_filled(&self.file, self.end, staged, &mut |piece| packer.fill(piece))?;
        point("publish: written");
        if !planted(Bug::PublishBeforeSync) {
            self.sync(io)?;
        }
        self.end += bytes;
        Ok(locations)
    }

    /// Once for what was written; never again after it failed.
    pub(crate) fn sync(&self, io: &dyn FileIo) -> io::Result<()> {
        let synced = io.sync_data(&self.file);
        if synced.is_err() && planted(Bug::SyncRetried) {
            return io.sync_data(&self.file);
        }
        synced
    }
}

/// Records as the bytes of a batch, one stretch after the other.
struct Packer<'a, I> {
    records: I,
    /// What is left of the record at hand: header, payload, padding.
    current: Option<[&'a [u8]; 3]>,
}

impl<'a, I: Iterator<Item = (&'a Record, &'a [u8; RECORD_HEADER_BYTES])>> Packer<'a, I> {
    /// The next bytes; zeros behind the last record.
    fn fill(&mut self, mut piece: &mut [u8]) {
        const ZEROS: [u8; RECORD_ALIGN as usize] = [0; RECORD_ALIGN as usize];
        while !piece.is_empty() {
            let next = || {
                let ((_, payload, _), header) = self.records.next()?;
                let padding = record_bytes(payload.len()) as usize - RECORD_HEADER_BYTES - payload.len();
                Some([&header[..], &payload[..], &ZEROS[..padding]])
            };
            let Some(mut parts) = self.current.take().or_else(next) else {
                return piece.fill(0);
            };
            for part in &mut parts {
                let (now, later) = part.split_at(part.len().min(piece.len()));
                let (to, rest) = piece.split_at_mut(now.len());
                to.copy_from_slice(now);
                (*part, piece) = (later, rest);
            }
            self.current = parts.iter().any(|part| !part.is_empty()).then_some(parts);
        }
    }
}

/// The whole pages that hold a record: from which offset, how many bytes, and where in them the record begins.
pub(crate) fn pages_of(location: Location) -> (u64, usize, usize) {
    let offset = u64::from(location.offset);
    let start = offset - offset % PAGE;
    let end = (offset + RECORD_HEADER_BYTES as u64 + u64::from(location.payload_bytes)).next_multiple_of(PAGE);
    (start, (end - start) as usize, (offset - start) as usize)
}

/// Verifies that `pages`, read as [`pages_of`] says, hold the record of `key`; its checksum, or `None` if a byte is wrong.
/// The payload begins [`RECORD_HEADER_BYTES`] behind the record.
pub(crate) fn verify(pages: &[u8], segment: Identity, key: LayerBlockKey, location: Location) -> Option<Checksum> {
    let (_, _, skew) = pages_of(location);
    let record = pages.get(skew..)?;
    let header = RecordHeader::decode(record.first_chunk()?, segment.id, u64::from(location.offset))?;
    let payload = record.get(RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + location.payload_bytes as usize)?;
    let right = (header.segment == segment || planted(Bug::StaleGenerationAccepted))
        && (header.key == key || planted(Bug::ForeignRecordAccepted))
        && header.payload_bytes == location.payload_bytes
        && (header.payload_checksum.verifies(payload) || planted(Bug::DiskChecksumSkipped));
    right.then_some(header.payload_checksum)
}

/// What a scan of a segment found.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) records: Vec<(LayerBlockKey, Location)>,
    /// Where the last whole record ends; what lies behind it is torn, or was never written.
    pub(crate) end: u64,
    /// Behind the last byte that is not zero, nor of a whole record of the segment that the file was before.
    pub(crate) written_end: u64,
    /// Whole headers whose payload did not verify, before `end`, and a place where the disk could not be read.
    pub(crate) corrupt: u64,
    /// The generation that its records name.
    pub(crate) generation: Option<u64>,
}

/// Verifies every record from `from` to the end of the file. Behind a broken header, and behind the header of a payload that
/// does not verify, it goes on at the next aligned place that holds a header made for that place: neither a flipped bit nor a
/// record that was left over costs those behind it. A place that cannot be read ends the scan. Where the `generation` is not known, the first record tells it.
pub(crate) fn scan(
    io: &dyn FileIo,
    file: &BlockFile,
    at: SegmentRef,
    generation: Option<u64>,
    from: u64,
    file_bytes: u64,
) -> Scan {
    let mut scan = Scan {
        end: from,
        written_end: from,
        generation,
        ..Scan::default()
    };
    let mut window = Window::new(io, file, file_bytes);
    let (mut offset, mut corrupt) = (from, 0);
    let mut looked_to = from;
    // Of a file that was another segment before: whole records of that one are no part of this one.
    let mut left_over_to = from;
    while offset + RECORD_HEADER_BYTES as u64 <= file_bytes {
        // Once for each stretch that a window holds: whether anything was ever written here.
        if offset >= looked_to {
            looked_to = offset + SCAN_BYTES;
            match io.next_written(file, offset) {
                Ok(Some(at)) if at > offset => {
                    offset = at - at % RECORD_ALIGN;
                    looked_to = offset + SCAN_BYTES;
                    continue;
                }
                Ok(None) => break,
                // What cannot tell is read.
                Ok(Some(_)) | Err(_) => {}
            }
        }
        let Some(bytes) = window.bytes(offset, RECORD_HEADER_BYTES) else {
            scan.corrupt = corrupt + 1;
            return scan;
        };
        let header = bytes
            .first_chunk()
            .and_then(|header| RecordHeader::decode(header, at.id(), offset))
            .filter(|header| {
                let known = scan.generation.filter(|_| !planted(Bug::StaleGenerationAccepted));
                known.is_none_or(|known| known == header.segment.generation)
            });
        let Some(record) = header else {
            let step = &bytes[..RECORD_ALIGN as usize];
            if let Some(bytes) = bytes
                .first_chunk()
                .and_then(|header| RecordHeader::left_over(header, at.id(), offset))
            {
                left_over_to = offset + bytes;
            } else if offset >= left_over_to
                && let Some(last) = step.iter().rposition(|&byte| byte != 0)
            {
                scan.written_end = offset + last as u64 + 1;
            }
            offset += RECORD_ALIGN;
            continue;
        };
        let payload_at = offset + RECORD_HEADER_BYTES as u64;
        let payload_end = payload_at + u64::from(record.payload_bytes);
        scan.written_end = payload_at;
        // The padding may be missing at the end of a file; the payload may not.
        if payload_end > file_bytes {
            corrupt += 1;
            offset += RECORD_ALIGN;
            continue;
        }
        let Some(payload) = window.bytes(payload_at, record.payload_bytes as usize) else {
            scan.corrupt = corrupt + 1;
            return scan;
        };
        let next = offset + record_bytes(record.payload_bytes as usize);
        if record.payload_checksum.verifies(payload) || planted(Bug::TornPayloadAccepted) {
            let location = Location {
                segment: at,
                offset: offset as u32,
                payload_bytes: record.payload_bytes,
            };
            scan.records.push((record.key, location));
            scan.end = next;
            scan.written_end = next;
            scan.corrupt = corrupt;
            scan.generation = Some(record.segment.generation);
            offset = next;
        } else {
            corrupt += 1;
            scan.written_end = payload_end;
            // Its length is not to be believed either: a header left over from a lost write lies where it says it does, and whole
            // records may begin inside what it claims.
            offset += RECORD_ALIGN;
        }
    }
    // A rest too short for a header, in a file that was cut.
    if offset + RECORD_HEADER_BYTES as u64 > file_bytes
        && let Some(rest) = window.bytes(offset, file_bytes.saturating_sub(offset) as usize)
        && let Some(last) = rest.iter().rposition(|&byte| byte != 0)
    {
        scan.written_end = offset + last as u64 + 1;
    }
    scan
}

/// A stretch of a file in memory, read on as it is asked for.
struct Window<'a> {
    io: &'a dyn FileIo,
    file: &'a BlockFile,
    file_bytes: u64,
    buffer: Buffer,
    start: u64,
    filled: usize,
}

impl<'a> Window<'a> {
    fn new(io: &'a dyn FileIo, file: &'a BlockFile, file_bytes: u64) -> Self {
        Self {
            io,
            file,
            file_bytes,
            buffer: Buffer::heap(0),
            start: 0,
            filled: 0,
        }
    }

    /// `None` where the disk does not give them.
    fn bytes(&mut self, offset: u64, bytes: usize) -> Option<&[u8]> {
        let end = offset + bytes as u64;
        if offset < self.start || end > self.start + self.filled as u64 {
            self.start = offset - offset % PAGE;
            let wanted = (end - self.start).max(SCAN_BYTES.min(self.file_bytes.saturating_sub(self.start)));
            let wanted = wanted.next_multiple_of(PAGE) as usize;
            if self.buffer.len() < wanted {
                self.buffer = Buffer::heap(wanted);
            }
            let mut reads = [ReadAt::new(
                self.file,
                self.start,
                &mut self.buffer.as_mut_slice()[..wanted],
            )];
            self.io.read_many(&mut reads, None);
            self.filled = match &reads[0].outcome {
                ReadOutcome::Read(done) => *done,
                ReadOutcome::Failed(error) => {
                    tracing::warn!(file = %self.file.path().display(), offset, %error, "a segment cannot be read on");
                    0
                }
                ReadOutcome::TooLate => 0,
            };
        }
        let from = (offset - self.start) as usize;
        self.buffer.as_slice().get(..self.filled)?.get(from..from + bytes)
    }
}
