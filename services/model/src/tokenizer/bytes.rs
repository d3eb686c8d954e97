//! What bytes each token stands for.

use super::{pieces::SPACE, special::Kind};

/// Bytes of all tokens, end to end.
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// Byte-level vocabularies write each byte as a printable character (Radford et al. 2019); special tokens are
    /// written as they are.
    pub(super) fn new(texts: &[&str], kinds: &[Option<Kind>]) -> Self {
        let mut bytes = Vec::with_capacity(texts.iter().map(|text| text.len()).sum());
        let mut ends = Vec::with_capacity(texts.len());
        for (text, kind) in texts.iter().zip(kinds) {
            let start = bytes.len();
            bytes.extend(text.chars().map_while(byte_of));
            if kind.is_some() || text.chars().count() != bytes.len() - start {
                bytes.truncate(start);
                bytes.extend_from_slice(text.as_bytes());
            }
            ends.push(bytes.len());
        }
        Self { bytes, ends }
    }

    /// SentencePiece's vocabularies write text as it is, but for spaces, and bytes as `<0xHH>`. In special tokens spaces are plain.
    pub(super) fn of_pieces(texts: &[&str], kinds: &[Option<Kind>]) -> Self {
        let mut bytes = Vec::with_capacity(texts.iter().map(|text| text.len()).sum());
        let mut ends = Vec::with_capacity(texts.len());
        for (text, kind) in texts.iter().zip(kinds) {
            match (kind, byte_piece(text)) {
                (Some(_), _) => bytes.extend_from_slice(text.as_bytes()),
                (None, Some(byte)) => bytes.push(byte),
                (None, None) => bytes.extend_from_slice(text.replace(SPACE, " ").as_bytes()),
            }
            ends.push(bytes.len());
        }
        Self { bytes, ends }
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of token `id`; none beyond the vocabulary.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }
}

/// The byte that a piece `<0xHH>` stands for.
fn byte_piece(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// The byte that `c` is written for. Printable Latin-1 stands for itself; the 68 other bytes follow from U+0100 on, in
/// rising order.
fn byte_of(c: char) -> Option<u8> {
    let itself = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code @ 0..=0xff => Some(code as u8).filter(|byte| itself(*byte)),
        code => (0..=0xff).filter(|byte| !itself(*byte)).nth((code - 0x100) as usize),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn all_bytes_have_a_character_of_their_own() {
        let found: HashSet<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        assert_eq!(found.len(), 256);
        for (c, byte) in [
            ('Ġ', b' '),
            ('Ċ', b'\n'),
            ('ĉ', b'\t'),
            ('A', b'A'),
            ('Ń', 0xad),
            ('ł', 0xa0),
        ] {
            assert_eq!(byte_of(c), Some(byte), "{c}");
        }
        assert_eq!(byte_of('日'), None);
        assert_eq!(byte_of(' '), None);
    }

    #[test]
    fn pieces_stand_for_text_with_spaces_or_for_a_byte() {
        let texts = ["\u{2581}a\u{2581}b", "<0xE9>", "<0x1>", "  "];
        let tokens = TokenBytes::of_pieces(&texts, &[None, None, None, Some(Kind::UserDefined)]);
        let found: Vec<&[u8]> = (0..4).map(|id| tokens.get(id)).collect();
        assert_eq!(found, [&b" a b"[..], &[0xe9], b"<0x1>", b"  "]);
    }

    #[test]
    fn special_tokens_stand_for_their_own_text() {
        let tokens = TokenBytes::new(&["Ġé", "Ġé", "a b"], &[None, Some(Kind::UserDefined), None]);
        assert_eq!(tokens.get(0), [b' ', 0xe9]);
        assert_eq!(tokens.get(1), "Ġé".as_bytes());
        assert_eq!(tokens.get(2), b"a b");
        assert_eq!((tokens.get(3), tokens.len()), (&[][..], 3));
    }
}
