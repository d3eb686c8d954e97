//! Rust source with what is not code blanked out, so that a word in a comment or a string is not taken for code.

/// The same text, with the insides of comments, strings and characters replaced by spaces. Line breaks stay where they are.
pub fn code_only(text: &str) -> String {
    let mut rest = text;
    let mut out = String::with_capacity(text.len());
    let mut previous = ' ';
    while let Some(c) = rest.chars().next() {
        let skipped = match c {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            '"' => string(rest),
            'r' | 'b' | 'c' if !is_word(previous) => prefixed_string(rest),
            '\'' => character(rest),
            _ => 0,
        };
        if skipped == 0 {
            out.push(c);
            previous = c;
            rest = &rest[c.len_utf8()..];
        } else {
            let (gone, after) = rest.split_at(skipped);
            out.extend(gone.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            previous = ' ';
            rest = after;
        }
    }
    out
}

/// Code only, up to the unit tests; by convention `#[cfg(test)] mod tests` comes last in a file.
pub fn code_without_tests(text: &str) -> String {
    let code = code_only(text);
    match code.find("#[cfg(test)]\nmod tests") {
        Some(start) => code[..start].to_owned(),
        None => code,
    }
}

/// Whether a file holds tests only.
pub fn is_test_file(path: &str) -> bool {
    path.starts_with("tests/") || path.contains("/tests/") || path.contains("/benches/") || path.ends_with("/tests.rs")
}

/// Lines (from 1) on which `word` stands by itself.
pub fn lines_with_word<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = (usize, usize)> + 'a {
    code.lines().enumerate().flat_map(move |(i, line)| {
        line.match_indices(word).filter_map(move |(column, _)| {
            let before = line[..column].chars().next_back().is_some_and(is_word);
            let after = line[column + word.len()..].chars().next().is_some_and(is_word);
            (!before && !after).then_some((i + 1, column))
        })
    })
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn block_comment(text: &str) -> usize {
    let bytes = text.as_bytes();
    let (mut depth, mut i) = (0usize, 0usize);
    while i < bytes.len() {
        match &bytes[i..] {
            [b'/', b'*', ..] => (depth, i) = (depth + 1, i + 2),
            [b'*', b'/', ..] if depth == 1 => return i + 2,
            [b'*', b'/', ..] => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
    }
    bytes.len()
}

fn string(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut i = 1;
    while i < bytes.len() {
        match bytes[i] {
            b'\\' => i += 2,
            b'"' => return i + 1,
            _ => i += 1,
        }
    }
    bytes.len()
}

/// `r".."`, `r#".."#`, `b".."`, `br".."`, `c".."`; 0 where the letter starts a name.
fn prefixed_string(text: &str) -> usize {
    let letters = text.find(|c| !matches!(c, 'r' | 'b' | 'c')).unwrap_or(text.len());
    let hashes = text[letters..].find(|c| c != '#').unwrap_or(0);
    let open = letters + hashes;
    if letters > 2 || !text[open..].starts_with('"') || (hashes > 0 && !text[..letters].contains('r')) {
        return 0;
    }
    if !text[..letters].contains('r') {
        return open + string(&text[open..]);
    }
    let close = format!("\"{}", "#".repeat(hashes));
    text[open + 1..]
        .find(&close)
        .map_or(text.len(), |end| open + 1 + end + close.len())
}

/// A character literal; 0 for a lifetime.
fn character(text: &str) -> usize {
    let mut inside = text[1..].char_indices();
    match inside.next() {
        Some((_, '\\')) => text[1..]
            .char_indices()
            .skip(2)
            .find(|(_, c)| *c == '\'')
            .map_or(0, |(end, _)| end + 2),
        Some(_) => match inside.next() {
            Some((end, '\'')) => end + 2,
            _ => 0,
        },
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_code_is_blanked() {
        let table = [
            ("a // b\nc", "a     \nc"),
            ("a /* b /* c */ d */ e", "a                   e"),
            (r#"f("x \" y") z"#, r"f(        ) z"),
            ("r#\"a \"b\" c\"# d", "             d"),
            ("br\"a\" b'x' 'y' z", "      b        z"),
            ("&'a str 'b: loop", "&'a str 'b: loop"),
            (r"'\n' '\'' '\u{1}' x", "                  x"),
            ("crab(\"x\")", "crab(   )"),
        ];
        for (text, expected) in table {
            let code = code_only(text);
            assert_eq!(code.trim_end(), expected.trim_end(), "{text}");
            assert_eq!(code.lines().count(), text.lines().count(), "{text}");
        }
    }

    #[test]
    fn words_stand_by_themselves() {
        let lines: Vec<_> = lines_with_word("unsafe {\nunsafe_code not_unsafe\n x unsafe", "unsafe").collect();
        assert_eq!(lines, [(1, 0), (3, 3)]);
    }

    #[test]
    fn unit_tests_are_cut_off() {
        assert_eq!(
            code_without_tests("fn a() {}\n#[cfg(test)]\nmod tests {\n b }\n"),
            "fn a() {}\n"
        );
    }
}
