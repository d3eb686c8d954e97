//! Segments that are not what they were: torn at any sector, lost in part with the power, overwritten, or of format 1.

use super::*;
use crate::disk::{
    format::{Identity, PAGE, RECORD_HEADER_BYTES, RecordHeader},
    segment::scan,
    table::{Location, SegmentRef},
};

/// Where the records of the only segment of a tier lie, in order, and the segment.
fn records(tier: &DiskTier) -> (SegmentRef, u64, Vec<(LayerBlockKey, Location)>) {
    let state = tier.shared.state.lock();
    let (&at, segment) = state.table.segments.first_key_value().unwrap();
    (at, segment.identity.generation, state.table.records_of(at))
}

fn payload_end(location: Location) -> u64 {
    u64::from(location.offset) + RECORD_HEADER_BYTES as u64 + u64::from(location.payload_bytes)
}

/// A write that was lost leaves what was there before: a header that is whole, of this segment and in its place, before other
/// bytes. Records begin inside what it claims.
#[test]
fn a_header_that_was_left_over_costs_no_record_behind_it() {
    let dir = TempDir::new().unwrap();
    let tier = open(dir.path());
    (0..20).for_each(|i| assert_eq!(offer_512(&tier, i), Offer::Queued));
    tier.flush().unwrap();
    let (at, generation, mut records) = records(&tier);
    drop(tier);
    let (key, location) = records.remove(3);
    let offset = u64::from(location.offset) + 64;
    let id = at.id();
    let header = RecordHeader {
        segment: Identity { id, generation },
        offset,
        key,
        payload_bytes: 3000,
        payload_checksum: Checksum::from_u32(1),
    };
    let path = segment_file(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    bytes[location.offset as usize] ^= 1;
    bytes[offset as usize..][..RECORD_HEADER_BYTES].copy_from_slice(&header.encode());
    fs::write(&path, &bytes).unwrap();
    let file = kvasir_device::BlockFile::open(&path, false).unwrap();
    let found = scan(&Psync, &file, at, Some(generation), PAGE, bytes.len() as u64);
    assert_eq!((found.records, found.corrupt), (records, 1));
}

/// Every sector of a full segment of 4 MiB, once with nothing behind it and once with zeros.
#[test]
fn a_tail_torn_at_any_sector_costs_only_what_is_torn() {
    const SECTOR: u64 = 512;
    const BYTES: u64 = 4 << 20;
    let dir = TempDir::new().unwrap();
    let tier = open_as(DiskConfig {
        segment_bytes: BYTES,
        queue_bytes_max: 8 << 20,
        ..config(dir.path())
    });
    // From half a page to 60 KiB, in batches of several.
    let mut sizes = StdRng::seed_from_u64(1);
    let mut left = BYTES - PAGE - (64 << 10);
    for i in 0.. {
        let payload = payload_of(i, sizes.random_range(2000..60_000));
        let Some(rest) = left.checked_sub(record_bytes(payload.len()) + PAGE) else {
            break;
        };
        left = rest;
        assert_eq!(
            tier.offer(key(i), payload.clone(), Checksum::of(&payload)),
            Offer::Queued
        );
        if i % 5 == 0 {
            tier.flush().unwrap();
        }
    }
    tier.flush().unwrap();
    let (at, generation, records) = records(&tier);
    drop(tier);
    let path = segment_file(dir.path());
    let file = kvasir_device::BlockFile::open(&path, false).unwrap();
    let bytes = file.len().unwrap();
    assert!(
        bytes > BYTES / 4 * 3 && records.len() > 50,
        "{bytes} bytes, {} records",
        records.len()
    );
    for cut in (0..=bytes / SECTOR).rev().map(|sector| sector * SECTOR) {
        let whole = records.partition_point(|(_, location)| payload_end(*location) <= cut);
        // From two records before: what lies further in front was read for the cuts before this one.
        let from = whole.saturating_sub(2);
        let start = records
            .get(from)
            .map_or(PAGE, |(_, location)| u64::from(location.offset));
        for length in [cut, (cut + (8 << 10)).min(bytes)] {
            Psync.truncate(&file, cut).unwrap();
            Psync.truncate(&file, length).unwrap();
            let found = scan(&Psync, &file, at, Some(generation), start, length);
            assert_eq!(found.records, records[from..whole], "cut at {cut}, length {length}");
            let end = records[from..whole].last();
            let end = end.map_or(start, |(_, location)| {
                u64::from(location.offset) + location.record_bytes()
            });
            assert_eq!((found.end, found.corrupt), (end, 0), "cut at {cut}, length {length}");
        }
    }
}

/// Of what was written and not synced any sector may be lost; what a flush promised is there, and nothing is wrong.
#[test]
fn a_loss_of_power_costs_only_what_was_not_synced() {
    let (mut survived, mut lost) = (0, 0);
    for seed in 0..12 {
        let dir = TempDir::new().unwrap();
        let (io, config) = faulty(dir.path(), seed);
        io.remember_unsynced();
        let tier = open_as(config);
        for round in 0..4 {
            put(&tier, round * 10..round * 10 + 10);
        }
        // The power goes before the next sync returns; nobody tidies up.
        io.add(Rule::new(Operation::Sync, EIO));
        io.add(Rule::new(Operation::Truncate, EIO));
        for i in 40..60 {
            assert_eq!(offer(&tier, i), Offer::Queued);
        }
        tier.stop().unwrap_err();
        drop(tier);
        assert!(io.lose_power().unwrap() > 0, "seed {seed}");

        let tier = open(dir.path());
        assert_hits(&tier, 0..40, &format!("seed {seed}"));
        for i in 40..60 {
            match tier.get(key(i)) {
                DiskRead::Miss => lost += 1,
                read => {
                    assert_eq!(read, hit(payload(i)), "seed {seed}, key {i}");
                    survived += 1;
                }
            }
        }
        put(&tier, 60..80);
        drop(tier);
        let tier = open(dir.path());
        assert_hits(&tier, (0..40).chain(60..80), &format!("seed {seed}, afterwards"));
        let recovery = tier.recovery();
        assert_eq!(
            (recovery.corrupt, recovery.torn_bytes),
            (0, 0),
            "seed {seed}: repaired once"
        );
    }
    assert!(survived > 0 && lost > 0, "{survived} survived, {lost} lost");
}

/// Zeros, noise or another segment's records in the middle of a segment, with the index and without.
#[test]
fn a_foreign_stretch_costs_only_what_it_covers() {
    const STRETCH: std::ops::Range<usize> = 30_000..50_000;
    let dir = TempDir::new().unwrap();
    let tier = open(dir.path());
    put(&tier, 0..100);
    let (_, _, records) = records(&tier);
    drop(tier);
    let other = TempDir::new().unwrap();
    put(&open(other.path()), 200..300);
    let mut noise = vec![0; STRETCH.len()];
    StdRng::seed_from_u64(2).fill(&mut noise[..]);
    let stretches = [
        ("zeros", vec![0; STRETCH.len()]),
        ("noise", noise),
        (
            "records",
            fs::read(segment_file(other.path())).unwrap()[STRETCH].to_vec(),
        ),
    ];
    for (what, stretch) in stretches {
        for indexed in [true, false] {
            let what = format!("{what}, indexed: {indexed}");
            let copy = TempDir::new().unwrap();
            copy_dir(dir.path(), copy.path());
            let path = segment_file(copy.path());
            let mut bytes = fs::read(&path).unwrap();
            bytes[STRETCH].copy_from_slice(&stretch);
            fs::write(&path, bytes).unwrap();
            if !indexed {
                fs::remove_dir_all(copy.path().join("index")).unwrap();
            }
            let tier = open(copy.path());
            let mut covered = 0;
            for i in 0..100 {
                let (_, location) = records.iter().find(|(found, _)| *found == key(i)).unwrap();
                let apart = payload_end(*location) <= STRETCH.start as u64 || location.offset as usize >= STRETCH.end;
                covered += u32::from(!apart);
                let expected = match (apart, indexed) {
                    (true, _) => hit(payload(i)),
                    (false, true) => DiskRead::Corrupt,
                    (false, false) => DiskRead::Miss,
                };
                assert_eq!(tier.get(key(i)), expected, "{what}: key {i}");
            }
            assert!(covered > 5, "{what}: {covered}");
            for i in 200..300 {
                assert_eq!(tier.get(key(i)), DiskRead::Miss, "{what}: key {i} belongs elsewhere");
            }
        }
    }
}

/// A file as format 1 had it, made from its description and nothing of today's code.
fn format_1(id: u64, payloads: &[(LayerBlockKey, Bytes)]) -> Vec<u8> {
    let seal = |header: &mut [u8]| {
        let body = header.len() - 4;
        let crc = Checksum::of(&header[..body]).to_u32();
        header[body..].copy_from_slice(&crc.to_le_bytes());
    };
    let mut file = vec![0; 64];
    file[..8].copy_from_slice(b"KVSEGMNT");
    file[8] = 1;
    file[16..24].copy_from_slice(&id.to_le_bytes());
    seal(&mut file);
    for (key, payload) in payloads {
        let mut header = [0; 128];
        header[..4].copy_from_slice(b"KVRC");
        header[4] = 1;
        header[8..16].copy_from_slice(&id.to_le_bytes());
        header[16..24].copy_from_slice(&(file.len() as u64).to_le_bytes());
        header[24..56].copy_from_slice(key.namespace.as_bytes());
        header[56..88].copy_from_slice(key.hash.as_bytes());
        header[88..90].copy_from_slice(&key.layer.to_be_bytes());
        header[92..96].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        header[96..100].copy_from_slice(&Checksum::of(payload).to_u32().to_le_bytes());
        seal(&mut header);
        file.extend(header);
        file.extend(payload);
        file.resize(file.len().next_multiple_of(64), 0);
    }
    file
}

#[test]
fn a_segment_of_format_1_is_read_and_never_written() {
    let dir = TempDir::new().unwrap();
    let payloads: Vec<_> = (0..20).map(|i| (key(i), payload(i))).collect();
    let mut bytes = format_1(1, &payloads);
    // A torn record at the end, as a crash left it.
    let whole = bytes.len();
    let torn = format_1(1, &[payloads.clone(), vec![(key(20), payload_of(20, 900))]].concat());
    bytes.extend(&torn[whole..whole + 700]);
    fs::create_dir(dir.path().join("segments")).unwrap();
    let path = dir.path().join("segments/0000000000000001.seg");
    fs::write(&path, bytes).unwrap();

    let tier = open(dir.path());
    let expected = Recovery {
        segments: 1,
        layer_blocks: 20,
        found_by_scan: 20,
        torn_bytes: 700,
        ..Recovery::default()
    };
    assert_eq!(tier.recovery(), expected);
    assert_hits(&tier, 0..20, "found by reading it");
    put(&tier, 20..40);
    assert_hits(&tier, 0..40, "beside a segment of today");
    drop(tier);
    assert_eq!(fs::read(&path).unwrap(), torn[..whole], "only the torn end is gone");
    let tier = open(dir.path());
    assert_hits(&tier, 0..40, "after a restart");
    let clean = Recovery {
        segments: 2,
        layer_blocks: 40,
        ..Recovery::default()
    };
    assert_eq!(tier.recovery(), clean, "the index knows it now");
}

/// What a kill leaves is mostly space that was allocated and never written. Through the page cache the scan's own readahead
/// may make it look written, which costs time and nothing else: only direct I/O is held to it.
#[test]
fn a_scan_does_not_read_what_was_never_written() {
    let dir = TempDir::new().unwrap();
    if !kvasir_device::takes_direct_io(dir.path()).unwrap() {
        return;
    }
    let file = kvasir_device::BlockFile::create(&dir.path().join("file"), true).unwrap();
    let io = Faulty::new(Arc::new(Psync), 1);
    io.add(Rule::new(Operation::Read, Fault::Delay(Duration::ZERO)));
    Psync.preallocate(&file, 256 << 20).unwrap();
    let mut page = Buffer::heap(PAGE as usize);
    page.as_mut_slice().fill(1);
    for offset in [0, 100 << 20] {
        let bytes = page.as_slice();
        let write = kvasir_device::WriteAt { offset, bytes };
        Psync.write_many(&file, &[write]).unwrap();
    }
    Psync.sync_data(&file).unwrap();
    let at = SegmentRef::new(0, 1).unwrap();
    let found = scan(&io, &file, at, Some(1), PAGE, 256 << 20);
    assert_eq!((found.records, found.written_end), (vec![], (100 << 20) + PAGE));
    assert!(io.faults() < 4, "{} reads of 4 MiB", io.faults());
}
