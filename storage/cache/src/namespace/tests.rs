use super::*;
use crate::testing::schema;

fn tenant(name: &str) -> Tenant {
    Tenant::new(name).unwrap()
}

fn open(dir: &std::path::Path) -> Namespaces {
    Namespaces::open(dir.to_owned(), 3).unwrap()
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
