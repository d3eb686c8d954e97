//! Pages do not point at what is gone: relative links, and paths in backticks.

use crate::{Repository, Violation};

/// A path in backticks counts as a claim that the file is there when it starts with one of these.
const OURS: [&str; 6] = ["proto/", "kernels/", "storage/", "services/", "tests/", "deploy/"];

/// Finds relative links and named paths that lead nowhere, in every Markdown file.
pub fn check(repository: &Repository) -> Vec<Violation> {
    let mut found = Vec::new();
    for (path, text) in repository.with_extension(&["md"]) {
        let mut fenced = false;
        for (i, line) in text.lines().enumerate() {
            if line.trim_start().starts_with("```") {
                fenced = !fenced;
            } else if !fenced {
                let mut report = |what| found.push(Violation::new(path, i + 1, what));
                for target in link_targets(line) {
                    check_link(repository, path, text, target)
                        .into_iter()
                        .for_each(&mut report);
                }
                for named in line.split('`').skip(1).step_by(2).filter(|named| is_path(named)) {
                    if !repository.exists(named) {
                        report(format!("names `{named}`, which is not there"));
                    }
                }
            }
        }
    }
    found
}

/// The `target` of each `[text](target)` and `![text](target)` in a line, outside backticks.
fn link_targets(line: &str) -> Vec<&str> {
    let plain = line.split('`').step_by(2);
    // A link's text may hold backticks, so the target is looked for after any `](`.
    let after = plain.flat_map(|part| part.split("](").skip(1));
    after
        .filter_map(|rest| rest.split(')').next())
        .map(|target| target.split(' ').next().unwrap_or(""))
        .collect()
}

fn check_link(repository: &Repository, page: &str, text: &str, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = target
        .split_once('#')
        .map_or((target, None), |(file, anchor)| (file, Some(anchor)));
    let resolved = if file.is_empty() {
        page.to_owned()
    } else {
        resolve(page, file)
    };
    if !file.is_empty() && !repository.exists(&resolved) {
        return Some(format!("links to {target}, which is not there"));
    }
    let there = if file.is_empty() {
        Some(text)
    } else {
        repository.text(&resolved)
    };
    let anchor = anchor.filter(|_| resolved.ends_with(".md"))?;
    let known = there.is_some_and(|text| {
        text.lines()
            .filter(|line| line.starts_with('#'))
            .any(|line| slug(line) == anchor)
    });
    (!known).then(|| format!("links to {target}, but {resolved} has no such heading"))
}

/// Joins a relative link to the folder of the page it stands in.
fn resolve(page: &str, link: &str) -> String {
    let folder = page.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// A heading's anchor as GitHub makes it.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn is_path(named: &str) -> bool {
    OURS.iter().any(|folder| named.starts_with(folder)) && !named.contains(['*', ' ', '…', '{', '<'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_links_and_paths_are_found() {
        let table = [
            ("[a](storage/tier/README.md)", 0),
            ("[a](./storage/../storage/tier/README.md)", 0),
            ("[a](storage/tier)", 0),
            ("[a](storage/gone.md)", 1),
            ("[a](storage/gone.md) and [b](deploy/x.sh)", 2),
            ("![a](picture.png)", 1),
            ("[`a`](gone.rs)", 1),
            ("[a](https://example.org/gone) [m](mailto:a@b.c)", 0),
            ("[a](#two-words) [b](#gone)", 1),
            ("[a](storage/tier/README.md#head) [b](storage/tier/README.md#tail)", 1),
            ("```\n[a](gone.md)\n```", 0),
            ("`storage/tier/README.md` `storage/tier`", 0),
            ("`storage/tier/src/gone.rs`", 1),
            ("`storage/*` `tests/…` `other/gone.rs`", 0),
        ];
        for (text, violations) in table {
            let page = format!("# Two words\n{text}\n");
            let repository = Repository::of(&[("README.md", &page), ("storage/tier/README.md", "# Head\n")]);
            let found = check(&repository);
            assert_eq!(found.len(), violations, "{text}: {found:?}");
        }
    }

    #[test]
    fn links_are_relative_to_their_page() {
        let files = [
            ("README.md", ""),
            ("storage/tier/README.md", "[up](../../README.md) [gone](../README.md)\n"),
        ];
        assert_eq!(check(&Repository::of(&files)).len(), 1);
    }
}
