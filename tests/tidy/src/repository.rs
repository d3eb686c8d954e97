//! The files of a repository: what Git tracks or would track, with their texts.

use std::{collections::BTreeMap, fmt, path::Path, process::Command};

use anyhow::{Context, Result, bail};
use toml::Table;

/// Paths relative to the root, with `/`, and the text of each file (empty for what is not UTF-8).
#[derive(Debug, Clone, Default)]
pub struct Repository {
    files: BTreeMap<String, String>,
}

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The file, relative to the root.
    pub path: String,
    /// The line from 1; 0 for the file as a whole.
    pub line: usize,
    /// What is wrong and what to do.
    pub what: String,
}

/// A workspace member as its manifest describes it.
#[derive(Debug, Clone)]
pub struct Crate {
    /// The package name.
    pub name: String,
    /// The folder, as in `storage/tier`.
    pub folder: String,
    /// Names of dependencies: normal and build.
    pub dependencies: Vec<String>,
    /// Names of dev-dependencies.
    pub dev_dependencies: Vec<String>,
}

impl Repository {
    /// A made-up repository.
    pub fn of(files: &[(&str, &str)]) -> Self {
        Self {
            files: files
                .iter()
                .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
                .collect(),
        }
    }

    /// What Git tracks under `root`, and what it would add; ignored files are not part of the repository.
    pub fn read(root: &Path) -> Result<Self> {
        let listing = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .context("git could not be started: install git, tidy asks it which files belong to the repository")?;
        if !listing.status.success() {
            bail!(
                "git ls-files failed in {}: {}",
                root.display(),
                String::from_utf8_lossy(&listing.stderr)
            );
        }
        let mut files = BTreeMap::new();
        for path in String::from_utf8_lossy(&listing.stdout)
            .split('\0')
            .filter(|path| !path.is_empty())
        {
            // A file that was deleted and not yet committed is still listed.
            if let Ok(bytes) = std::fs::read(root.join(path)) {
                files.insert(path.to_owned(), String::from_utf8(bytes).unwrap_or_default());
            }
        }
        Ok(Self { files })
    }

    /// All files in order of their paths.
    pub fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// The text of one file.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).map(String::as_str)
    }

    /// Whether a file or a folder is there.
    pub fn exists(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let folder = format!("{path}/");
        self.files.contains_key(path)
            || self
                .files
                .range(folder.clone()..)
                .next()
                .is_some_and(|(p, _)| p.starts_with(&folder))
    }

    /// Files with one of these extensions.
    pub fn with_extension<'a>(&'a self, extensions: &'a [&'a str]) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files()
            .filter(|(path, _)| path.rsplit_once('.').is_some_and(|(_, e)| extensions.contains(&e)))
    }

    /// Every package of the workspace; manifests that cannot be read are violations.
    pub fn crates(&self) -> (Vec<Crate>, Vec<Violation>) {
        let (mut crates, mut violations) = (Vec::new(), Vec::new());
        for (path, text) in self.files().filter(|(path, _)| path.ends_with("/Cargo.toml")) {
            match parse_manifest(path, text) {
                Ok(found) => crates.push(found),
                Err(why) => violations.push(Violation::new(path, 0, format!("not a package manifest: {why}"))),
            }
        }
        (crates, violations)
    }
}

impl Violation {
    /// Something wrong in a line (from 1; 0 for the whole file).
    pub fn new(path: &str, line: usize, what: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            line,
            what: what.into(),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.what),
            line => write!(f, "{}:{line}: {}", self.path, self.what),
        }
    }
}

impl Crate {
    /// Whether a path lies in this crate.
    pub fn owns(&self, path: &str) -> bool {
        path.strip_prefix(self.folder.as_str())
            .is_some_and(|rest| rest.starts_with('/'))
    }
}

fn parse_manifest(path: &str, text: &str) -> Result<Crate> {
    let manifest: Table = text.parse()?;
    let name = manifest
        .get("package")
        .and_then(|package| package.get("name"))
        .and_then(|name| name.as_str());
    let names = |table: &Table, kinds: &[&str]| -> Vec<String> {
        let of_kind = |kind: &&str| table.get(*kind).and_then(|deps| deps.as_table());
        kinds
            .iter()
            .filter_map(of_kind)
            .flat_map(|deps| deps.iter().map(package_name))
            .collect()
    };
    let mut dependencies = names(&manifest, &["dependencies", "build-dependencies"]);
    let mut dev_dependencies = names(&manifest, &["dev-dependencies"]);
    for target in manifest
        .get("target")
        .and_then(|t| t.as_table())
        .into_iter()
        .flat_map(|t| t.values())
    {
        if let Some(target) = target.as_table() {
            dependencies.extend(names(target, &["dependencies", "build-dependencies"]));
            dev_dependencies.extend(names(target, &["dev-dependencies"]));
        }
    }
    Ok(Crate {
        name: name.context("[package] name is missing")?.to_owned(),
        folder: path.trim_end_matches("/Cargo.toml").to_owned(),
        dependencies,
        dev_dependencies,
    })
}

/// A dependency may be renamed; its package is what counts.
fn package_name((key, value): (&String, &toml::Value)) -> String {
    value
        .get("package")
        .and_then(|name| name.as_str())
        .unwrap_or(key)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_are_read_with_all_kinds_of_dependencies() {
        let manifest = "[package]\nname = \"kvasir-a\"\n[dependencies]\nb.workspace = true\nc = { package = \"real-c\", version = \"1\" }\n\
                        [build-dependencies]\nd = \"1\"\n[target.'cfg(unix)'.dependencies]\ne = \"1\"\n[dev-dependencies]\nf = \"1\"\n";
        let (crates, violations) = Repository::of(&[("storage/a/Cargo.toml", manifest)]).crates();
        assert!(violations.is_empty(), "{violations:?}");
        assert_eq!(crates[0].name, "kvasir-a");
        assert_eq!(crates[0].dependencies, ["b", "real-c", "d", "e"]);
        assert_eq!(crates[0].dev_dependencies, ["f"]);
        assert!(crates[0].owns("storage/a/src/lib.rs") && !crates[0].owns("storage/ab/src/lib.rs"));
    }

    #[test]
    fn folders_exist_through_their_files() {
        let repository = Repository::of(&[("a/b/c.md", "")]);
        for (path, there) in [
            ("a", true),
            ("a/b", true),
            ("a/b/", true),
            ("a/b/c.md", true),
            ("a/bc", false),
            ("a/b/c", false),
        ] {
            assert_eq!(repository.exists(path), there, "{path}");
        }
    }
}
