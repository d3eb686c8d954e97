//! A GGUF file: its metadata with every mistake named, and its tensors' bytes by offset.
//!
//! The container is read by candle, which checks each length against the file's before it allocates.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::SystemTime,
};

use candle_core::{
    Device,
    quantized::{
        GgmlDType,
        gguf_file::{Content, Value},
    },
};
use sha2::{Digest, Sha256};

use crate::LoadError;

/// Read at once while hashing.
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// Metadata of an open file. Dropped once a [`crate::ModelFile`] has taken what it needs.
pub(crate) struct Metadata {
    path: PathBuf,
    values: HashMap<String, Value>,
}

/// Tensors of an open file.
pub(crate) struct Tensors {
    path: PathBuf,
    file: File,
    stamp: Stamp,
    infos: HashMap<String, TensorInfo>,
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorInfo {
    pub(crate) dtype: GgmlDType,
    /// Outermost first: a matrix is `[rows, cols]`.
    pub(crate) dims: Vec<usize>,
    offset: u64,
    bytes: usize,
}

/// What changes when a file is written to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            len: metadata.len(),
            modified: metadata.modified().ok(),
        })
    }
}

/// Opens a file and reads everything but the tensors' bytes.
pub(crate) fn open(path: &Path) -> Result<(Metadata, Tensors), LoadError> {
    let read_error = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(read_error)?;
    let stamp = Stamp::of(&file).map_err(read_error)?;
    let mut reader = BufReader::with_capacity(HASH_CHUNK_BYTES, &file);
    // Caught, because an alignment of 0 in the file makes the reader divide by it.
    let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut reader)))
        .map_err(|_| "its header cannot be".to_owned())
        .and_then(|content| content.map_err(|error| first_line(&error)))
        .map_err(|reason| LoadError::Format {
            path: path.to_owned(),
            reason,
        })?;
    drop(reader);
    let mut infos = HashMap::with_capacity(content.tensor_infos.len());
    for (name, info) in content.tensor_infos {
        let found = locate(
            &info.ggml_dtype,
            info.shape.dims(),
            content.tensor_data_offset,
            info.offset,
            stamp.len,
        );
        match found {
            Ok((offset, bytes)) => {
                let dims = info.shape.dims().to_vec();
                infos.insert(
                    name,
                    TensorInfo {
                        dtype: info.ggml_dtype,
                        dims,
                        offset,
                        bytes,
                    },
                );
            }
            Err(problem) => {
                return Err(LoadError::Tensor {
                    path: path.to_owned(),
                    name,
                    problem,
                });
            }
        }
    }
    let metadata = Metadata {
        path: path.to_owned(),
        values: content.metadata,
    };
    Ok((
        metadata,
        Tensors {
            path: path.to_owned(),
            file,
            stamp,
            infos,
        },
    ))
}

/// Offset and bytes of a tensor, if it lies inside the file.
fn locate(dtype: &GgmlDType, dims: &[usize], base: u64, offset: u64, len: u64) -> Result<(u64, usize), String> {
    let elements = dims.iter().try_fold(1_usize, |product, dim| product.checked_mul(*dim));
    let row = dims.last().copied().unwrap_or(1);
    if !row.is_multiple_of(dtype.block_size()) {
        return Err(format!(
            "has rows of {row} elements, and {dtype:?} comes in blocks of {}",
            dtype.block_size()
        ));
    }
    let extent = elements.and_then(|elements| {
        let bytes = (elements / dtype.block_size()).checked_mul(dtype.type_size())?;
        let start = base.checked_add(offset)?;
        Some((start, bytes, start.checked_add(bytes as u64)?))
    });
    match extent {
        Some((start, bytes, end)) if end <= len => Ok((start, bytes)),
        Some((_, _, end)) => Err(format!("ends at byte {end}, and the file has {len}: it is cut short")),
        None => Err(format!("has shape {dims:?}, which no file can hold")),
    }
}

/// The reader's errors carry a backtrace on further lines.
fn first_line(error: &candle_core::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or("unreadable").to_owned()
}

impl Metadata {
    /// An error about `key`.
    pub(crate) fn error(&self, key: &str, problem: impl Into<String>) -> LoadError {
        LoadError::Metadata {
            path: self.path.clone(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    /// An error about something sound that is not done here.
    pub(crate) fn unsupported(&self, what: impl Into<String>, instead: impl Into<String>) -> LoadError {
        LoadError::Unsupported {
            path: self.path.clone(),
            what: what.into(),
            instead: instead.into(),
        }
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// A whole number that is not negative.
    pub(crate) fn number(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        let number = match value {
            Value::I8(v) => usize::try_from(*v).ok(),
            Value::I16(v) => usize::try_from(*v).ok(),
            Value::I32(v) => usize::try_from(*v).ok(),
            Value::I64(v) => usize::try_from(*v).ok(),
            Value::U8(_) | Value::U16(_) | Value::U32(_) | Value::U64(_) => {
                value.to_u64().ok().and_then(|v| usize::try_from(v).ok())
            }
            _ => None,
        };
        number
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, value, "a whole number"))
    }

    /// A token id below `vocab`.
    pub(crate) fn token(&self, key: &str, vocab: usize) -> Result<Option<u32>, LoadError> {
        match self.number(key)? {
            None => Ok(None),
            Some(id) if id < vocab => Ok(Some(id as u32)),
            Some(id) => Err(self.error(key, format!("is {id}, and the vocabulary has {vocab} tokens"))),
        }
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f32>, LoadError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        let number = match value {
            Value::F32(v) => Some(*v),
            Value::F64(v) => Some(*v as f32),
            _ => None,
        };
        number
            .filter(|v| v.is_finite())
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, value, "a finite number"))
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(value) => Err(self.wrong_type(key, value, "true or false")),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(value) => Err(self.wrong_type(key, value, "a text")),
        }
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, LoadError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        let Value::Array(values) = value else {
            return Err(self.wrong_type(key, value, "a list of texts"));
        };
        let texts = values.iter().map(|value| match value {
            Value::String(text) => Ok(text.as_str()),
            other => Err(self.wrong_type(key, other, "a list of texts")),
        });
        texts.collect::<Result<_, _>>().map(Some)
    }

    pub(crate) fn numbers(&self, key: &str) -> Result<Option<Vec<i64>>, LoadError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        let Value::Array(values) = value else {
            return Err(self.wrong_type(key, value, "a list of numbers"));
        };
        let numbers = values.iter().map(|value| match value {
            Value::I32(v) => Ok(i64::from(*v)),
            Value::U32(v) => Ok(i64::from(*v)),
            other => Err(self.wrong_type(key, other, "a list of numbers")),
        });
        numbers.collect::<Result<_, _>>().map(Some)
    }

    /// Numbers that are no NaN; infinite ones may stand for "never".
    pub(crate) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, LoadError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        let Value::Array(values) = value else {
            return Err(self.wrong_type(key, value, "a list of numbers"));
        };
        let numbers = values.iter().map(|value| match value {
            Value::F32(v) if !v.is_nan() => Ok(*v),
            other => Err(self.wrong_type(key, other, "a list of numbers")),
        });
        numbers.collect::<Result<_, _>>().map(Some)
    }

    fn wrong_type(&self, key: &str, found: &Value, expected: &str) -> LoadError {
        // Arrays are named, not printed: a vocabulary does not belong in an error.
        let found = match found {
            Value::Array(values) => format!("a list of {}", values.len()),
            Value::String(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
            other => format!("{other:?}"),
        };
        self.error(key, format!("is {found}, and must be {expected}"))
    }
}

impl Tensors {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos.get(name)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.infos.keys().map(String::as_str)
    }

    /// An error about the tensor `name`.
    pub(crate) fn error(&self, name: &str, problem: impl Into<String>) -> LoadError {
        LoadError::Tensor {
            path: self.path.clone(),
            name: name.to_owned(),
            problem: problem.into(),
        }
    }

    /// The tensor's bytes as they lie in the file.
    pub(crate) fn bytes(&self, name: &str) -> Result<Vec<u8>, LoadError> {
        let info = self.info(name).ok_or_else(|| self.error(name, "is missing"))?;
        // Bounded by the file's length when the file was opened.
        let mut bytes = vec![0; info.bytes];
        self.file
            .read_exact_at(&mut bytes, info.offset)
            .map_err(|source| self.read_error(source))?;
        Ok(bytes)
    }

    /// The tensor's values, whatever its type.
    pub(crate) fn values(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let info = self.info(name).ok_or_else(|| self.error(name, "is missing"))?;
        let bytes = self.bytes(name)?;
        if info.dtype == GgmlDType::F32 {
            let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            return Ok(values.collect());
        }
        let elements = info.dims.iter().product::<usize>();
        candle_core::quantized::ggml_file::qtensor_from_ggml(info.dtype, &bytes, vec![elements], &Device::Cpu)
            .and_then(|tensor| tensor.dequantize(&Device::Cpu))
            .and_then(|tensor| tensor.to_vec1())
            .map_err(|error| self.error(name, format!("cannot be dequantised: {}", first_line(&error))))
    }

    /// SHA-256 of the whole file.
    pub(crate) fn sha256(&self) -> Result<[u8; 32], LoadError> {
        let mut sha = Sha256::new();
        let mut chunk = vec![0; HASH_CHUNK_BYTES];
        let mut file = &self.file;
        let read = |file: &mut &File, chunk: &mut [u8]| file.read(chunk).map_err(|source| self.read_error(source));
        file.seek(SeekFrom::Start(0))
            .map_err(|source| self.read_error(source))?;
        loop {
            match read(&mut file, &mut chunk)? {
                0 => break,
                len => sha.update(&chunk[..len]),
            }
        }
        Ok(sha.finalize().into())
    }

    /// Refuses a file that was written to since it was opened: its bytes are no longer those that were hashed.
    pub(crate) fn check_unchanged(&self) -> Result<(), LoadError> {
        let now = Stamp::of(&self.file).map_err(|source| self.read_error(source))?;
        if now == self.stamp {
            Ok(())
        } else {
            Err(LoadError::Changed {
                path: self.path.clone(),
            })
        }
    }

    fn read_error(&self, source: io::Error) -> LoadError {
        LoadError::Read {
            path: self.path.clone(),
            source,
        }
    }
}
