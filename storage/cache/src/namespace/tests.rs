use kvasir_index::{Basis, HeadBasis};

use super::*;
use crate::testing::schema;

fn tenant(name: &str) -> Tenant {
    Tenant::new(name).unwrap()
}

fn open(dir: &std::path::Path) -> Namespaces {
    Namespaces::open(dir.to_owned(), 3, 1 << 20).unwrap()
}

#[test]
fn the_whole_schema_survives() {
    let dir = tempfile::tempdir().unwrap();
    let mut with_adapter = schema(3);
    with_adapter.adapter_sha256 = Some([7; 32]);
    let (first, new) = open(dir.path()).declare(&tenant("a"), &with_adapter).unwrap();
    assert!(new);
    let again = open(dir.path());
    assert_eq!(again.get(first).as_deref(), Some(&with_adapter));
    assert_eq!(again.declare(&tenant("a"), &with_adapter).unwrap(), (first, false));
    assert!(again.get(NamespaceId::from_bytes([0; 32])).is_none());
}

#[test]
fn every_damaged_byte_is_noticed() {
    let bytes = codec::encode(&tenant("a"), &schema(3));
    assert!(codec::decode(&bytes).is_ok());
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert!(codec::decode(&damaged).is_err(), "byte {at}");
        assert!(codec::decode(&bytes[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn a_damaged_file_is_set_aside_and_can_be_declared_again() {
    let dir = tempfile::tempdir().unwrap();
    let (id, _) = open(dir.path()).declare(&tenant("a"), &schema(3)).unwrap();
    let path = dir.path().join(format!("{id}.kvns"));
    std::fs::write(&path, b"not a namespace").unwrap();
    let again = open(dir.path());
    assert_eq!(again.len(), 0);
    assert!(path.with_extension("broken").exists());
    assert_eq!(again.declare(&tenant("a"), &schema(3)).unwrap(), (id, true));
    assert_eq!(open(dir.path()).len(), 1);
    // A file under another one's name is not believed either.
    std::fs::copy(
        &path,
        dir.path().join(format!("{}.kvns", NamespaceId::from_bytes([1; 32]))),
    )
    .unwrap();
    assert_eq!(open(dir.path()).len(), 1);
}

#[test]
fn refusals_name_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let namespaces = open(dir.path());
    let (id, _) = namespaces.declare(&tenant("a"), &schema(3)).unwrap();
    // Ids are hashes, so only damage or an attack gets here; it is refused all the same.
    let error = namespaces.admit(id, &tenant("a"), &schema(4)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SchemaMismatch);
    assert!(error.to_string().contains("another layers"), "{error}");
    let error = namespaces.declare(&tenant("a"), &schema(0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("layers"), "{error}");
    namespaces.declare(&tenant("b"), &schema(3)).unwrap();
    namespaces.declare(&tenant("c"), &schema(3)).unwrap();
    let error = namespaces.declare(&tenant("d"), &schema(3)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitReached);
    assert!(error.to_string().contains("namespaces_max"), "{error}");
}

/// A basis for `schema(layers)`; `seed` makes it another one.
fn basis(schema: &KvSchema, seed: f32) -> Basis {
    let (heads, head_dim, rank) = (
        usize::from(schema.layers * schema.kv_heads),
        usize::from(schema.head_dim),
        4,
    );
    let head = |at: usize| HeadBasis {
        mean: vec![seed; head_dim],
        keys: (0..rank * head_dim).map(|i| (i + at) as f32 / 64.0).collect(),
        queries: vec![0.5; rank * head_dim],
        streaming: at == 1,
    };
    Basis {
        model: schema.model_fingerprint(),
        layers: schema.layers.into(),
        kv_heads: schema.kv_heads.into(),
        head_dim,
        rank,
        heads: (0..heads).map(head).collect(),
    }
}

#[test]
fn a_basis_stays_with_its_namespace() {
    let dir = tempfile::tempdir().unwrap();
    let namespaces = open(dir.path());
    let (a, _) = namespaces.declare(&tenant("a"), &schema(3)).unwrap();
    let (b, _) = namespaces.declare(&tenant("b"), &schema(3)).unwrap();
    assert!(namespaces.basis(a).is_none());
    let file = basis(&schema(3), 1.0).encode();
    let id = namespaces.set_basis(a, &file).unwrap();
    assert_eq!(id.as_bytes(), &basis(&schema(3), 1.0).id());
    assert_eq!(
        namespaces.set_basis(a, &file).unwrap(),
        id,
        "the same again is no change"
    );
    namespaces.set_basis(b, &file).unwrap();
    assert_eq!(namespaces.bases(), (2, file.len() as u64), "counted once");
    let error = namespaces.set_basis(a, &basis(&schema(3), 2.0).encode()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BasisMismatch);
    assert!(error.to_string().contains(&id.to_string()), "{error}");

    let again = open(dir.path());
    assert_eq!(again.basis(a).map(|basis| basis.id()), Some(id));
    assert_eq!(again.bases(), (2, file.len() as u64));
    // A damaged one is set aside, and can be brought again.
    let path = dir.path().join(format!("{a}.basis"));
    let mut damaged = file.clone();
    damaged[100] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    let again = open(dir.path());
    assert!(again.basis(a).is_none() && path.with_extension("basis.broken").exists());
    assert_eq!(again.set_basis(a, &file).unwrap(), id);
}

#[test]
fn a_basis_that_cannot_serve_is_refused_by_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let namespaces = Namespaces::open(dir.path().to_owned(), 3, 1500).unwrap();
    let (id, _) = namespaces.declare(&tenant("a"), &schema(3)).unwrap();
    let good = basis(&schema(3), 1.0);
    let other_weights = KvSchema {
        weights_sha256: [9; 32],
        ..schema(3)
    };
    use ErrorKind::{InvalidArgument, LimitReached};
    let table: [(&str, Vec<u8>, ErrorKind, &str); 7] = [
        ("nothing", vec![], InvalidArgument, "basis: "),
        ("no file", b"KVBASIS?".to_vec(), InvalidArgument, "basis: "),
        ("cut", good.encode()[..200].to_vec(), InvalidArgument, "basis: "),
        ("too large", vec![0; 1501], LimitReached, "basis_bytes_max"),
        (
            "other model",
            basis(&other_weights, 1.0).encode(),
            InvalidArgument,
            "other weights",
        ),
        (
            "other layers",
            basis(&schema(2), 1.0).encode(),
            InvalidArgument,
            "2 layers",
        ),
        (
            "other heads",
            basis(
                &KvSchema {
                    kv_heads: 1,
                    ..schema(3)
                },
                1.0,
            )
            .encode(),
            InvalidArgument,
            "1 KV heads",
        ),
    ];
    for (name, file, kind, words) in table {
        let error = namespaces.set_basis(id, &file).unwrap_err();
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    assert!(namespaces.basis(id).is_none());
    let file = good.encode();
    assert!(file.len() <= 1500 && 2 * file.len() > 1500, "{}", file.len());
    namespaces.set_basis(id, &file).unwrap();
    // There is no room for a second one that differs.
    let (other, _) = namespaces.declare(&tenant("b"), &schema(3)).unwrap();
    let error = namespaces
        .set_basis(other, &basis(&schema(3), 2.0).encode())
        .unwrap_err();
    assert_eq!(error.kind(), LimitReached, "{error}");
    let unknown = NamespaceId::from_bytes([3; 32]);
    assert_eq!(
        namespaces.set_basis(unknown, &file).unwrap_err().kind(),
        ErrorKind::UnknownNamespace
    );
}
