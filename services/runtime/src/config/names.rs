//! Which names the tree has, and which one a mistyped name was meant to be.
//!
//! serde knows the names but has no way to list them; it does name them when it meets one that does not exist. So the
//! tree is asked about a key that cannot exist, and its answer is read.

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{
    Problem,
    entry::{self, Entry},
};

/// No configuration key looks like this.
const PROBE: &str = "?";

/// How alike two names must be (0 to 1) before one is suggested for the other.
const ALIKE_MIN: f64 = 0.6;

/// Every dotted key of the tree, also of optional ones that have no value.
pub(super) fn known_keys<T: DeserializeOwned>(base: &Table) -> Vec<String> {
    let mut tables = vec![Vec::new()];
    collect_tables(base, &mut Vec::new(), &mut tables);
    let mut keys = Vec::new();
    for table in &tables {
        for name in names_at::<T>(base, table) {
            let path = [table.clone(), vec![name]].concat();
            if !tables.contains(&path) {
                keys.push(path.join("."));
            }
        }
    }
    keys
}

/// Turns serde's refusal of one entry into a sentence for the person who wrote it.
pub(super) fn explain_refusal<T: DeserializeOwned>(base: &Table, entry: &Entry, message: &str) -> Problem {
    let key = entry.path.join(".");
    let place = entry.source.to_string();
    if let Some(unknown) = quoted_after(message, "unknown field ") {
        let depth = entry.path.iter().position(|part| part == unknown).unwrap_or(0);
        let table = &entry.path[..depth];
        let siblings = names_at::<T>(base, table);
        let why = match suggest::<T>(base, table, unknown, &siblings) {
            Some(name) => format!("there is no such key; did you mean `{name}`?"),
            None if siblings.is_empty() => "there is no such key".to_owned(),
            None => format!("there is no such key; the keys here are {}", siblings.join(", ")),
        };
        return Problem::new(place, Some(key), why);
    }
    if let Some(unknown) = quoted_after(message, "unknown variant ") {
        let valid = names_in(message);
        let hint = nearest(unknown, &valid)
            .map(|name| format!("; did you mean {name:?}?"))
            .unwrap_or_default();
        let why = format!("{unknown:?} is not one of {}{hint}", valid.join(", "));
        return Problem::new(place, Some(key), why);
    }
    Problem::new(place, Some(key), message.trim().to_owned())
}

/// A name in the same table that is spelt alike, or the same name in another table.
fn suggest<T: DeserializeOwned>(base: &Table, table: &[String], unknown: &str, siblings: &[String]) -> Option<String> {
    if let Some(name) = nearest(unknown, siblings) {
        return Some([table, &[name.to_owned()]].concat().join("."));
    }
    let elsewhere = known_keys::<T>(base);
    elsewhere
        .into_iter()
        .find(|key| key.rsplit('.').next() == Some(unknown))
}

fn nearest<'a>(name: &str, candidates: &'a [String]) -> Option<&'a str> {
    let alike = |candidate: &String| strsim::normalized_damerau_levenshtein(name, candidate);
    let best = candidates.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    (alike(best) >= ALIKE_MIN).then_some(best.as_str())
}

fn names_at<T: DeserializeOwned>(base: &Table, table: &[String]) -> Vec<String> {
    let mut candidate = base.clone();
    entry::put(
        &mut candidate,
        &[table, &[PROBE.to_owned()]].concat(),
        Value::Boolean(true),
    );
    match T::deserialize(Value::Table(candidate)) {
        Ok(_) => Vec::new(),
        Err(error) if quoted_after(error.message(), "unknown field ") == Some(PROBE) => names_in(error.message()),
        Err(_) => Vec::new(),
    }
}

fn collect_tables(table: &Table, path: &mut Vec<String>, found: &mut Vec<Vec<String>>) {
    for (key, value) in table {
        if let Value::Table(inner) = value {
            path.push(key.clone());
            found.push(path.clone());
            collect_tables(inner, path, found);
            path.pop();
        }
    }
}

/// What stands between the backticks after `lead`.
fn quoted_after<'a>(message: &'a str, lead: &str) -> Option<&'a str> {
    message.split_once(lead)?.1.strip_prefix('`')?.split('`').next()
}

/// The names in backticks after "expected".
fn names_in(message: &str) -> Vec<String> {
    let expected = message.split_once("expected").map_or("", |(_, after)| after);
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}
