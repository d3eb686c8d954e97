//! Stop strings over a growing text: what may be shown, and where it ends.

/// Holds back the shortest tail that may still become a stop string, and cuts exactly before one.
#[derive(Debug)]
pub(crate) struct StopText {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text led to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Text that became certain; may be empty.
    Certain(String),
    /// The text before the stop string that is now complete; nothing follows.
    Stopped(String),
}

impl StopText {
    /// Watches for `stops`, none of which is empty.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        debug_assert!(
            stops.iter().all(|stop| !stop.is_empty()),
            "an empty stop string stops everything"
        );
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, text: &str) -> Piece {
        if self.stops.is_empty() {
            return Piece::Certain(text.to_owned());
        }
        self.held.push_str(text);
        // The one that is complete first, so that how the text was cut into pieces does not matter.
        let ends = |stop: &String| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at));
        if let Some((_, at)) = self.stops.iter().filter_map(ends).min() {
            self.held.truncate(at);
            return Piece::Stopped(std::mem::take(&mut self.held));
        }
        let undecided = self.held.split_off(self.held.len() - self.undecided());
        Piece::Certain(std::mem::replace(&mut self.held, undecided))
    }

    /// What was held back, when the text ends without a stop string.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the longest tail that is the beginning of a stop string.
    fn undecided(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let stop = stop.as_bytes();
            (1..stop.len().min(held.len() + 1))
                .rev()
                .find(|len| held.ends_with(&stop[..*len]))
        };
        let tail = self.stops.iter().filter_map(longest).max().unwrap_or(0);
        // A stop string begins on a character, so a matching tail does too: UTF-8 heads and tails differ.
        debug_assert!(self.held.is_char_boundary(self.held.len() - tail));
        tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `pieces`; the result is what was shown after each, joined by `|`, with `#` where it stopped.
    fn check(stops: &[&str], pieces: &[&str], shown: &str) {
        let mut text = StopText::new(stops.iter().map(ToString::to_string).collect());
        let mut out = Vec::new();
        let mut stopped = false;
        for piece in pieces {
            match text.push(piece) {
                Piece::Certain(text) => out.push(text),
                Piece::Stopped(text) => {
                    out.push(text + "#");
                    stopped = true;
                    break;
                }
            }
        }
        if !stopped {
            out.push(text.finish());
        }
        assert_eq!(out.join("|"), shown, "{stops:?} over {pieces:?}");
    }

    #[test]
    fn text_is_held_back_only_while_undecided_and_cut_exactly() {
        check(&[], &["a", "b"], "a|b|");
        check(&["END"], &["one EN", "D two"], "one |#");
        check(&["END"], &["one EN", "Tirely"], "one |ENTirely|");
        check(&["END"], &["one E", "N"], "one ||EN");
        check(&["aab"], &["aaa", "ab"], "a|a#");
        check(&["b", "abc"], &["xa", "bc"], "x|a#");
        check(&["bc", "ab"], &["xabc"], "x#");
        check(&["\n\n"], &["line\n", "\nmore"], "line|#");
        check(&["é"], &["caf", "é!"], "caf|#");
        check(&["éa"], &["café", "b"], "caf|éb|");
        check(&["ÿ"], &["Ã", "b"], "Ã|b|");
    }

    #[test]
    fn any_split_shows_the_same_text() {
        let text = "abracadabra, abrakadabra: the spell. abracad";
        let stops = ["abrak", "spell!", ". abr"];
        let end = text.find("abrak").expect("is there");
        for first in 0..text.len() {
            for second in first..text.len() {
                let mut stop_text = StopText::new(stops.iter().map(ToString::to_string).collect());
                let mut shown = String::new();
                for piece in [&text[..first], &text[first..second], &text[second..]] {
                    match stop_text.push(piece) {
                        Piece::Certain(text) => shown += &text,
                        Piece::Stopped(text) => {
                            shown += &text;
                            break;
                        }
                    }
                }
                assert_eq!(shown, text[..end], "split at {first} and {second}");
            }
        }
    }
}
