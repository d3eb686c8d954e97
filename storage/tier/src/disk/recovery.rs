//! Coming back: from the index, plus whatever lies in segments behind what the index knows.
//!
//! The index says for each segment how far it has been told. Everything behind that point is read and verified: whole
//! records are synced and published, a torn tail is cut off. Without an index the same code reads all segments from their
//! start. Index entries that point nowhere are dropped.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use kvasir_device::{BlockFile, Buffer, FileIo, ReadAt, ReadOutcome};

use super::{
    DiskConfig, OpenError,
    format::{Identity, PAGE, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentId},
    index::{Contents, Index},
    segment::{SegmentWriter, is_spare, scan, segment_id, segment_path, sync_dir},
    table::{SegmentRef, SegmentState, Table},
    volume::{Folder, Pace, Volume},
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
    /// Bytes cut off the ends of segments; where a file was another segment before, also what was left of one of its records.
    pub torn_bytes: u64,
    /// The index could not be opened and was made anew from the segments.
    pub index_rebuilt: bool,
}

pub(crate) struct Recovered {
    pub(crate) volume: Volume,
    pub(crate) start: Start,
}

/// Where a disk's writer goes on.
pub(crate) struct Start {
    pub(crate) writer: Option<SegmentWriter>,
    pub(crate) next_segment: SegmentId,
    pub(crate) last_generation: u64,
}

/// Reads what a folder holds into `table` and adds to `report`.
pub(crate) fn recover(
    config: &DiskConfig,
    folder: Folder,
    table: &mut Table,
    report: &mut Recovery,
) -> Result<Recovered, OpenError> {
    let (number, dir) = (folder.number, folder.path.dir.clone());
    let segments_dir = dir.join("segments");
    fs::create_dir_all(&segments_dir).map_err(|source| OpenError::io("make the folder", &segments_dir, source))?;
    sync_dir(&dir).map_err(|source| OpenError::io("sync the folder", &dir, source))?;
    let (index, contents) = open_index(&dir.join("index"), number, report)?;
    let volume = Volume {
        number,
        dir,
        bytes_max: folder.path.bytes_max,
        io: folder.io,
        direct: folder.direct,
        index,
        pace: Pace::default(),
        scrubbed_to: contents.scrubbed_to,
        _lock: folder.lock,
    };
    let known: HashMap<SegmentId, (Identity, u64)> = contents
        .segments
        .iter()
        .map(|(segment, to)| (segment.id, (*segment, *to)))
        .collect();
    let mut open = BTreeMap::new();
    for (id, path) in segment_files(&segments_dir)? {
        let Some(at) = SegmentRef::new(number, id) else {
            continue;
        };
        let Some(segment) = open_segment(&volume, id, &path, known.get(&id).copied())? else {
            continue;
        };
        let state = SegmentState::new(
            segment.file,
            segment.identity.unwrap_or(Identity { id, generation: 0 }),
            segment.bytes,
        );
        table.segments.insert(at, state);
        open.insert(at, (segment.identity, segment.known_to));
    }
    report.dangling += contents.broken;
    for (key, location) in contents.records {
        let end = u64::from(location.offset) + RECORD_HEADER_BYTES as u64 + u64::from(location.payload_bytes);
        // What the index knows of a file that is another one now points nowhere.
        let trusted = open
            .get(&location.segment)
            .is_some_and(|(_, known_to)| known_to.is_some());
        match table.segments.get(&location.segment) {
            Some(segment) if trusted && end <= segment.bytes => table.set_stored(key, location),
            _ => {
                report.dangling += 1;
                let forgotten = volume.index.forget(None, [key].into_iter());
                forgotten.map_err(|source| OpenError::index("drop an entry of the index", &volume.dir, source))?;
            }
        }
    }
    for (&at, &(identity, known_to)) in &open {
        scan_tail(&volume, table, at, identity, known_to, report)?;
    }
    for &id in known.keys().filter(|id| !open.keys().any(|at| at.id() == **id)) {
        let forgotten = volume.index.forget(Some(id), std::iter::empty());
        forgotten.map_err(|source| OpenError::index("drop a segment from the index", &volume.dir, source))?;
    }
    let last_known = open.keys().map(|at| at.id()).chain(known.keys().copied()).max();
    let next_segment = last_known.map_or(1, |id| id + 1).max(contents.next_segment);
    let identities = open
        .keys()
        .filter_map(|at| table.segments.get(at))
        .map(|segment| segment.identity);
    let last_generation = identities.map(|identity| identity.generation).max().unwrap_or(0);
    let newest = open
        .last_key_value()
        .map(|(&at, &(identity, known_to))| (at, identity, known_to));
    let writer = match newest {
        Some((at, Some(identity), known_to)) => go_on(config, &volume, table, at, identity, known_to),
        _ => None,
    };
    Ok(Recovered {
        volume,
        start: Start {
            writer,
            next_segment,
            last_generation,
        },
    })
}

/// Only the newest segment is appended to, for age is the order of reclaim; and only where its header is whole and of this
/// format, and it is not shorter than the index says: in front of where the index has been told, no scan would find records.
fn go_on(
    config: &DiskConfig,
    volume: &Volume,
    table: &mut Table,
    at: SegmentRef,
    identity: Identity,
    known_to: Option<u64>,
) -> Option<SegmentWriter> {
    let segment = table.segments.get_mut(&at)?;
    let end = segment.bytes.next_multiple_of(PAGE);
    let sound = identity.generation != 0 && end >= PAGE && known_to.is_none_or(|to| to <= segment.bytes);
    if !sound || end >= config.segment_bytes {
        return None;
    }
    // Where there is no space for the rest of it, a new one is tried when there is something to write.
    let bytes = config.segment_bytes;
    if let Err(error) = volume.io.preallocate(&segment.file, bytes) {
        tracing::warn!(segment = identity.id, %error, "cannot go on with the newest segment");
        return None;
    }
    segment.bytes = bytes;
    Some(SegmentWriter {
        at,
        identity,
        file: Arc::clone(&segment.file),
        end,
        bytes,
    })
}

/// The index, or a new one beside the remains of one that cannot be read: it is derived, the segments are the truth.
fn open_index(dir: &Path, disk: u8, report: &mut Recovery) -> Result<(Index, Contents), OpenError> {
    let existed = dir.exists();
    let error = match Index::open(dir, disk) {
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
    Index::open(dir, disk).map_err(|source| OpenError::Index {
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
        } else if is_spare(&path) {
            fs::remove_file(&path).map_err(|source| OpenError::io("remove the spare file", &path, source))?;
        }
    }
    Ok(files)
}

struct OpenSegment {
    file: Arc<BlockFile>,
    bytes: u64,
    /// What its header says, or else the index; `None` where neither does.
    identity: Option<Identity>,
    /// Up to where the index has been told, if it speaks of this very file.
    known_to: Option<u64>,
}

/// Opens one segment file; `None` if it holds nothing and was removed.
fn open_segment(
    volume: &Volume,
    id: SegmentId,
    path: &Path,
    known: Option<(Identity, u64)>,
) -> Result<Option<OpenSegment>, OpenError> {
    let failed = |source| OpenError::io("open the segment", path, source);
    let file = BlockFile::open(path, volume.direct).map_err(failed)?;
    let bytes = file.len().map_err(failed)?;
    let header = match read_header(&*volume.io, &file) {
        SegmentHeader::Valid(found) => (found.id == id).then_some(found),
        SegmentHeader::Newer(found) => {
            return Err(OpenError::NewerFormat {
                path: path.to_owned(),
                found,
            });
        }
        SegmentHeader::Broken => None,
    };
    // Killed while making it: no header, no record. Records name their segment themselves, so a file that has some is
    // kept even if its own header is damaged.
    if header.is_none() && known.is_none() && bytes <= SEGMENT_HEADER_BYTES as u64 {
        fs::remove_file(path).map_err(|source| OpenError::io("remove the empty segment", path, source))?;
        return Ok(None);
    }
    let same = known.filter(|(identity, _)| header.is_none_or(|header| header == *identity));
    Ok(Some(OpenSegment {
        file: Arc::new(file),
        bytes,
        identity: header.or(same.map(|(identity, _)| identity)),
        known_to: same.map(|(_, to)| to),
    }))
}

fn read_header(io: &dyn FileIo, file: &BlockFile) -> SegmentHeader {
    let mut page = Buffer::heap(PAGE as usize);
    let mut reads = [ReadAt::new(file, 0, page.as_mut_slice())];
    io.read_many(&mut reads, None);
    match reads[0].outcome {
        ReadOutcome::Read(done) => match page.as_slice()[..done].first_chunk() {
            Some(header) => SegmentHeader::decode(header),
            None => SegmentHeader::Broken,
        },
        ReadOutcome::Failed(_) | ReadOutcome::TooLate => SegmentHeader::Broken,
    }
}

/// Reads what the index was not told of in a segment, publishes it, cuts off what is torn.
fn scan_tail(
    volume: &Volume,
    table: &mut Table,
    at: SegmentRef,
    identity: Option<Identity>,
    known_to: Option<u64>,
    report: &mut Recovery,
) -> Result<(), OpenError> {
    let Some(segment) = table.segments.get_mut(&at) else {
        return Ok(());
    };
    let first = identity.map_or(SEGMENT_HEADER_BYTES as u64, Identity::first_record);
    let from = known_to.unwrap_or(first);
    if segment.bytes <= from {
        return Ok(());
    }
    let path = segment_path(&volume.segments_dir(), at.id());
    let file = Arc::clone(&segment.file);
    let generation = identity.map(|identity| identity.generation);
    let found = scan(&*volume.io, &file, at, generation, from, segment.bytes);
    report.corrupt += found.corrupt;
    if let Some(generation) = found.generation {
        segment.identity.generation = generation;
    }
    let identity = segment.identity;
    // Also when it grows: the padding of the last record may be missing. Format 2 ends at pages.
    let end = if identity.generation == 0 {
        found.end
    } else {
        found.end.next_multiple_of(PAGE)
    };
    report.torn_bytes += found.written_end.saturating_sub(end);
    segment.bytes = end;
    let settled = volume.io.truncate(&file, end).and_then(|()| volume.io.sync_data(&file));
    settled.map_err(|source| OpenError::io("cut the torn tail off the segment", &path, source))?;

    let mut news = Vec::new();
    for (key, location) in found.records {
        if table.place(key).is_none() {
            table.set_stored(key, location);
            news.push((key, location));
        }
    }
    report.found_by_scan += news.len() as u64;
    let published = volume.index.publish(identity, end, news.iter());
    published.map_err(|source| OpenError::index("publish what was found", &volume.dir, source))
}
