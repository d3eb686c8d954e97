use super::*;

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
