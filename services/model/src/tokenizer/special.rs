//! Finding special tokens in a text.

use std::collections::{HashMap, HashSet};

/// What makes a token special.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Steers the model; recognised only where the caller vouches for the text, and never shown.
    Control,
    /// A word added to the vocabulary; always recognised, and part of the text.
    UserDefined,
}

/// A stretch of text, or a special token in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    Token(u32),
}

/// The special tokens of a vocabulary.
pub(super) struct Specials {
    /// By first character (Gemma has thousands), longest first, so that the first that matches is the longest.
    by_first: HashMap<char, Vec<(String, u32, Kind)>>,
    controls: HashSet<u32>,
}

impl Specials {
    pub(super) fn new(texts: &[&str], kinds: &[Option<Kind>]) -> Self {
        let mut tokens: Vec<_> = (0_u32..)
            .zip(texts.iter().zip(kinds))
            .filter_map(|(id, (text, kind))| kind.map(|kind| ((*text).to_owned(), id, kind)))
            .collect();
        tokens.sort_by_key(|(text, ..)| std::cmp::Reverse(text.len()));
        let controls = tokens
            .iter()
            .filter(|(.., kind)| *kind == Kind::Control)
            .map(|(_, id, _)| *id);
        let controls = controls.collect();
        let mut by_first: HashMap<char, Vec<_>> = HashMap::new();
        for token in tokens {
            if let Some(first) = token.0.chars().next() {
                by_first.entry(first).or_default().push(token);
            }
        }
        Self { by_first, controls }
    }

    pub(super) fn is_control(&self, id: u32) -> bool {
        self.controls.contains(&id)
    }

    /// Cuts `text` at its special tokens, leftmost and longest first; control tokens count only when `control` is true.
    pub(super) fn split<'a>(&self, text: &'a str, control: bool) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let (mut start, mut at) = (0, 0);
        while let Some(c) = text[at..].chars().next() {
            let (here, rest) = (at, &text[at..]);
            let candidates = self.by_first.get(&c).map_or(&[][..], Vec::as_slice);
            let token = candidates
                .iter()
                .find(|(token, _, kind)| (control || *kind != Kind::Control) && rest.starts_with(token.as_str()));
            match token {
                Some((token, id, _)) => {
                    if start < here {
                        pieces.push(Piece::Text(&text[start..here]));
                    }
                    pieces.push(Piece::Token(*id));
                    at = here + token.len();
                    start = at;
                }
                None => at = here + c.len_utf8(),
            }
        }
        if start < text.len() {
            pieces.push(Piece::Text(&text[start..]));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leftmost_longest_token_counts() {
        use Piece::{Text, Token};
        let kinds = [Kind::Control, Kind::Control, Kind::UserDefined, Kind::Control].map(Some);
        let specials = Specials::new(&["<a>", "<a><b>", "<u>", "é!"], &kinds);
        let table: [(&str, bool, &[Piece<'_>]); 9] = [
            ("", true, &[]),
            ("plain", true, &[Text("plain")]),
            ("<a>", true, &[Token(0)]),
            ("<a>", false, &[Text("<a>")]),
            ("<a><b>x", true, &[Token(1), Text("x")]),
            ("<<a>x<a", true, &[Text("<"), Token(0), Text("x<a")]),
            ("x<u>y<a>", false, &[Text("x"), Token(2), Text("y<a>")]),
            ("éé!é", true, &[Text("é"), Token(3), Text("é")]),
            ("日<u>本", true, &[Text("日"), Token(2), Text("本")]),
        ];
        for (text, control, expected) in table {
            assert_eq!(specials.split(text, control), expected, "{text}, {control}");
        }
        assert_eq!(
            [0, 1, 2, 3, 9].map(|id| specials.is_control(id)),
            [true, true, false, true, false]
        );
    }
}
