use kvasir_block::BlockHash;

use super::*;

const NAMESPACE: NamespaceId = NamespaceId::from_bytes([3; 32]);
const US: StoreId = StoreId::from_u64(1);

fn catalog(entries_max: usize) -> Catalog {
    let mut catalog = Catalog::new(US, 2, entries_max);
    assert!(catalog.open(NAMESPACE));
    catalog
}

fn listed(store: StoreId, sequence: u64, records: u32) -> Listed {
    let name = PackName {
        store,
        sequence,
        records,
        digest: [0; 16],
    };
    Listed {
        namespace: NAMESPACE,
        name,
        bytes: 1000,
        modified_ms: sequence as i64,
    }
}

/// Layer 0 of these blocks, each at an offset that says which pack it is.
fn entries(sequence: u64, hashes: &[u8]) -> Vec<Entry> {
    let entry = |hash: &u8| Entry {
        hash: BlockHash::from_bytes([*hash; 32]),
        layer: 0,
        offset: sequence as u32,
        payload_bytes: 10,
        checksum: Checksum::from_u32(u32::from(*hash)),
    };
    hashes.iter().map(entry).collect()
}

fn learn(catalog: &mut Catalog, store: StoreId, sequence: u64, hashes: &[u8]) -> bool {
    catalog.learn(
        &listed(store, sequence, hashes.len() as u32),
        &entries(sequence, hashes),
    )
}

/// Which pack holds block `hash`.
fn holder(catalog: &Catalog, hash: u8) -> Option<u64> {
    let place = catalog.place(NAMESPACE.block(BlockHash::from_bytes([hash; 32])).layer(0))?;
    assert_eq!(place.pack.sequence, u64::from(place.entry.offset));
    assert_eq!(place.entry.checksum, Checksum::from_u32(u32::from(hash)));
    Some(place.pack.sequence)
}

#[test]
fn the_newer_pack_holds_a_block_whichever_is_learned_first() {
    for order in [[10, 20], [20, 10]] {
        let mut catalog = catalog(100);
        for sequence in order {
            assert!(learn(&mut catalog, US, sequence, &[1, sequence as u8]));
        }
        assert_eq!(
            (holder(&catalog, 1), holder(&catalog, 10), holder(&catalog, 20)),
            (Some(20), Some(10), Some(20))
        );
        // The older one goes; what the newer one holds stays.
        catalog.forget_pack(NAMESPACE, &listed(US, 10, 2).name);
        assert_eq!((holder(&catalog, 1), holder(&catalog, 10)), (Some(20), None));
        assert_eq!(catalog.sizes().layer_blocks, 2);
    }
}

#[test]
fn beyond_the_bound_the_newest_packs_are_known() {
    let mut catalog = catalog(4);
    assert!(learn(&mut catalog, US, 20, &[1, 2]));
    assert!(learn(&mut catalog, US, 30, &[3, 4]));
    assert!(!catalog.would_learn(&listed(US, 10, 2)));
    assert!(!learn(&mut catalog, US, 10, &[5, 6]));
    assert!(catalog.would_learn(&listed(US, 40, 2)));
    assert!(learn(&mut catalog, US, 40, &[7, 8]));
    let known: Vec<_> = (1..=8).filter(|hash| holder(&catalog, *hash).is_some()).collect();
    assert_eq!(known, [3, 4, 7, 8]);
    assert_eq!(catalog.sizes().layer_blocks, 4);
    // Ours to remove, whether there is room to know its blocks or not.
    assert_eq!(
        (
            catalog.sizes().own_packs,
            catalog.oldest_own().map(|own| own.name.sequence)
        ),
        (4, Some(10))
    );
}

#[test]
fn a_scan_forgets_what_it_does_not_meet() {
    let mut catalog = catalog(100);
    for sequence in [10, 20] {
        learn(&mut catalog, StoreId::from_u64(2), sequence, &[sequence as u8]);
    }
    catalog.begin_scan(NAMESPACE);
    let unknown = catalog.listed(
        NAMESPACE,
        &[listed(StoreId::from_u64(2), 20, 1), listed(StoreId::from_u64(2), 30, 1)],
    );
    assert_eq!(
        unknown.iter().map(|listed| listed.name.sequence).collect::<Vec<_>>(),
        [30]
    );
    // Written and learned while the listing ran: it may not have met it.
    learn(&mut catalog, US, 40, &[40]);
    assert_eq!(catalog.end_scan(NAMESPACE), 1);
    assert_eq!(
        [10, 20, 40].map(|hash| holder(&catalog, hash)),
        [None, Some(20), Some(40)]
    );
}

#[test]
fn refused_packs_are_not_asked_for_again() {
    let mut catalog = catalog(100);
    let bad = listed(StoreId::from_u64(2), 5, 1);
    catalog.refuse(NAMESPACE, bad.name);
    assert!(catalog.listed(NAMESPACE, &[bad]).is_empty());
    for sequence in 0..10 * REFUSED_MAX as u64 {
        catalog.refuse(NAMESPACE, listed(US, sequence, 1).name);
    }
    assert!(catalog.sizes().refused <= REFUSED_MAX as u64);
}

#[test]
fn a_corrupt_record_is_forgotten_only_where_it_still_lies() {
    let mut catalog = catalog(100);
    learn(&mut catalog, US, 10, &[1]);
    let old = catalog
        .place(NAMESPACE.block(BlockHash::from_bytes([1; 32])).layer(0))
        .unwrap();
    learn(&mut catalog, US, 20, &[1]);
    assert!(!catalog.forget_record(NAMESPACE, &old));
    assert_eq!(holder(&catalog, 1), Some(20));
    assert!(catalog.forget_record(
        NAMESPACE,
        &Place {
            pack: listed(US, 20, 1).name,
            ..old
        }
    ));
    assert_eq!((holder(&catalog, 1), catalog.sizes().layer_blocks), (None, 0));
}

#[test]
fn own_bytes_add_up_and_namespaces_are_bounded() {
    let mut catalog = catalog(100);
    for _ in 0..3 {
        catalog.wrote(&listed(US, 10, 1));
    }
    catalog.wrote(&listed(US, 20, 1));
    assert_eq!((catalog.own_bytes(), catalog.last_sequence()), (2000, 20));
    catalog.forget_pack(NAMESPACE, &listed(US, 10, 1).name);
    assert_eq!(catalog.own_bytes(), 1000);
    assert!(catalog.open(NamespaceId::from_bytes([4; 32])));
    assert!(!catalog.open(NamespaceId::from_bytes([5; 32])));
    assert!(catalog.open(NAMESPACE), "it is known already");
}
