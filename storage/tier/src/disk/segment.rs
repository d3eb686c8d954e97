//! Segment files: appending, reading and scanning. Knows nothing of the index or the queue.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use kvasir_block::{Checksum, LayerBlockKey};

use super::{
    faults::Faults,
    format::{
        RECORD_ALIGN, RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentId, record_bytes,
    },
    table::Location,
};

/// A layer block on its way to disk.
pub(crate) type Record = (LayerBlockKey, Bytes, Checksum);

pub(crate) fn segment_path(dir: &Path, id: SegmentId) -> PathBuf {
    dir.join(format!("{id:016x}.seg"))
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

/// The one segment that is appended to.
///
/// Invariant: everything before `end` was synced, or was read back and verified and then synced.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    pub(crate) id: SegmentId,
    pub(crate) file: Arc<File>,
    pub(crate) end: u64,
}

impl SegmentWriter {
    /// A new segment file, its name already durable.
    pub(crate) fn create(dir: &Path, id: SegmentId, faults: &Faults) -> io::Result<Self> {
        faults.check_write()?;
        let path = segment_path(dir, id);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        let made = (&file)
            .write_all(&SegmentHeader::encode(id))
            .and_then(|()| sync_dir(dir));
        if let Err(error) = made {
            // A half-made segment would only be tidied up at the next start.
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        Ok(Self {
            id,
            file: Arc::new(file),
            end: SEGMENT_HEADER_BYTES as u64,
        })
    }

    /// Appends `records` and syncs them; answers where they lie. On an error nothing counts as written.
    pub(crate) fn append(&mut self, records: &[Record], faults: &Faults) -> io::Result<Vec<Location>> {
        let mut headers = Vec::with_capacity(records.len());
        let mut locations = Vec::with_capacity(records.len());
        let mut offset = self.end;
        for (key, payload, checksum) in records {
            let header = RecordHeader {
                segment: self.id,
                offset,
                key: *key,
                payload_bytes: payload.len() as u32,
                payload_checksum: *checksum,
            };
            headers.push(header.encode());
            locations.push(Location {
                segment: self.id,
                offset: offset as u32,
                payload_bytes: header.payload_bytes,
            });
            offset += record_bytes(payload.len());
        }
        let padding = [0; RECORD_ALIGN as usize];
        let mut slices = Vec::with_capacity(records.len() * 3);
        for (header, (_, payload, _)) in headers.iter().zip(records) {
            let used = RECORD_HEADER_BYTES + payload.len();
            slices.push(IoSlice::new(header));
            slices.push(IoSlice::new(payload));
            slices.push(IoSlice::new(&padding[..record_bytes(payload.len()) as usize - used]));
        }
        let mut file = self.file.as_ref();
        file.seek(SeekFrom::Start(self.end))?;
        write_all_vectored(&mut file, &mut slices, faults)?;
        faults.check_sync()?;
        self.file.sync_data()?;
        self.end = offset;
        Ok(locations)
    }
}

fn write_all_vectored(file: &mut impl Write, mut slices: &mut [IoSlice<'_>], faults: &Faults) -> io::Result<()> {
    while !slices.is_empty() {
        faults.check_write()?;
        match file.write_vectored(slices) {
            Ok(0) if slices.iter().all(|slice| slice.is_empty()) => break,
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads the record of `key` at `location` and verifies header and payload; `None` if a byte is wrong.
///
/// # Errors
/// What the disk said, other than that the file ends too early (that is a wrong record).
pub(crate) fn read_record(
    file: &File,
    key: LayerBlockKey,
    location: Location,
) -> io::Result<Option<(Bytes, Checksum)>> {
    let mut record = vec![0; RECORD_HEADER_BYTES + location.payload_bytes as usize];
    let offset = u64::from(location.offset);
    match file.read_exact_at(&mut record, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let Some(header) = record
        .first_chunk()
        .and_then(|bytes| RecordHeader::decode(bytes, location.segment, offset))
    else {
        return Ok(None);
    };
    // The payload keeps the header's bytes alive: 128 of them are cheaper than a copy.
    let payload = Bytes::from(record).slice(RECORD_HEADER_BYTES..);
    let right = header.key == key
        && header.payload_bytes == location.payload_bytes
        && header.payload_checksum.verifies(&payload);
    Ok(right.then_some((payload, header.payload_checksum)))
}

/// What a scan of a segment found.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) records: Vec<(LayerBlockKey, Location)>,
    /// Where the last whole record ends; what lies behind it is torn.
    pub(crate) end: u64,
    /// Whole headers whose payload did not verify, before `end`.
    pub(crate) corrupt: u64,
}

/// Verifies every record from `from` to the end of the file. Behind a broken header it goes on at the next aligned place
/// that holds a header made for that place, so that one flipped bit does not cost the rest of the segment.
pub(crate) fn scan(file: &File, id: SegmentId, from: u64, file_bytes: u64) -> io::Result<Scan> {
    let mut scan = Scan {
        end: from,
        ..Scan::default()
    };
    let mut header = [0; RECORD_HEADER_BYTES];
    let mut payload = Vec::new();
    let (mut offset, mut corrupt) = (from, 0);
    while offset + RECORD_HEADER_BYTES as u64 <= file_bytes {
        file.read_exact_at(&mut header, offset)?;
        let Some(record) = RecordHeader::decode(&header, id, offset) else {
            offset += RECORD_ALIGN;
            continue;
        };
        let next = offset + record_bytes(record.payload_bytes as usize);
        let payload_at = offset + RECORD_HEADER_BYTES as u64;
        // The padding may be missing at the end of a file; the payload may not.
        if payload_at + u64::from(record.payload_bytes) > file_bytes {
            corrupt += 1;
            offset += RECORD_ALIGN;
            continue;
        }
        payload.resize(record.payload_bytes as usize, 0);
        file.read_exact_at(&mut payload, payload_at)?;
        if record.payload_checksum.verifies(&payload) {
            let location = Location {
                segment: id,
                offset: offset as u32,
                payload_bytes: record.payload_bytes,
            };
            scan.records.push((record.key, location));
            scan.end = next;
            scan.corrupt = corrupt;
        } else {
            corrupt += 1;
        }
        offset = next;
    }
    Ok(scan)
}
