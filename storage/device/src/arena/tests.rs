use std::{
    fs::File,
    io::Read,
    os::{fd::AsFd, unix::net::UnixStream},
    process::{Command, Stdio},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;
use crate::socket;

const PAGE: u64 = PAGE_BYTES as u64;

fn arena(pages: u64) -> Arena {
    Arena::new(ArenaConfig {
        bytes: pages * PAGE_BYTES as u64,
        huge_pages: HugePages::Auto,
    })
    .unwrap()
}

#[test]
fn memory_is_aligned_and_comes_back_from_any_thread() {
    let arena = arena(10);
    let mut buffer = arena.try_reserve(PAGE_BYTES + 1).unwrap();
    assert_eq!(buffer.as_slice().as_ptr() as usize % PAGE_BYTES, 0);
    assert_eq!((buffer.len(), arena.used()), (PAGE_BYTES + 1, 2 * PAGE_BYTES as u64));
    buffer.as_mut_slice().fill(3);
    let at = buffer.as_slice().as_ptr();
    let bytes = buffer.freeze(0..PAGE_BYTES + 1);
    assert_eq!(bytes.as_ptr(), at, "not copied");
    assert!(bytes.iter().all(|&byte| byte == 3));
    let part = bytes.slice(PAGE_BYTES..);
    drop(bytes);
    assert_eq!(arena.used(), 2 * PAGE_BYTES as u64, "a part keeps the whole");
    std::thread::spawn(move || drop(part)).join().unwrap();
    assert_eq!(arena.used(), 0);
    assert!(arena.try_reserve(11 * PAGE_BYTES).is_none());
    drop(arena.try_reserve(10 * PAGE_BYTES).unwrap());
    assert_eq!(arena.used(), 0);
}

fn filled(arena: &Arena, bytes: usize, with: u8) -> Option<Bytes> {
    let mut buffer = arena.try_reserve(bytes)?;
    buffer.as_mut_slice().fill(with);
    Some(buffer.freeze(0..bytes))
}

#[test]
fn an_arena_of_nothing_and_one_too_large() {
    for bytes in [0, 4095] {
        let arena = Arena::new(ArenaConfig {
            bytes,
            huge_pages: HugePages::Off,
        });
        let arena = arena.unwrap();
        assert_eq!(
            (arena.capacity(), arena.used(), arena.page_kind()),
            (0, 0, PageKind::Base)
        );
        assert!(arena.try_reserve(0).is_none() && arena.fence(1).is_none());
    }
    let error = Arena::new(ArenaConfig {
        bytes: 8 << 40,
        huge_pages: HugePages::Off,
    });
    assert!(error.unwrap_err().to_string().contains("less than 8 TiB"));
}

#[test]
fn what_is_elsewhere_is_not_located() {
    let (arena, other) = (arena(4), arena(4));
    filled(&arena, 1, 1).unwrap();
    let bytes = filled(&arena, 100, 1).unwrap();
    let stranger = filled(&other, 100, 1).unwrap();
    let table: [(&Bytes, Option<Range<u64>>); 5] = [
        (&bytes, Some(0..100)),
        (&bytes.slice(10..20), Some(10..20)),
        (&stranger, None),
        (&Bytes::from_static(b"static"), None),
        (&Bytes::from(vec![0; 8192]), None),
    ];
    for (bytes, expected) in table {
        assert_eq!(arena.locate(bytes), expected);
        let held = arena.hold(bytes);
        assert_eq!(held.as_ref().map(Held::as_slice), expected.map(|_| &bytes[..]));
    }
}

#[test]
fn a_hold_knows_who_else_reads() {
    let arena = arena(4);
    let bytes = filled(&arena, 5000, 9).unwrap();
    let held = arena.hold(&bytes).unwrap();
    assert_eq!((held.footprint(), held.offset(), held.len()), (8192, 0, 5000));
    assert!(held.is_shared());
    drop(bytes);
    assert!(!held.is_shared());
    let again = held.bytes();
    let part = again.slice(..7);
    drop(again);
    assert!(held.is_shared() && part == [9; 7][..]);
    drop(held);
    assert_eq!(arena.used(), 8192);
    assert_eq!(arena.hold(&part).unwrap().as_slice(), [9; 7]);
    drop(part);
    assert_eq!(arena.used(), 0);
}

#[test]
#[should_panic(expected = "is not within")]
fn no_more_is_frozen_than_was_asked_for() {
    arena(1).try_reserve(10).unwrap().freeze(0..11);
}

/// Sizes change while payloads of the old size lie everywhere: a fence collects what is free.
#[test]
fn sizes_change_and_only_what_is_shared_stays() {
    let arena = arena(1000);
    let mut random = SmallRng::seed_from_u64(7);
    let mut held: Vec<Held> = (0..)
        .map_while(|i| filled(&arena, 2 * PAGE_BYTES, i as u8))
        .map(|bytes| arena.hold(&bytes).unwrap())
        .collect();
    assert_eq!((held.len(), arena.used()), (500, arena.capacity()));
    // Half of it goes, here and there: 500 pages are free, none beside more than a few others.
    for _ in 0..250 {
        held.swap_remove(random.random_range(0..held.len()));
    }
    let shared: Vec<(Bytes, u8)> = held
        .iter()
        .step_by(100)
        .map(|held| (held.bytes(), held.as_slice()[0]))
        .collect();
    let mut large = Vec::new();
    while let Some(buffer) = arena
        .try_reserve(50 * PAGE_BYTES)
        .or_else(|| cleared(&arena, 50 * PAGE_BYTES, &mut held))
    {
        large.push(buffer);
    }
    assert!(large.len() >= 8, "{} runs of 50 out of 500 free pages", large.len());
    for (bytes, first) in &shared {
        assert!(
            bytes.iter().all(|byte| byte == first),
            "not touched where it was shared"
        );
    }
    large.clear();
    held.clear();
    assert_eq!(arena.used(), shared.len() as u64 * 2 * PAGE);
    drop(shared);
    assert!(
        arena.try_reserve(1000 * PAGE_BYTES).is_some(),
        "all of it came back, in one run"
    );
}

/// What an owner does with a fence: moves what is in the way.
fn cleared(arena: &Arena, bytes: usize, held: &mut [Held]) -> Option<Buffer> {
    let fence = arena.fence(bytes)?;
    assert!(arena.fence(bytes).is_none(), "one at a time");
    for &offset in fence.in_the_way() {
        let at = held.iter_mut().find(|held| held.offset() == offset).unwrap();
        assert!(!at.is_shared());
        let mut home = arena.try_reserve(at.len())?;
        home.as_mut_slice().copy_from_slice(at.as_slice());
        let moved = home.freeze(0..at.len());
        assert_eq!(moved, at.as_slice());
        *at = arena.hold(&moved).unwrap();
    }
    fence.reserve()
}

#[test]
fn another_mapping_reads_what_is_written_and_cannot_be_broken() {
    let arena = arena(8);
    filled(&arena, 1, 1).unwrap();
    let bytes = filled(&arena, 6000, 42).unwrap();
    let file = arena.file().try_clone_to_owned().unwrap();
    let view = ArenaView::map(file, arena.file_bytes()).unwrap();
    let lease = Arc::new(());
    let range = arena.locate(&bytes).unwrap();
    let seen = view.bytes(range, lease.clone()).unwrap();
    assert_eq!(seen, bytes);
    assert_eq!(Arc::strong_count(&lease), 2);
    let part = seen.slice(1..2);
    drop((seen, view));
    assert_eq!((Arc::strong_count(&lease), &part[..]), (2, &[42][..]));
    drop(part);
    assert_eq!(Arc::strong_count(&lease), 1);
    // The seals hold whoever has the descriptor.
    let file = File::from(arena.file().try_clone_to_owned().unwrap());
    assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
    assert!(memmap2::MmapRaw::map_raw(&file).is_err(), "no second writable mapping");
    assert!(std::io::Write::write(&mut &file, b"x").is_err());
}

#[test]
fn what_is_no_arena_is_not_mapped() {
    let arena = arena(8);
    let file = || arena.file().try_clone_to_owned().unwrap();
    let wrong = ArenaView::map(file(), arena.file_bytes() + PAGE).unwrap_err();
    assert!(matches!(wrong, ViewError::Size { found, .. } if found == arena.file_bytes()));
    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
    let soft = rustix::fs::memfd_create("soft", flags).unwrap();
    rustix::fs::ftruncate(&soft, PAGE).unwrap();
    assert!(matches!(ArenaView::map(soft, PAGE), Err(ViewError::NotSealed)));
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(PAGE).unwrap();
    assert!(ArenaView::map(plain.into(), PAGE).is_err());
    let view = ArenaView::map(file(), arena.file_bytes()).unwrap();
    let end = view.capacity();
    for (range, inside) in [
        (0..end, true),
        (end..end, true),
        (1..end + 1, false),
        (Range { start: 5, end: 4 }, false),
        (0..u64::MAX, false),
    ] {
        assert_eq!(view.bytes(range.clone(), Arc::new(())).is_some(), inside, "{range:?}");
    }
}

/// A real other process: it gets the descriptor, and reads the payload through it.
#[test]
fn another_process_reads_a_payload() {
    let arena = arena(8);
    let bytes = filled(&arena, 5000, 0x5a).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    let range = arena.locate(&bytes).unwrap();
    socket::send_descriptor(&here, b"arena", arena.file()).unwrap();
    let (_, descriptor) = socket::receive_descriptor(&there, &mut [0; 16]).unwrap();
    let child = Command::new("od")
        .args(["-An", "-v", "-tx1", "-w1"])
        .arg(format!("-j{}", range.start))
        .arg(format!("-N{}", bytes.len()))
        .stdin(Stdio::from(descriptor.unwrap()))
        .stdout(Stdio::piped())
        .spawn();
    let mut text = String::new();
    let mut child = child.unwrap();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(text.split_whitespace().filter(|&byte| byte == "5a").count(), 5000);
    assert!(arena.file().as_fd().try_clone_to_owned().is_ok());
}

/// Many threads reserve, fill, share, verify and drop: a byte that another one wrote would be seen.
#[test]
fn threads_do_not_see_each_other() {
    let arena = arena(200);
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let arena = arena.clone();
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(thread.into());
                let mut mine: Vec<(Bytes, u8)> = Vec::new();
                for round in 0..3000_u32 {
                    let mark = thread << 6 | (round % 64) as u8;
                    if let Some(bytes) = filled(&arena, random.random_range(1..40_000), mark) {
                        let held = arena.hold(&bytes).unwrap();
                        mine.push((if round % 2 == 0 { bytes } else { held.bytes() }, mark));
                    }
                    if mine.len() > 5 {
                        let (bytes, mark) = mine.swap_remove(random.random_range(0..5));
                        assert!(bytes.iter().all(|&byte| byte == mark));
                    }
                }
            });
        }
    });
    assert_eq!(arena.used(), 0);
    assert!(arena.try_reserve(arena.capacity() as usize).is_some());
}

/// However much goes through it, no more of its file is ever resident than it has.
#[test]
fn resident_memory_is_bounded() {
    let arena = Arena::new(ArenaConfig {
        bytes: 4 << 20,
        huge_pages: HugePages::Off,
    });
    let arena = arena.unwrap();
    let mut random = SmallRng::seed_from_u64(3);
    let (mut kept, mut written) = (Vec::new(), 0);
    while written < 16 << 20 {
        let bytes = random.random_range(1..300_000);
        match filled(&arena, bytes, 1) {
            Some(payload) => {
                written += bytes;
                kept.push(payload);
            }
            None => drop(kept.swap_remove(random.random_range(0..kept.len()))),
        }
    }
    let blocks = rustix::fs::fstat(arena.file()).unwrap().st_blocks as u64 * 512;
    assert!(blocks <= arena.capacity(), "{blocks} bytes of {}", arena.capacity());
    assert!(blocks > arena.capacity() / 2, "it was used");
}

#[test]
fn memory_is_ready_before_it_is_used_and_not_all_at_once() {
    const MIB: u64 = 1 << 20;
    let arena = Arena::new(ArenaConfig {
        bytes: 64 * MIB,
        huge_pages: HugePages::Off,
    })
    .unwrap();
    // What the system has made of the file.
    let made = || rustix::fs::fstat(arena.file()).unwrap().st_blocks as u64 * 512;
    let wait_for = |bytes: u64| {
        for _ in 0..1000 {
            if made() >= bytes {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{} bytes are ready instead of {bytes}", made());
    };
    assert_eq!(made(), 0);
    let ready = arena.keep_ready(8 * MIB);
    wait_for(8 * MIB);
    assert_eq!(made(), 8 * MIB, "no more than was asked for");
    let mut filled = arena.try_reserve(4 << 20).unwrap();
    filled.as_mut_slice().fill(7);
    wait_for(12 * MIB);
    assert!(
        filled.as_slice().iter().all(|&byte| byte == 7),
        "what is in use stays as it is"
    );
    drop(ready);
    let _more = arena.try_reserve(32 << 20).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(made(), 12 * MIB, "it has ended");
}
