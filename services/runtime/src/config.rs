//! One configuration tree, four layers: defaults, then a TOML file, then the environment, then flags.
//!
//! A tree is any `Serialize + Deserialize` type whose structs say `#[serde(default, deny_unknown_fields)]`. Every entry
//! of every layer is checked by itself against the tree, so each mistake is reported with its own place, and all of
//! them at once:
//!
//! ```text
//! kvasir.toml:3: store.host_byte_max: there is no such key; did you mean `store.host_bytes_max`?
//! KVASIR__STORE__DISK_BYTES_MAX: store.disk_bytes_max: "lots" is not a size: write a number and a unit, as in ..
//! ```
//!
//! Unknown keys are refused, not warned about: a mistyped limit that is silently ignored is found out by an outage.

mod entry;
mod error;
mod names;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use toml::{Table, Value};

use self::entry::Entry;
pub use self::error::{ConfigError, Problem};

/// Environment variables with this prefix are configuration: `KVASIR__STORE__LISTEN` is `store.listen`.
pub const ENV_PREFIX: &str = "KVASIR__";

/// Gathers the layers; [`Loader::load`] checks and joins them.
#[derive(Debug, Default)]
pub struct Loader {
    entries: Vec<Entry>,
    problems: Vec<Problem>,
    file: Option<PathBuf>,
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The built-in value.
    Default,
    /// A line of a file, counted from 1.
    File(PathBuf, usize),
    /// An environment variable, by its name.
    Env(String),
    /// A flag, as it is spelt on the command line.
    Flag(String),
}

/// A checked tree, and where each value came from.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The configuration.
    pub tree: T,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    sources: BTreeMap<String, Source>,
    explained: Vec<Explained>,
}

/// One line of [`Loaded::explain`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// The dotted key.
    pub key: String,
    /// The value as TOML; `None` for an optional key that is not set.
    pub value: Option<String>,
    /// Where the value came from.
    pub source: Source,
}

impl Loader {
    /// No layers but the defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the entries of a file. A file that cannot be read is a problem; see [`Loader::file_if_present`].
    #[must_use]
    pub fn file(mut self, path: &Path) -> Self {
        match std::fs::read_to_string(path) {
            Ok(text) => self.text(path, &text),
            Err(error) => {
                let why = format!("cannot be read ({error}): check the path given with --config");
                self.problems.push(Problem::new(path.display().to_string(), None, why));
                self
            }
        }
    }

    /// Adds the entries of a file if it is there.
    #[must_use]
    pub fn file_if_present(self, path: &Path) -> Self {
        if path.exists() { self.file(path) } else { self }
    }

    /// Adds the entries of TOML text as if it stood in the file `path`.
    #[must_use]
    pub fn text(mut self, path: &Path, text: &str) -> Self {
        self.file = Some(path.to_owned());
        match entry::from_toml(path, text) {
            Ok(entries) => self.entries.extend(entries),
            Err(problem) => self.problems.push(problem),
        }
        self
    }

    /// Adds those variables that start with [`ENV_PREFIX`]; the rest is not looked at.
    #[must_use]
    pub fn environment(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut found: Vec<Entry> = variables
            .into_iter()
            .filter_map(|(name, value)| entry::from_variable(&name, &value))
            .collect();
        // The operating system's order is arbitrary; problems and provenance should not be.
        found.sort_by(|a, b| a.path.cmp(&b.path));
        self.entries.extend(found);
        self
    }

    /// Adds one assignment `a.b=c`, as given with `--set`.
    #[must_use]
    pub fn set(mut self, assignment: &str) -> Self {
        match assignment.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() => {
                self.entries.push(entry::from_flag(
                    format!("--set {assignment}"),
                    key.trim(),
                    value.trim(),
                ));
            }
            _ => {
                let why = "is not an assignment: write a key, an equals sign and a value, as in \
                           --set store.host_bytes_max=1GiB";
                self.problems
                    .push(Problem::new(format!("--set {assignment}"), None, why.to_owned()));
            }
        }
        self
    }

    /// Adds a value that a named flag stands for, as in `flag("--data-dir", "up.data_dir", "/var/lib/kvasir")`.
    #[must_use]
    pub fn flag(mut self, flag: &str, key: &str, value: impl ToString) -> Self {
        self.entries
            .push(entry::from_flag(flag.to_owned(), key, &value.to_string()));
        self
    }

    /// Checks every entry against the tree and joins them over `defaults`. Reports all problems, not only the first.
    pub fn load<T: Serialize + DeserializeOwned>(self, defaults: T) -> Result<Loaded<T>, ConfigError> {
        let base = to_table(&defaults)?;
        let mut problems = self.problems;
        let mut merged = base.clone();
        let mut sources = BTreeMap::new();
        for entry in self.entries {
            match entry.choose::<T>(&base) {
                Ok(value) => {
                    let key = entry.path.join(".");
                    // A table given as a whole replaces what was said about the keys below it.
                    sources.retain(|known: &String, _| !known.starts_with(&format!("{key}.")));
                    sources.insert(key, entry.source);
                    entry::put(&mut merged, &entry.path, value);
                }
                Err(message) => problems.push(names::explain_refusal::<T>(&base, &entry, &message)),
            }
        }
        if !problems.is_empty() {
            return Err(ConfigError::new(problems));
        }
        let tree = T::deserialize(Value::Table(merged.clone())).map_err(|error| {
            let why = format!("the values do not fit together: {}", error.message());
            ConfigError::new(vec![Problem::new("configuration".to_owned(), None, why)])
        })?;
        let explained = explain::<T>(&base, &to_table(&tree)?, &sources);
        Ok(Loaded {
            tree,
            file: self.file,
            sources,
            explained,
        })
    }
}

impl<T> Loaded<T> {
    /// Every key of the tree in order, with its value and where that came from.
    pub fn explain(&self) -> &[Explained] {
        &self.explained
    }

    /// Where the value of a dotted key came from.
    pub fn source(&self, key: &str) -> Source {
        source_of(&self.sources, key)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File(path, line) => write!(f, "{}:{line}", path.display()),
            Source::Env(name) => f.write_str(name),
            Source::Flag(flag) => f.write_str(flag),
        }
    }
}

fn to_table<T: Serialize>(tree: &T) -> Result<Table, ConfigError> {
    match Value::try_from(tree) {
        Ok(Value::Table(table)) => Ok(table),
        Ok(_) => Err(ConfigError::bug("a configuration tree must be a struct")),
        Err(error) => Err(ConfigError::bug(&format!(
            "a configuration value cannot be written as TOML: {error}"
        ))),
    }
}

/// The source of a key, or of the nearest table above it that was set as a whole.
fn source_of(sources: &BTreeMap<String, Source>, key: &str) -> Source {
    let mut prefix = key;
    loop {
        if let Some(source) = sources.get(prefix) {
            return source.clone();
        }
        match prefix.rsplit_once('.') {
            Some((above, _)) => prefix = above,
            None => return Source::Default,
        }
    }
}

fn explain<T: DeserializeOwned>(base: &Table, table: &Table, sources: &BTreeMap<String, Source>) -> Vec<Explained> {
    let mut lines: Vec<Explained> = Vec::new();
    let mut set = Vec::new();
    entry::leaves(table, &mut Vec::new(), &mut |path, value| {
        set.push((path.join("."), entry::print(value)))
    });
    for key in names::known_keys::<T>(base) {
        if !set
            .iter()
            .any(|(known, _)| known == &key || known.starts_with(&format!("{key}.")))
        {
            lines.push(Explained {
                source: source_of(sources, &key),
                key,
                value: None,
            });
        }
    }
    for (key, value) in set {
        lines.push(Explained {
            source: source_of(sources, &key),
            key,
            value: Some(value),
        });
    }
    lines.sort_by(|a, b| a.key.cmp(&b.key));
    lines
}

#[cfg(test)]
mod tests;
