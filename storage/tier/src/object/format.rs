//! The bytes of a pack and its name; FORMAT-OBJECT.md is this file in prose.
//!
//! Pure functions. Encoding cannot fail on what the tier accepts; decoding takes any bytes and answers with an error
//! or with a manifest in which every offset has been checked.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use kvasir_block::{BlockHash, Checksum, LayerBlockKey, NamespaceId};
use sha2::{Digest as _, Sha256};

use super::config::StoreId;

/// Newest pack format that this version reads, and the one it writes.
pub const PACK_FORMAT: u32 = 1;

/// Most bytes of one payload.
pub(super) const RECORD_PAYLOAD_BYTES_MAX: u64 = 64 << 20;
/// Most records of one pack: bounds what a reader allocates for a manifest.
pub(super) const PACK_RECORDS_MAX: usize = 1 << 16;
/// Most bytes of one pack: the largest pack that a configuration allows, its record headers and manifest.
pub(super) const PACK_BYTES_MAX: u64 = (1 << 30) + RECORD_PAYLOAD_BYTES_MAX + (PACK_RECORDS_MAX as u64) * 256;

pub(super) const HEADER_BYTES: usize = 64;
pub(super) const RECORD_HEADER_BYTES: usize = 96;
pub(super) const ENTRY_BYTES: usize = 56;
pub(super) const FOOTER_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"KVPACK\r\n";
const FOOTER_MAGIC: [u8; 8] = *b"KVPKFOOT";
const RECORD_MAGIC: [u8; 4] = *b"KVOB";
const RECORD_VERSION: u16 = 1;
const SUFFIX: &str = ".kvpack";

/// The name of a pack inside its namespace: who wrote it, when in the order of that writer, and what it holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PackName {
    pub(super) store: StoreId,
    /// Rises with each pack of a store: microseconds since 1970 when it was closed, or one more than the last.
    pub(super) sequence: u64,
    pub(super) records: u32,
    /// First half of the SHA-256 of namespace and manifest; the manifest holds the CRC of every payload.
    pub(super) digest: [u8; 16],
}

impl PackName {
    /// The name in the last part of an object's path; `None` for everything that is not ours.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_suffix(SUFFIX)?.split('-');
        let mut hex = |digits: usize| {
            let part = parts.next()?;
            let plain = part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            plain.then(|| u128::from_str_radix(part, 16).ok())?
        };
        let name = Self {
            store: StoreId::from_u64(hex(16)? as u64),
            sequence: hex(16)? as u64,
            records: hex(8)? as u32,
            digest: hex(32)?.to_be_bytes(),
        };
        (parts.next().is_none() && (1..=PACK_RECORDS_MAX as u32).contains(&name.records)).then_some(name)
    }

    /// Bytes at the end of the object that hold manifest and footer.
    pub(super) fn tail_bytes(&self) -> u64 {
        u64::from(self.records) * ENTRY_BYTES as u64 + FOOTER_BYTES as u64
    }
}

impl fmt::Display for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (store, digest) = (self.store.to_u64(), u128::from_be_bytes(self.digest));
        write!(
            f,
            "{store:016x}-{:016x}-{:08x}-{digest:032x}{SUFFIX}",
            self.sequence, self.records
        )
    }
}

impl fmt::Debug for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The folder of a namespace: 64 hexadecimal digits.
pub(super) fn namespace_folder(namespace: NamespaceId) -> String {
    namespace.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where a record lies in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) hash: BlockHash,
    pub(super) layer: u16,
    /// Of the record's header, from the start of the object.
    pub(super) offset: u32,
    pub(super) payload_bytes: u32,
    pub(super) checksum: Checksum,
}

impl Entry {
    /// First byte behind the record.
    pub(super) fn end(&self) -> u64 {
        u64::from(self.offset) + RECORD_HEADER_BYTES as u64 + u64::from(self.payload_bytes)
    }
}

/// Why bytes are no manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ManifestError {
    #[error("the object has {found} bytes, its name asks for {expected}")]
    Size { found: u64, expected: u64 },
    #[error("format {0} is newer than {PACK_FORMAT}, which this version reads: use the newer version")]
    Newer(u32),
    #[error("{0} is wrong")]
    Wrong(&'static str),
}

/// A pack ready to be written: its pieces in order, payloads as they were given.
#[derive(Debug)]
pub(super) struct EncodedPack {
    pub(super) name: PackName,
    pub(super) pieces: Vec<Bytes>,
    pub(super) entries: Vec<Entry>,
    pub(super) bytes: u64,
}

/// Encodes 1 to [`PACK_RECORDS_MAX`] records of one namespace.
pub(super) fn encode_pack(
    namespace: NamespaceId,
    store: StoreId,
    sequence: u64,
    records: &[(LayerBlockKey, Bytes, Checksum)],
) -> EncodedPack {
    debug_assert!(
        (1..=PACK_RECORDS_MAX).contains(&records.len()),
        "{} records",
        records.len()
    );
    let mut fixed =
        BytesMut::with_capacity(HEADER_BYTES + records.len() * (RECORD_HEADER_BYTES + ENTRY_BYTES) + FOOTER_BYTES);
    let mut pieces = Vec::with_capacity(2 * records.len() + 2);
    encode_header(&mut fixed, namespace);
    pieces.push(fixed.split().freeze());

    let mut entries = Vec::with_capacity(records.len());
    let mut offset = HEADER_BYTES as u32;
    for (key, payload, checksum) in records {
        debug_assert_eq!(key.namespace, namespace, "a pack holds one namespace");
        let entry = Entry {
            hash: key.hash,
            layer: key.layer,
            offset,
            payload_bytes: payload.len() as u32,
            checksum: *checksum,
        };
        encode_record_header(&mut fixed, namespace, &entry);
        pieces.push(fixed.split().freeze());
        pieces.push(payload.clone());
        offset = entry.end() as u32;
        entries.push(entry);
    }

    for entry in &entries {
        encode_entry(&mut fixed, entry);
    }
    let manifest = fixed.split().freeze();
    let digest = digest(namespace, &manifest);
    encode_footer(
        &mut fixed,
        namespace,
        &manifest,
        entries.len() as u32,
        u64::from(offset),
    );
    let bytes = u64::from(offset) + (manifest.len() + FOOTER_BYTES) as u64;
    pieces.push(manifest);
    pieces.push(fixed.freeze());
    let records = entries.len() as u32;
    EncodedPack {
        name: PackName {
            store,
            sequence,
            records,
            digest,
        },
        pieces,
        entries,
        bytes,
    }
}

fn encode_header(out: &mut BytesMut, namespace: NamespaceId) {
    let start = out.len();
    out.put_slice(&MAGIC);
    out.put_u32_le(PACK_FORMAT);
    out.put_u32_le(0);
    out.put_slice(namespace.as_bytes());
    out.put_bytes(0, 12);
    let crc = Checksum::of(&out[start..]).to_u32();
    out.put_u32_le(crc);
}

fn encode_record_header(out: &mut BytesMut, namespace: NamespaceId, entry: &Entry) {
    let start = out.len();
    let key = namespace.block(entry.hash).layer(entry.layer);
    out.put_slice(&RECORD_MAGIC);
    out.put_u16_le(RECORD_VERSION);
    out.put_u16_le(0);
    out.put_slice(&key.to_bytes());
    out.put_u16_le(0);
    out.put_u32_le(entry.payload_bytes);
    out.put_u64_le(u64::from(entry.offset));
    out.put_u32_le(entry.checksum.to_u32());
    let crc = Checksum::of(&out[start..]).to_u32();
    out.put_u32_le(crc);
}

fn encode_entry(out: &mut BytesMut, entry: &Entry) {
    out.put_slice(entry.hash.as_bytes());
    out.put_u16_le(entry.layer);
    out.put_u16_le(0);
    out.put_u32_le(entry.payload_bytes);
    out.put_u64_le(u64::from(entry.offset));
    out.put_u32_le(entry.checksum.to_u32());
    out.put_u32_le(0);
}

fn encode_footer(out: &mut BytesMut, namespace: NamespaceId, manifest: &[u8], records: u32, manifest_at: u64) {
    let start = out.len();
    out.put_slice(&FOOTER_MAGIC);
    out.put_u32_le(PACK_FORMAT);
    out.put_u32_le(records);
    out.put_u64_le(manifest_at);
    out.put_slice(namespace.as_bytes());
    out.put_u32_le(Checksum::of(manifest).to_u32());
    let crc = Checksum::of(&out[start..]).to_u32();
    out.put_u32_le(crc);
}

/// Whether these bytes are the header of the record that the manifest promised, key, place and checksum included.
pub(super) fn is_record_header(bytes: &[u8], namespace: NamespaceId, entry: &Entry) -> bool {
    let mut expected = BytesMut::with_capacity(RECORD_HEADER_BYTES);
    encode_record_header(&mut expected, namespace, entry);
    bytes == expected
}

/// Reads the tail of an object of `object_bytes`: the manifest of `name` in `namespace`, its entries by rising offset.
pub(super) fn decode_tail(
    namespace: NamespaceId,
    name: &PackName,
    object_bytes: u64,
    tail: &[u8],
) -> Result<Vec<Entry>, ManifestError> {
    let expected = name.tail_bytes();
    if tail.len() as u64 != expected || object_bytes < HEADER_BYTES as u64 + expected || object_bytes > PACK_BYTES_MAX {
        let found = object_bytes.min(tail.len() as u64);
        return Err(ManifestError::Size { found, expected });
    }
    let (manifest, footer) = tail.split_at(tail.len() - FOOTER_BYTES);
    if footer[..8] != FOOTER_MAGIC {
        return Err(ManifestError::Wrong("the footer's magic"));
    }
    if Checksum::of(&footer[..60]).to_u32() != u32_at(footer, 60) {
        return Err(ManifestError::Wrong("the footer's CRC"));
    }
    if u32_at(footer, 8) > PACK_FORMAT {
        return Err(ManifestError::Newer(u32_at(footer, 8)));
    }
    let manifest_at = object_bytes - expected;
    if u32_at(footer, 8) == 0 || u32_at(footer, 12) != name.records || u64_at(footer, 16) != manifest_at {
        return Err(ManifestError::Wrong("the footer's format, number of records or place"));
    }
    if footer[24..56] != *namespace.as_bytes() {
        return Err(ManifestError::Wrong("the namespace: it is another one's pack"));
    }
    if Checksum::of(manifest).to_u32() != u32_at(footer, 56) || digest(namespace, manifest) != name.digest {
        return Err(ManifestError::Wrong("the manifest's CRC or digest"));
    }
    let mut entries = Vec::with_capacity(name.records as usize);
    let mut free_from = HEADER_BYTES as u64;
    for bytes in manifest.chunks_exact(ENTRY_BYTES) {
        let mut hash = [0; 32];
        hash.copy_from_slice(&bytes[..32]);
        let offset = u64_at(bytes, 40);
        let entry = Entry {
            hash: BlockHash::from_bytes(hash),
            layer: u16::from_le_bytes([bytes[32], bytes[33]]),
            offset: u32::try_from(offset).map_err(|_| ManifestError::Wrong("an offset"))?,
            payload_bytes: u32_at(bytes, 36),
            checksum: Checksum::from_u32(u32_at(bytes, 48)),
        };
        if offset < free_from || entry.end() > manifest_at || u64::from(entry.payload_bytes) > RECORD_PAYLOAD_BYTES_MAX
        {
            return Err(ManifestError::Wrong("a record's place"));
        }
        free_from = entry.end();
        entries.push(entry);
    }
    Ok(entries)
}

fn digest(namespace: NamespaceId, manifest: &[u8]) -> [u8; 16] {
    let whole = Sha256::new()
        .chain_update(namespace.as_bytes())
        .chain_update(manifest)
        .finalize();
    let mut half = [0; 16];
    half.copy_from_slice(&whole[..16]);
    half
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests;
