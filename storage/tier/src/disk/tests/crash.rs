//! What a crash leaves behind: torn tails, records that the index was not told of, an index that is gone.

use std::fs::OpenOptions;

use super::*;
use crate::disk::format::{PAGE, RECORD_HEADER_BYTES};

/// A folder with `keys` flushed, and its segment's length.
fn folder_with(keys: impl IntoIterator<Item = u32>) -> (TempDir, u64) {
    let dir = TempDir::new().unwrap();
    put(&open(dir.path()), keys);
    let bytes = segment_file(dir.path()).metadata().unwrap().len();
    (dir, bytes)
}

fn cut(path: &Path, bytes: u64) {
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(bytes)
        .unwrap();
}

/// What the index knows in the folders of [`torn_tails_cost_only_the_torn_record`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// It is gone.
    Nothing,
    /// All but the last record: killed before it was told.
    AllButLast,
    /// Everything: bytes were lost that the disk had called safe.
    Everything,
}

#[test]
fn torn_tails_cost_only_the_torn_record() {
    const LAST: u32 = 5;
    let (before, start) = folder_with(0..LAST);
    let after = TempDir::new().unwrap();
    copy_dir(before.path(), after.path());
    put(&open(after.path()), [LAST]);
    let end = segment_file(after.path()).metadata().unwrap().len();
    let payload_end = start + RECORD_HEADER_BYTES as u64 + payload(LAST).len() as u64;
    assert!(
        end > payload_end && end - start > 400,
        "the last record has padding and a payload worth cutting"
    );

    let edges = [start, start + 1, start + 64, start + 127, start + 128, start + 129];
    let edges = edges
        .into_iter()
        .chain([payload_end - 64, payload_end - 1, payload_end, end - 1, end]);
    let cuts: Vec<u64> = edges.chain((start..end).step_by(197)).collect();
    for known in [Known::Nothing, Known::AllButLast, Known::Everything] {
        for &at in &cuts {
            let dir = TempDir::new().unwrap();
            let what = format!("{known:?}, last record {start}..{end} cut at {at}");
            copy_dir(&after.path().join("segments"), &dir.path().join("segments"));
            match known {
                Known::Nothing => {}
                Known::AllButLast => copy_dir(&before.path().join("index"), &dir.path().join("index")),
                Known::Everything => copy_dir(&after.path().join("index"), &dir.path().join("index")),
            }
            cut(&segment_file(dir.path()), at);
            // Zeros at the end are as good as space that was never written.
            let left = fs::read(segment_file(dir.path())).unwrap();
            let written_end = left.iter().rposition(|&byte| byte != 0).unwrap() as u64 + 1;

            let whole = at >= payload_end;
            let tier = open(dir.path());
            let last = if whole { hit(payload(LAST)) } else { DiskRead::Miss };
            assert_eq!(tier.get(key(LAST)), last, "{what}");
            assert_hits(&tier, 0..LAST, &what);
            let expected = Recovery {
                segments: 1,
                layer_blocks: u64::from(LAST) + u64::from(whole),
                found_by_scan: match known {
                    Known::Nothing => u64::from(LAST) + u64::from(whole),
                    Known::AllButLast => u64::from(whole),
                    Known::Everything => 0,
                },
                dangling: u64::from(known == Known::Everything && !whole),
                torn_bytes: if whole || known == Known::Everything {
                    0
                } else {
                    written_end.saturating_sub(start)
                },
                ..Recovery::default()
            };
            assert_eq!(tier.recovery(), expected, "{what}");

            // What comes next is as safe as ever.
            put(&tier, 10..12);
            drop(tier);
            let tier = open(dir.path());
            assert_hits(&tier, (0..LAST).chain(10..12), &what);
            assert_eq!(tier.get(key(LAST)), last, "{what}");
            let clean = Recovery {
                segments: tier.recovery().segments,
                layer_blocks: expected.layer_blocks + 2,
                ..Recovery::default()
            };
            assert_eq!(tier.recovery(), clean, "repaired once: {what}");
        }
    }
}

/// The order is bytes, sync, index: here the process ends between the last two, with a new segment begun as well.
#[test]
fn records_that_were_synced_but_not_published_are_found() {
    let dir = TempDir::new().unwrap();
    let small = || DiskConfig {
        segment_bytes: 16 << 10,
        ..config(dir.path())
    };
    put(&open_as(small()), 0..10);
    let index = TempDir::new().unwrap();
    copy_dir(&dir.path().join("index"), index.path());
    put(&open_as(small()), 10..40);
    let segments = segment_files(dir.path()).len() as u64;
    assert!(segments > 2, "some segments are wholly unknown to the old index");
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    copy_dir(index.path(), &dir.path().join("index"));

    for (found_by_scan, what) in [(30, "from the scan"), (0, "from the index, which knows them now")] {
        let tier = open_as(small());
        let expected = Recovery {
            segments,
            layer_blocks: 40,
            found_by_scan,
            ..Recovery::default()
        };
        assert_eq!(tier.recovery(), expected, "{what}");
        assert_hits(&tier, 0..40, what);
    }
}

/// A folder copied while it is in use is what a killed process leaves: no flush of RocksDB, no clean stop.
#[test]
fn what_was_flushed_survives_a_kill() {
    let dir = TempDir::new().unwrap();
    let tier = open(dir.path());
    put(&tier, 0..50);
    assert_eq!(tier.get(key(50)), DiskRead::Miss);
    let copy = TempDir::new().unwrap();
    copy_dir(dir.path(), copy.path());
    put(&tier, 50..60);
    let killed = open(copy.path());
    assert_hits(&killed, 0..50, "after the kill");
    assert_eq!(killed.get(key(50)), DiskRead::Miss);
    assert_eq!(
        killed.recovery().found_by_scan,
        0,
        "the index's log was written before the flush returned"
    );
}

#[test]
fn an_index_that_is_gone_or_broken_is_made_again() {
    let (intact, _) = folder_with(0..30);
    type Damage = fn(&Path);
    let cases: [(&str, bool, Damage); 3] = [
        ("removed", false, |index| fs::remove_dir_all(index).unwrap()),
        ("names a manifest that is not there", true, |index| {
            fs::write(index.join("CURRENT"), "MANIFEST-999999\n").unwrap();
        }),
        ("has a broken manifest", true, |index| {
            for entry in fs::read_dir(index).unwrap() {
                let path = entry.unwrap().path();
                if path.file_name().unwrap().to_str().unwrap().starts_with("MANIFEST") {
                    let mut bytes = fs::read(&path).unwrap();
                    bytes[20] ^= 1;
                    fs::write(&path, bytes).unwrap();
                }
            }
        }),
    ];
    for (what, index_rebuilt, damage) in cases {
        let dir = TempDir::new().unwrap();
        copy_dir(intact.path(), dir.path());
        damage(&dir.path().join("index"));
        let tier = open(dir.path());
        let expected = Recovery {
            segments: 1,
            layer_blocks: 30,
            found_by_scan: 30,
            index_rebuilt,
            ..Recovery::default()
        };
        assert_eq!(tier.recovery(), expected, "{what}");
        assert_hits(&tier, 0..30, what);
        drop(tier);
        assert_eq!(open(dir.path()).recovery().found_by_scan, 0, "{what}: made once");
    }
}

/// The index knows more of the segment than is left of it. What is appended there would lie in front of what the index
/// calls known, and a crash before the next publish would hide it from the scan.
#[test]
fn nothing_is_appended_to_a_segment_shorter_than_the_index_says() {
    let (dir, bytes) = folder_with(0..20);
    cut(&segment_file(dir.path()), (bytes / 2).next_multiple_of(PAGE));
    let tier = open(dir.path());
    let index = TempDir::new().unwrap();
    copy_dir(&dir.path().join("index"), index.path());
    put(&tier, 100..103);
    drop(tier);
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    copy_dir(index.path(), &dir.path().join("index"));
    let tier = open(dir.path());
    assert_hits(&tier, 100..103, "synced, not published");
    assert_eq!(tier.recovery().found_by_scan, 3);
}

#[test]
fn a_segment_that_was_only_begun_is_tidied_up() {
    for bytes in [0, 1, 63] {
        let (dir, _) = folder_with(0..3);
        let begun = dir.path().join("segments/00000000000000ff.seg");
        fs::write(&begun, vec![0; bytes]).unwrap();
        fs::write(dir.path().join("segments/notes.txt"), "not ours").unwrap();
        let tier = open(dir.path());
        assert_hits(&tier, 0..3, "beside a begun segment");
        assert!(
            !begun.exists() && dir.path().join("segments/notes.txt").exists(),
            "{bytes} bytes"
        );
        put(&tier, 3..6);
        drop(tier);
        assert_hits(&open(dir.path()), 0..6, "afterwards");
    }
}

/// A segment under another name holds nothing: its records say where they belong.
#[test]
fn records_moved_to_another_segment_are_not_taken_for_records() {
    let (dir, _) = folder_with(0..3);
    let path = segment_file(dir.path());
    fs::rename(&path, path.with_file_name("0000000000000077.seg")).unwrap();
    let tier = open(dir.path());
    for i in 0..3 {
        assert_eq!(tier.get(key(i)), DiskRead::Miss);
    }
    assert_eq!(tier.recovery().dangling, 3);
    put(&tier, 0..3);
    drop(tier);
    assert_hits(&open(dir.path()), 0..3, "put again");
}
