//! Every way to read and write against a plain copy in memory.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tempfile::TempDir;

use super::{
    faulty::{EIO, Fault, Faulty, Operation, Rule},
    *,
};

const PAGE: usize = PAGE_BYTES;

fn all_io() -> Vec<Arc<dyn FileIo>> {
    let mut all: Vec<Arc<dyn FileIo>> = vec![Arc::new(Psync), Arc::new(Faulty::new(Arc::new(Psync), 1))];
    // A kernel without it is no failure: `best_io` says so in the log.
    if let Ok(uring) = Uring::new(2, 4) {
        all.push(Arc::new(uring));
    }
    all
}

/// A file of `pages` random pages and its bytes.
fn filled(io: &dyn FileIo, path: &Path, direct: bool, pages: usize, seed: u64) -> (BlockFile, Vec<u8>) {
    let mut bytes = Buffer::heap(pages * PAGE);
    StdRng::seed_from_u64(seed).fill(bytes.as_mut_slice());
    let file = BlockFile::create(path, direct).unwrap();
    io.preallocate(&file, (pages * PAGE) as u64).unwrap();
    let writes: Vec<_> = (0..pages)
        .map(|page| WriteAt {
            offset: (page * PAGE) as u64,
            bytes: &bytes.as_slice()[page * PAGE..][..PAGE],
        })
        .collect();
    io.write_many(&file, &writes).unwrap();
    io.sync_data(&file).unwrap();
    (file, bytes.as_slice().to_vec())
}

fn read(io: &dyn FileIo, file: &BlockFile, offset: u64, bytes: usize) -> (ReadOutcome, Vec<u8>) {
    let mut buffer = Buffer::heap(bytes);
    let mut reads = [ReadAt::new(file, offset, buffer.as_mut_slice())];
    io.read_many(&mut reads, None);
    let [read] = reads;
    let outcome = read.outcome;
    (outcome, buffer.as_slice().to_vec())
}

#[test]
fn what_was_written_is_read() {
    for io in all_io() {
        for direct in [false, true] {
            let dir = TempDir::new().unwrap();
            if direct && !takes_direct_io(dir.path()).unwrap() {
                continue;
            }
            let (file, bytes) = filled(&*io, &dir.path().join("file"), direct, 40, 3);
            assert_eq!((file.is_direct(), file.len().unwrap()), (direct, 40 * PAGE as u64));
            // More reads than fit into a ring, of all sizes, some of them beyond the end.
            let mut rng = StdRng::seed_from_u64(4);
            let places: Vec<(usize, usize)> = (0..33)
                .map(|_| (rng.random_range(0..44), rng.random_range(1..9)))
                .collect();
            let mut buffers: Vec<_> = places.iter().map(|&(_, pages)| Buffer::heap(pages * PAGE)).collect();
            let mut reads: Vec<_> = (places.iter().zip(&mut buffers))
                .map(|(&(page, _), buffer)| ReadAt::new(&file, (page * PAGE) as u64, buffer.as_mut_slice()))
                .collect();
            io.read_many(&mut reads, None);
            for (read, &(page, pages)) in reads.iter().zip(&places) {
                let expected = &bytes[(page * PAGE).min(bytes.len())..((page + pages) * PAGE).min(bytes.len())];
                let what = format!("{} direct {direct} page {page}+{pages}", io.name());
                assert!(
                    matches!(read.outcome, ReadOutcome::Read(done) if done == expected.len()),
                    "{what}: {:?}",
                    read.outcome
                );
                assert!(read.buffer[..expected.len()] == *expected, "{what}");
            }
        }
    }
}

#[test]
fn a_file_that_was_cut_short_gives_short_reads() {
    for io in all_io() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("file");
        let direct = takes_direct_io(dir.path()).unwrap();
        let (file, bytes) = filled(&*io, &path, direct, 8, 5);
        for left in [8 * PAGE, 5 * PAGE + 100, 5 * PAGE, 1, 0] {
            let cut = fs::OpenOptions::new().write(true).open(&path).unwrap();
            cut.set_len(left as u64).unwrap();
            let mut buffers = [Buffer::heap(8 * PAGE), Buffer::heap(2 * PAGE)];
            let [one, two] = &mut buffers;
            let mut reads = [
                ReadAt::new(&file, 0, one.as_mut_slice()),
                ReadAt::new(&file, 4 * PAGE as u64, two.as_mut_slice()),
            ];
            io.read_many(&mut reads, None);
            for (read, whole) in reads.iter().zip([left, left.saturating_sub(4 * PAGE).min(2 * PAGE)]) {
                let right = matches!(read.outcome, ReadOutcome::Read(done) if done == whole);
                assert!(right, "{} {left}: {:?}", io.name(), read.outcome);
                let from = read.offset as usize;
                assert!(
                    read.buffer[..whole] == bytes[from..from + whole],
                    "{} {left}",
                    io.name()
                );
            }
        }
    }
}

#[test]
fn nothing_is_submitted_behind_the_deadline() {
    for io in all_io() {
        let dir = TempDir::new().unwrap();
        let (file, _) = filled(&*io, &dir.path().join("file"), false, 2, 6);
        let mut buffers = [Buffer::heap(PAGE), Buffer::heap(PAGE)];
        let mut reads: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| ReadAt::new(&file, 0, buffer.as_mut_slice()))
            .collect();
        io.read_many(&mut reads, Some(Instant::now()));
        assert!(
            reads.iter().all(|read| matches!(read.outcome, ReadOutcome::TooLate)),
            "{}",
            io.name()
        );
        io.read_many(&mut reads, Some(Instant::now() + Duration::from_secs(3600)));
        assert!(
            reads.iter().all(|read| matches!(read.outcome, ReadOutcome::Read(PAGE))),
            "{}",
            io.name()
        );
    }
}

#[test]
fn rings_are_shared_and_given_back() {
    let Ok(uring) = Uring::new(1, 4) else { return };
    let dir = TempDir::new().unwrap();
    let (file, bytes) = filled(&uring, &dir.path().join("file"), false, 64, 7);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (file, bytes, uring) = (&file, &bytes, &uring);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed);
                for _ in 0..50 {
                    let mut buffers: Vec<_> = (0..6).map(|_| Buffer::heap(PAGE)).collect();
                    let mut reads: Vec<_> = buffers
                        .iter_mut()
                        .map(|buffer| ReadAt::new(file, rng.random_range(0..64) * PAGE as u64, buffer.as_mut_slice()))
                        .collect();
                    uring.read_many(&mut reads, None);
                    for read in &reads {
                        assert!(*read.buffer == bytes[read.offset as usize..][..PAGE], "{read:?}");
                    }
                }
            });
        }
    });
    assert_eq!(uring.free.lock().len(), 1);
}

#[test]
fn an_error_of_one_write_is_an_error_of_all() {
    for io in all_io() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("file");
        let (_, bytes) = filled(&*io, &path, false, 2, 8);
        let read_only = BlockFile {
            file: File::open(&path).unwrap(),
            path,
            direct: false,
        };
        let write = WriteAt {
            offset: 0,
            bytes: &bytes[..PAGE],
        };
        let error = io.write_many(&read_only, &[write, write]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(9), "{}: {error}", io.name());
    }
}

#[test]
fn faults_follow_their_rules() {
    let dir = TempDir::new().unwrap();
    let io = Faulty::new(Arc::new(Psync), 9);
    let (file, bytes) = filled(&io, &dir.path().join("a-file"), false, 4, 9);
    let outcome = |offset| match read(&io, &file, offset, PAGE) {
        (ReadOutcome::Read(done), _) => Ok(done),
        (ReadOutcome::Failed(error), _) => Err(error.raw_os_error()),
        (ReadOutcome::TooLate, _) => unreachable!(),
    };
    io.add(Rule::new(Operation::Read, EIO).within(0..10).after(1).times(2));
    io.add(Rule::new(Operation::Read, Fault::Short(7)).on("another file"));
    assert_eq!(
        [outcome(0), outcome(4096)],
        [Ok(PAGE), Ok(PAGE)],
        "passes, is elsewhere"
    );
    assert_eq!(
        [outcome(0), outcome(0), outcome(0)],
        [Err(Some(5)), Err(Some(5)), Ok(PAGE)]
    );
    io.add(Rule::new(Operation::Read, Fault::Short(7)).on("a-file").times(1));
    assert_eq!([outcome(0), outcome(0)], [Ok(7), Ok(PAGE)]);
    io.add(Rule::new(Operation::Read, Fault::Flip).times(1));
    let (_, flipped) = read(&io, &file, 0, PAGE);
    let bits: u32 = flipped.iter().zip(&bytes).map(|(a, b)| (a ^ b).count_ones()).sum();
    assert_eq!((bits, io.faults()), (1, 4));
    io.add(Rule::new(Operation::Sync, EIO).times(1));
    assert_eq!(io.sync_data(&file).unwrap_err().raw_os_error(), Some(5));
    io.sync_data(&file).unwrap();

    io.set_space(PAGE as u64);
    let page = |page: u64| WriteAt {
        offset: page * PAGE as u64,
        bytes: &bytes[..PAGE],
    };
    io.write_many(&file, &[page(0), page(4)]).unwrap();
    let full = io.write_many(&file, &[page(1), page(5)]).unwrap_err();
    assert_eq!(
        (full.kind(), io.free_bytes(dir.path()).unwrap()),
        (io::ErrorKind::StorageFull, 0)
    );
    assert_eq!(
        io.preallocate(&file, 1 << 20).unwrap_err().kind(),
        io::ErrorKind::StorageFull
    );
    io.heal();
    io.write_many(&file, &[page(5)]).unwrap();
}

#[test]
fn a_loss_of_power_takes_only_what_was_not_synced() {
    let (mut whole, mut none) = (0, 0);
    for seed in 0..20 {
        let dir = TempDir::new().unwrap();
        let io = Faulty::new(Arc::new(Psync), seed);
        let (file, old) = filled(&io, &dir.path().join("file"), false, 4, seed);
        let new: Vec<u8> = old.iter().map(|byte| !byte).collect();
        io.remember_unsynced();
        let page = |page: usize| WriteAt {
            offset: (page * PAGE) as u64,
            bytes: &new[page * PAGE..][..PAGE],
        };
        io.write_many(&file, &[page(0)]).unwrap();
        io.sync_data(&file).unwrap();
        io.write_many(&file, &[page(2), page(1)]).unwrap();
        let lost = io.lose_power().unwrap() as usize;
        let (_, now) = read(&io, &file, 0, 4 * PAGE);
        assert!(
            now[..PAGE] == new[..PAGE] && now[3 * PAGE..] == old[3 * PAGE..],
            "seed {seed}"
        );
        let sectors = (PAGE..3 * PAGE).step_by(512);
        let reverted = sectors.filter(|&at| now[at..at + 512] == old[at..at + 512]).count();
        assert_eq!(lost, reverted, "seed {seed}");
        whole += usize::from(lost < 16);
        none += usize::from(lost > 0);
    }
    assert_eq!((whole, none), (20, 20), "some of it, and not all of it");
}

/// More pieces than fit into a ring, the last one a short one.
#[test]
fn what_is_filled_piece_by_piece_is_written() {
    for io in all_io() {
        for direct in [false, true] {
            let dir = TempDir::new().unwrap();
            if direct && !takes_direct_io(dir.path()).unwrap() {
                continue;
            }
            let what = format!("{} direct {direct}", io.name());
            let file = BlockFile::create(&dir.path().join("file"), direct).unwrap();
            for len in [PAGE, PIECE_BYTES, 6 * PIECE_BYTES + PAGE] {
                let mut expected = vec![0; len];
                StdRng::seed_from_u64(len as u64).fill(&mut expected[..]);
                let (mut memory, mut rest) = (Buffer::heap(len), &expected[..]);
                let mut fill = |piece: &mut [u8]| {
                    let (now, later) = rest.split_at(piece.len());
                    piece.copy_from_slice(now);
                    rest = later;
                };
                io.write_filled(&file, PAGE as u64, memory.as_mut_slice(), &mut fill)
                    .unwrap();
                assert!(rest.is_empty(), "{what}");
                let (outcome, read) = read(&*io, &file, PAGE as u64, len);
                assert!(
                    matches!(outcome, ReadOutcome::Read(done) if done == len) && read == expected,
                    "{what}: {len}"
                );
            }
        }
    }
}

#[test]
fn an_error_of_one_piece_is_an_error_of_all() {
    for io in all_io() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("file");
        BlockFile::create(&path, false).unwrap();
        // Not open for writing.
        let file = BlockFile {
            file: File::open(&path).unwrap(),
            path,
            direct: false,
        };
        for pieces in [1, 6] {
            let mut memory = Buffer::heap(pieces * PIECE_BYTES);
            let error = io
                .write_filled(&file, 0, memory.as_mut_slice(), &mut |_| {})
                .unwrap_err();
            assert_eq!(error.raw_os_error(), Some(9), "{}", io.name());
        }
        assert_eq!(file.len().unwrap(), 0, "{}", io.name());
    }
}

/// A file system that cannot tell may answer with the place it was asked about.
#[test]
fn space_that_was_never_written_is_known() {
    let dir = TempDir::new().unwrap();
    let file = BlockFile::create(&dir.path().join("file"), false).unwrap();
    let (mib, page) = (1 << 20, PAGE as u64);
    Psync.preallocate(&file, 8 * mib).unwrap();
    let bytes = [1; PAGE];
    let write = WriteAt {
        offset: 4 * mib,
        bytes: &bytes,
    };
    Psync.write_many(&file, &[write]).unwrap();
    Psync.sync_data(&file).unwrap();
    let cases = [
        (0, Some(4 * mib)),
        (4 * mib - 1, Some(4 * mib)),
        (4 * mib + 7, Some(4 * mib + 7)),
        (4 * mib + page, None),
        (8 * mib, None),
        (9 * mib, None),
    ];
    for (from, expected) in cases {
        let found = Psync.next_written(&file, from).unwrap();
        assert!(found == expected || found == Some(from), "from {from}: {found:?}");
    }
}
