//! The frame of an index file: magic, version, body, CRC-32C of all before; little-endian. And the checks that every search
//! begins with.

use crate::{IndexError, Search};

const VERSION: u32 = 1;

pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new(magic: &[u8; 8]) -> Self {
        let mut bytes = magic.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        Self(bytes)
    }

    pub(crate) fn number(&mut self, number: usize) {
        self.0.extend_from_slice(&(number as u64).to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        let checksum = crc32c::crc32c(&self.0);
        self.0.extend_from_slice(&checksum.to_le_bytes());
        self.0
    }
}

pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// # Errors
    /// [`IndexError::Unusable`] if this is not a whole file of this kind and version.
    pub(crate) fn open(magic: &[u8; 8], bytes: &'a [u8]) -> Result<Self, IndexError> {
        let unusable = |what: String| Err(IndexError::Unusable(what));
        let Some((body, checksum)) = bytes.split_last_chunk::<4>() else {
            return unusable("shorter than a checksum".into());
        };
        let Some((found, rest)) = body.split_first_chunk::<8>() else {
            return unusable("shorter than its name".into());
        };
        if found != magic {
            return unusable(format!("not a {} file", String::from_utf8_lossy(magic)));
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
            return unusable("its checksum does not match: damaged".into());
        }
        match rest.split_first_chunk::<4>() {
            Some((version, rest)) if u32::from_le_bytes(*version) == VERSION => Ok(Self(rest)),
            _ => unusable(format!("of another version, this code reads {VERSION}")),
        }
    }

    pub(crate) fn number(&mut self) -> Result<usize, IndexError> {
        let (number, rest) = self.0.split_first_chunk::<8>().ok_or_else(short)?;
        self.0 = rest;
        usize::try_from(u64::from_le_bytes(*number)).map_err(|_| short())
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], IndexError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(short)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }
}

fn short() -> IndexError {
    IndexError::Unusable("shorter than it says".into())
}

/// # Errors
/// [`IndexError::Invalid`] naming the argument.
pub(crate) fn check_search(search: &Search<'_>, head_dim: usize, keys: usize) -> Result<(), IndexError> {
    let invalid = |argument, problem: String| Err(IndexError::Invalid { argument, problem });
    if !search.q.len().is_multiple_of(head_dim) {
        return invalid(
            "q",
            format!("wants rows of {head_dim}, not {} elements", search.q.len()),
        );
    }
    if !search.q.iter().all(|q| q.is_finite()) || !search.scale.is_finite() {
        return invalid("q", "queries and their scale are finite".into());
    }
    if search.k == 0 {
        return invalid("k", "ask for at least 1 key".into());
    }
    if !(search.effort > 0.0 && search.effort <= 1.0) {
        return invalid("effort", format!("a share in (0, 1], not {}", search.effort));
    }
    if search.keys.head_dim() != head_dim || search.keys.len() != keys {
        return invalid(
            "keys",
            format!(
                "wants the {keys} appended rows of {head_dim}, not {} of {}",
                search.keys.len(),
                search.keys.head_dim()
            ),
        );
    }
    Ok(())
}
