//! Coming back: from the index, plus whatever lies in segments behind what the index knows.
//!
//! The index says for each segment how far it has been told. Everything behind that point is read and verified: whole
//! records are synced and published, a torn tail is cut off. Without an index the same code reads all segments from their
//! start. Index entries that point nowhere are dropped.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    DiskConfig, OpenError,
    format::{RECORD_ALIGN, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentId},
    index::{Contents, Index},
    segment::{SegmentWriter, scan, segment_id, sync_dir},
    table::{SegmentState, Table},
};

/// What was found at start-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Segment files.
    pub segments: u64,
    /// Layer blocks available after recovery.
    pub layer_blocks: u64,
    /// Of those, found by reading segments and not through the index.
    pub found_by_scan: u64,
    /// Records whose bytes were wrong; dropped.
    pub corrupt: u64,
    /// Index entries that pointed at nothing; dropped.
    pub dangling: u64,
    /// Bytes cut off the ends of segments.
    pub torn_bytes: u64,
    /// The index could not be opened and was made anew from the segments.
    pub index_rebuilt: bool,
}

pub(crate) struct Recovered {
    pub(crate) table: Table,
    pub(crate) index: Index,
    pub(crate) writer: Option<SegmentWriter>,
    pub(crate) next_segment: SegmentId,
    pub(crate) report: Recovery,
}

pub(crate) fn recover(config: &DiskConfig) -> Result<Recovered, OpenError> {
    let segments_dir = config.dir().join("segments");
    fs::create_dir_all(&segments_dir).map_err(|source| OpenError::io("make the folder", &segments_dir, source))?;
    sync_dir(config.dir()).map_err(|source| OpenError::io("sync the folder", config.dir(), source))?;
    let mut report = Recovery::default();
    let (index, contents) = open_index(&config.dir().join("index"), &mut report)?;
    let indexed_to: HashMap<SegmentId, u64> = contents.indexed_to.iter().copied().collect();

    let mut table = Table::default();
    let mut appendable = None;
    for (id, path) in segment_files(&segments_dir)? {
        let Some(segment) = open_segment(id, &path, indexed_to.contains_key(&id))? else {
            continue;
        };
        appendable = segment.has_header.then_some(id);
        table.segments.insert(id, segment.state);
    }
    report.dangling = contents.broken;
    for (key, location) in contents.records {
        let end = u64::from(location.offset) + RECORD_HEADER_BYTES as u64 + u64::from(location.payload_bytes);
        match table.segments.get(&location.segment) {
            Some(segment) if end <= segment.bytes => table.set_stored(key, location),
            _ => {
                report.dangling += 1;
                let forgotten = index.forget(None, [key].into_iter());
                forgotten.map_err(|source| OpenError::index("drop an entry of the index", config.dir(), source))?;
            }
        }
    }
    let ids: Vec<SegmentId> = table.segments.keys().copied().collect();
    for &id in &ids {
        let from = indexed_to.get(&id).copied().unwrap_or(SEGMENT_HEADER_BYTES as u64);
        scan_tail(config, &mut table, &index, id, from, &mut report)?;
    }
    for (&id, _) in indexed_to.iter().filter(|(id, _)| !table.segments.contains_key(id)) {
        let forgotten = index.forget(Some(id), std::iter::empty());
        forgotten.map_err(|source| OpenError::index("drop a segment from the index", config.dir(), source))?;
    }

    report.segments = ids.len() as u64;
    report.layer_blocks = table.stored;
    let last_known = ids.iter().chain(indexed_to.keys()).max();
    let next_segment = last_known.map_or(1, |id| id + 1);
    // Only the newest segment is appended to: age is the order of reclaim.
    let writer = appendable.filter(|id| ids.last() == Some(id)).and_then(|id| {
        let segment = &table.segments[&id];
        // A file that was cut short by someone else ends anywhere, but records start at aligned places only; and in front
        // of where the index has been told, no scan would find them.
        let sound =
            segment.bytes.is_multiple_of(RECORD_ALIGN) && indexed_to.get(&id).is_none_or(|&to| to <= segment.bytes);
        let room = sound && segment.bytes < config.segment_bytes;
        room.then(|| SegmentWriter {
            id,
            file: Arc::clone(&segment.file),
            end: segment.bytes,
        })
    });
    Ok(Recovered {
        table,
        index,
        writer,
        next_segment,
        report,
    })
}

/// The index, or a new one beside the remains of one that cannot be read: it is derived, the segments are the truth.
fn open_index(dir: &Path, report: &mut Recovery) -> Result<(Index, Contents), OpenError> {
    let existed = dir.exists();
    let error = match Index::open(dir) {
        Ok(opened) => return Ok(opened),
        Err(error) => error,
    };
    if !existed {
        return Err(OpenError::Index {
            what: "make the index",
            path: dir.to_owned(),
            source: error,
        });
    }
    let aside = dir.with_extension("broken");
    tracing::warn!(%error, aside = %aside.display(), "index cannot be read, building a new one from the segments");
    let _ = fs::remove_dir_all(&aside);
    fs::rename(dir, &aside).map_err(|source| OpenError::io("move the broken index aside", dir, source))?;
    report.index_rebuilt = true;
    Index::open(dir).map_err(|source| OpenError::Index {
        what: "make a new index",
        path: dir.to_owned(),
        source,
    })
}

fn segment_files(dir: &Path) -> Result<BTreeMap<SegmentId, PathBuf>, OpenError> {
    let failed = |source| OpenError::io("list the segments", dir, source);
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if let Some(id) = segment_id(&path) {
            files.insert(id, path);
        }
    }
    Ok(files)
}

struct OpenSegment {
    state: SegmentState,
    has_header: bool,
}

/// Opens one segment file; `None` if it holds nothing and was removed.
fn open_segment(id: SegmentId, path: &Path, indexed: bool) -> Result<Option<OpenSegment>, OpenError> {
    let failed = |source| OpenError::io("open the segment", path, source);
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let has_header = match read_header(&file).map_err(failed)? {
        SegmentHeader::Valid(found) => found == id,
        SegmentHeader::Newer(found) => {
            return Err(OpenError::NewerFormat {
                path: path.to_owned(),
                found,
            });
        }
        SegmentHeader::Broken => false,
    };
    // Killed while making it: no header, no record. Records name their segment themselves, so a file that has some is
    // kept even if its own header is damaged.
    if !has_header && !indexed && bytes <= SEGMENT_HEADER_BYTES as u64 {
        fs::remove_file(path).map_err(|source| OpenError::io("remove the empty segment", path, source))?;
        return Ok(None);
    }
    let state = SegmentState {
        file: Arc::new(file),
        bytes,
        blocks: Default::default(),
    };
    Ok(Some(OpenSegment { state, has_header }))
}

fn read_header(file: &File) -> io::Result<SegmentHeader> {
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(SegmentHeader::Broken),
        read => read.map(|()| SegmentHeader::decode(&bytes)),
    }
}

/// Reads what the index was not told of in segment `id`, publishes it, cuts off what is torn.
fn scan_tail(
    config: &DiskConfig,
    table: &mut Table,
    index: &Index,
    id: SegmentId,
    from: u64,
    report: &mut Recovery,
) -> Result<(), OpenError> {
    let Some(segment) = table.segments.get_mut(&id) else {
        return Ok(());
    };
    if segment.bytes <= from {
        return Ok(());
    }
    let path = super::segment::segment_path(&config.dir().join("segments"), id);
    let file = Arc::clone(&segment.file);
    let found =
        scan(&file, id, from, segment.bytes).map_err(|source| OpenError::io("read the segment", &path, source))?;
    report.corrupt += found.corrupt;
    report.torn_bytes += segment.bytes.saturating_sub(found.end);
    // Also when it grows: the padding of the last record may be missing.
    segment.bytes = found.end;
    let settled = file.set_len(found.end).and_then(|()| file.sync_all());
    settled.map_err(|source| OpenError::io("cut the torn tail off the segment", &path, source))?;

    let mut news = Vec::new();
    for (key, location) in found.records {
        if table.place(key).is_none() {
            table.set_stored(key, location);
            news.push((key, location));
        }
    }
    report.found_by_scan += news.len() as u64;
    let published = index.publish(id, found.end, news.iter());
    published.map_err(|source| OpenError::index("publish what was found", config.dir(), source))
}
