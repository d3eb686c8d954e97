//! The frame that all index files share: what it is, what it was built from, and checksums that are verified first.
//!
//! `FORMAT.md` beside the crate has the bytes. Invariant: nothing of a file is believed, and nothing is allocated for it,
//! before both checksums, the kind, the version and the origin were found right.

use half::f16;

use crate::IndexError;

/// First bytes of every index file.
const MAGIC: [u8; 8] = *b"KVSINDEX";
/// Version of the frame.
const FRAME: u16 = 1;
/// Bytes before the payload.
const HEADER_BYTES: usize = 72;
/// Most elements per key.
const HEAD_DIM_MAX: u32 = 1024;
/// Largest payload: 16 KiB for each of 2^20 keys.
const PAYLOAD_BYTES_MAX: u64 = 16 << 30;

/// What an index was built from, as 32 bytes that the caller chooses: usually a hash over the span key, the layer, the KV
/// head and the id of the basis. A file is only usable under the origin it was written with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Origin(pub [u8; 32]);

/// The kinds of index files; the number is in the file and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// Exact scan.
    Flat = 1,
    /// Sketches of keys.
    Sketch = 2,
    /// RoarGraph.
    Roar = 3,
    /// Segmented clusters.
    Wave = 4,
    /// Pages with minima and maxima.
    Quest = 5,
    /// Inverted lists.
    Ivf = 6,
    /// Hierarchical small world.
    Hnsw = 7,
    /// faiss' inverted lists.
    FaissIvf = 8,
    /// faiss' small world.
    FaissHnsw = 9,
}

/// The checked contents of an index file.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Elements per key, 1 to 1024.
    pub head_dim: usize,
    /// Keys in the index.
    pub keys: usize,
    /// What the kind of index wrote.
    pub payload: &'a [u8],
}

/// Wraps a payload of `kind` in payload version `version`.
///
/// # Panics
/// If `head_dim` is not 1 to 1024, or `keys` does not fit 32 bits: no index can be built so.
pub fn seal(kind: Kind, version: u16, head_dim: usize, keys: usize, origin: Origin, payload: &[u8]) -> Vec<u8> {
    assert!((1..=HEAD_DIM_MAX as usize).contains(&head_dim), "index file: head_dim");
    assert!(u32::try_from(keys).is_ok(), "index file: keys");
    let mut file = Vec::with_capacity(HEADER_BYTES + payload.len());
    file.extend(MAGIC);
    file.extend(FRAME.to_le_bytes());
    file.extend((kind as u16).to_le_bytes());
    file.extend(version.to_le_bytes());
    file.extend([0; 2]);
    file.extend((head_dim as u32).to_le_bytes());
    file.extend((keys as u32).to_le_bytes());
    file.extend(origin.0);
    file.extend((payload.len() as u64).to_le_bytes());
    file.extend(crc32c(payload).to_le_bytes());
    file.extend(crc32c(&file).to_le_bytes());
    file.extend(payload);
    file
}

/// Verifies a file and gives its contents.
///
/// # Errors
/// [`IndexError::Unusable`]: damaged, cut off, of another kind or version, built from something else, or beyond a limit.
pub fn open(bytes: &[u8], kind: Kind, version: u16, origin: Origin) -> Result<Frame<'_>, IndexError> {
    let unusable = |why: String| Err(IndexError::Unusable(why));
    let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return unusable(format!("{} bytes are less than a header", bytes.len()));
    };
    let mut fields = Fields::new(header);
    if fields.bytes()? != MAGIC {
        return unusable("it does not begin as an index file".to_owned());
    }
    if crc32c(&header[..HEADER_BYTES - 4]) != u32_at(header, HEADER_BYTES - 4) {
        return unusable("the checksum of its header is wrong".to_owned());
    }
    let (frame, found, payload_version) = (fields.u16()?, fields.u16()?, fields.u16()?);
    if frame != FRAME {
        return unusable(format!("frame version {frame}, this program reads {FRAME}"));
    }
    if found != kind as u16 {
        return unusable(format!("it is of kind {found}, not {} ({kind:?})", kind as u16));
    }
    if payload_version != version {
        return unusable(format!(
            "{kind:?} version {payload_version}, this program reads {version}"
        ));
    }
    fields.u16()?;
    let (head_dim, keys) = (fields.u32()?, fields.u32()?);
    if fields.bytes()? != origin.0 {
        return unusable("it was built from other keys or another basis".to_owned());
    }
    if head_dim == 0 || head_dim > HEAD_DIM_MAX {
        return unusable(format!("head_dim {head_dim} is not 1 to {HEAD_DIM_MAX}"));
    }
    let payload_bytes = fields.u64()?;
    if payload_bytes > PAYLOAD_BYTES_MAX || payload_bytes != payload.len() as u64 {
        return unusable(format!(
            "{} bytes follow its header, not {payload_bytes}",
            payload.len()
        ));
    }
    if crc32c(payload) != fields.u32()? {
        return unusable("the checksum of its payload is wrong".to_owned());
    }
    Ok(Frame {
        head_dim: head_dim as usize,
        keys: keys as usize,
        payload,
    })
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Reads numbers of a payload from front to back. Each step checks what is left before it allocates.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Begins at the first byte.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if fewer are left; so for all that follow.
    pub fn bytes<const N: usize>(&mut self) -> Result<[u8; N], IndexError> {
        let (&first, rest) = self.rest.split_first_chunk().ok_or_else(cut_off)?;
        self.rest = rest;
        Ok(first)
    }

    /// A number of 16 bits.
    ///
    /// # Errors
    /// As [`Fields::bytes`].
    pub fn u16(&mut self) -> Result<u16, IndexError> {
        self.bytes().map(u16::from_le_bytes)
    }

    /// A number of 32 bits.
    ///
    /// # Errors
    /// As [`Fields::bytes`].
    pub fn u32(&mut self) -> Result<u32, IndexError> {
        self.bytes().map(u32::from_le_bytes)
    }

    /// A number of 64 bits.
    ///
    /// # Errors
    /// As [`Fields::bytes`].
    pub fn u64(&mut self) -> Result<u64, IndexError> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// `count` numbers of 32 bits.
    ///
    /// # Errors
    /// As [`Fields::bytes`].
    pub fn u32s(&mut self, count: usize) -> Result<Vec<u32>, IndexError> {
        self.many(count, u32::from_le_bytes)
    }

    /// `count` halves.
    ///
    /// # Errors
    /// As [`Fields::bytes`].
    pub fn halves(&mut self, count: usize) -> Result<Vec<f16>, IndexError> {
        self.many(count, f16::from_le_bytes)
    }

    /// All bytes that are left.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    fn many<T, const N: usize>(&mut self, count: usize, from: fn([u8; N]) -> T) -> Result<Vec<T>, IndexError> {
        let bytes = count.checked_mul(N).filter(|bytes| *bytes <= self.rest.len());
        let (taken, rest) = self.rest.split_at(bytes.ok_or_else(cut_off)?);
        self.rest = rest;
        Ok(taken.as_chunks().0.iter().map(|bytes| from(*bytes)).collect())
    }

    /// Nothing may be left.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if something is.
    pub fn finish(self) -> Result<(), IndexError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(IndexError::Unusable(format!(
            "{} bytes follow its last field",
            self.rest.len()
        )))
    }
}

fn cut_off() -> IndexError {
    IndexError::Unusable("a field reaches beyond its end".to_owned())
}

/// Appends numbers of 32 bits.
pub(crate) fn put_u32s(payload: &mut Vec<u8>, values: &[u32]) {
    payload.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// Appends halves.
pub(crate) fn put_halves(payload: &mut Vec<u8>, values: &[f16]) {
    payload.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    // The algorithm's values are 32 bits wide.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ORIGIN: Origin = Origin([7; 32]);

    fn sample() -> Vec<u8> {
        seal(Kind::Roar, 3, 64, 5, ORIGIN, b"payload")
    }

    /// What FORMAT.md says, byte by byte.
    #[test]
    fn golden_bytes() {
        let file = sample();
        assert_eq!(&file[..8], b"KVSINDEX");
        assert_eq!(file[8..24], [1, 0, 3, 0, 3, 0, 0, 0, 64, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(file[24..56], [7; 32]);
        assert_eq!(file[56..64], [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(file[64..68], crc32c(b"payload").to_le_bytes());
        assert_eq!(file[68..72], crc32c(&file[..68]).to_le_bytes());
        assert_eq!(&file[72..], b"payload");
    }

    #[test]
    fn only_what_was_asked_for() {
        let file = sample();
        let opened = open(&file, Kind::Roar, 3, ORIGIN).expect("its own kind, version and origin");
        assert_eq!((opened.head_dim, opened.keys, opened.payload), (64, 5, &b"payload"[..]));
        for (kind, version, origin, expected) in [
            (
                Kind::Wave,
                3,
                ORIGIN,
                "not usable as an index: it is of kind 3, not 4 (Wave)",
            ),
            (
                Kind::Roar,
                2,
                ORIGIN,
                "not usable as an index: Roar version 3, this program reads 2",
            ),
            (
                Kind::Roar,
                3,
                Origin([8; 32]),
                "not usable as an index: it was built from other keys or another basis",
            ),
        ] {
            let error = open(&file, kind, version, origin).expect_err(expected);
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let file = sample();
        for bit in 0..file.len() * 8 {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&flipped, Kind::Roar, 3, ORIGIN).is_err(), "bit {bit}");
        }
        for len in 0..file.len() {
            assert!(open(&file[..len], Kind::Roar, 3, ORIGIN).is_err(), "cut at {len}");
        }
    }

    proptest! {
        #[test]
        fn fields_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), counts in prop::collection::vec(any::<usize>(), 0..6)) {
            let mut fields = Fields::new(&bytes);
            for count in counts {
                let left = fields.rest.len();
                prop_assert_eq!(fields.clone().u32s(count).is_ok(), count <= left / 4);
                let small = count % 9;
                prop_assert_eq!(fields.halves(small).is_ok(), small <= left / 2);
            }
        }
    }
}
