//! Text from ids as they come.

use std::sync::Arc;

use super::Tokenizer;

/// Text of a growing list of ids: gives out only whole code points, skips control tokens.
pub struct TextDecoder {
    tokenizer: Arc<Tokenizer>,
    /// The beginning of a code point whose end has not come: at most 3 bytes.
    pending: Vec<u8>,
}

impl TextDecoder {
    pub(super) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            pending: Vec::new(),
        }
    }

    /// The text that `id` completes; empty while a code point is incomplete. What can never become one is replaced by
    /// U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend_from_slice(self.tokenizer.bytes(id));
        take_whole(&mut self.pending)
    }

    /// What is left, with replacement characters for broken code points.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

/// Takes everything but an incomplete last code point.
fn take_whole(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut taken = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        let incomplete = taken + invalid.len() == pending.len()
            && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if incomplete {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        taken += invalid.len();
    }
    pending.drain(..taken);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_code_points_only() {
        // Bytes pushed, text out, bytes left.
        let table: [(&[u8], &str, usize); 9] = [
            (b"", "", 0),
            (b"abc", "abc", 0),
            (&[0xc3], "", 1),
            (&[b'a', 0xe6, 0x97], "a", 2),
            (&[0xe6, 0x97, 0xa5], "日", 0),
            (&[0xf0, 0x9f, 0x98], "", 3),
            (&[0xff, b'a'], "\u{fffd}a", 0),
            (&[0xe6, b'a', 0xc3], "\u{fffd}a", 1),
            (&[0x80, 0x80], "\u{fffd}\u{fffd}", 0),
        ];
        for (bytes, text, left) in table {
            let mut pending = bytes.to_vec();
            assert_eq!(take_whole(&mut pending), text, "{bytes:x?}");
            assert_eq!(pending.len(), left, "{bytes:x?}");
        }
    }
}
