//! A message as the buffers it came in, or will leave in.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes, BytesMut};

/// Shared buffers in a row that are read as one. Parts are never empty.
#[derive(Clone, Debug, Default)]
pub struct Rope {
    parts: VecDeque<Bytes>,
    len: usize,
}

impl Rope {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a buffer at the end, sharing it.
    pub fn push(&mut self, part: Bytes) {
        if !part.is_empty() {
            self.len += part.len();
            self.parts.push_back(part);
        }
    }

    /// Removes the first buffer.
    pub fn pop(&mut self) -> Option<Bytes> {
        let part = self.parts.pop_front()?;
        self.len -= part.len();
        Some(part)
    }

    /// Removes the first `count` bytes, `None` if there are not so many. They are shared where they lie in one buffer and
    /// copied where they do not.
    pub fn cut(&mut self, count: usize) -> Option<Bytes> {
        if count > self.len {
            return None;
        }
        let Some(first) = self.parts.front_mut() else {
            return Some(Bytes::new());
        };
        if first.len() > count {
            self.len -= count;
            return Some(first.split_to(count));
        }
        if first.len() == count {
            return self.pop();
        }
        let mut joined = BytesMut::with_capacity(count);
        while joined.len() < count {
            let chunk = self.chunk();
            let wanted = chunk.len().min(count - joined.len());
            joined.extend_from_slice(&chunk[..wanted]);
            self.advance(wanted);
        }
        Some(joined.freeze())
    }

    /// Removes the first `count` bytes as a rope, `None` if there are not so many. Nothing is copied.
    pub fn split(&mut self, count: usize) -> Option<Self> {
        if count > self.len {
            return None;
        }
        let mut head = Self::new();
        while head.len < count {
            let wanted = count - head.len;
            match self.parts.front_mut() {
                Some(first) if first.len() > wanted => {
                    head.push(first.split_to(wanted));
                    self.len -= wanted;
                }
                _ => head.push(self.pop()?),
            }
        }
        Some(head)
    }

    /// All of it as one buffer; copied unless it is one already.
    pub fn into_bytes(mut self) -> Bytes {
        self.cut(self.len).unwrap_or_default()
    }
}

impl Buf for Rope {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.parts.front().map_or(&[], |part| part)
    }

    fn chunks_vectored<'a>(&'a self, into: &mut [IoSlice<'a>]) -> usize {
        let slices = into.iter_mut().zip(&self.parts);
        slices.map(|(slice, part)| *slice = IoSlice::new(part)).count()
    }

    fn advance(&mut self, count: usize) {
        assert!(count <= self.len, "advance past the end of a rope");
        self.len -= count;
        let mut left = count;
        while left > 0 {
            let Some(first) = self.parts.front_mut() else { return };
            if first.len() > left {
                first.advance(left);
                return;
            }
            left -= first.len();
            self.parts.pop_front();
        }
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        assert!(count <= self.len, "copy past the end of a rope");
        self.cut(count).unwrap_or_default()
    }
}

impl IntoIterator for Rope {
    type Item = Bytes;
    type IntoIter = std::collections::vec_deque::IntoIter<Bytes>;

    fn into_iter(self) -> Self::IntoIter {
        self.parts.into_iter()
    }
}

impl From<Bytes> for Rope {
    fn from(part: Bytes) -> Self {
        [part].into_iter().collect()
    }
}

impl Extend<Bytes> for Rope {
    fn extend<I: IntoIterator<Item = Bytes>>(&mut self, parts: I) {
        parts.into_iter().for_each(|part| self.push(part));
    }
}

impl FromIterator<Bytes> for Rope {
    fn from_iter<I: IntoIterator<Item = Bytes>>(parts: I) -> Self {
        let mut rope = Self::new();
        rope.extend(parts);
        rope
    }
}
