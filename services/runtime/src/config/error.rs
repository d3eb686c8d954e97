//! What is wrong with a configuration, each mistake with its place.

use std::fmt;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// File and line, variable or flag.
    pub place: String,
    /// The dotted key, where there is one.
    pub key: Option<String>,
    /// What is wrong and what to do.
    pub why: String,
}

/// All mistakes of a configuration; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    problems: Vec<Problem>,
}

impl Problem {
    pub(super) fn new(place: String, key: Option<String>, why: String) -> Self {
        Self { place, key, why }
    }
}

impl ConfigError {
    pub(super) fn new(problems: Vec<Problem>) -> Self {
        debug_assert!(!problems.is_empty());
        Self { problems }
    }

    /// The tree itself is at fault, not what the user wrote.
    pub(super) fn bug(why: &str) -> Self {
        let why = format!("{why} (this is a mistake in Kvasir, please report it)");
        Self::new(vec![Problem::new("built-in defaults".to_owned(), None, why)])
    }

    /// Every mistake found, in the order of the layers.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Some(key) => write!(f, "{}: {key}: {}", self.place, self.why),
            None => write!(f, "{}: {}", self.place, self.why),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
