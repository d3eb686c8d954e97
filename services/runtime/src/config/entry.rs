//! One key and value of one layer, before it is known to be good.

use std::path::Path;

use serde::de::DeserializeOwned;
use toml::{Table, Value};
use toml_edit::{Document, Item, TableLike};

use super::{ENV_PREFIX, Problem, Source};

/// A key with the readings its value may have, the likeliest first.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) path: Vec<String>,
    pub(super) readings: Vec<Value>,
    pub(super) source: Source,
}

impl Entry {
    /// The first reading that the tree accepts at this path, or the refusal of the first.
    pub(super) fn choose<T: DeserializeOwned>(&self, base: &Table) -> Result<Value, String> {
        let mut refusal = None;
        for reading in &self.readings {
            let mut candidate = base.clone();
            put(&mut candidate, &self.path, reading.clone());
            match T::deserialize(Value::Table(candidate)) {
                Ok(_) => return Ok(reading.clone()),
                Err(error) => refusal.get_or_insert_with(|| error.message().to_owned()),
            };
        }
        Err(refusal.unwrap_or_else(|| "has no value".to_owned()))
    }
}

/// The entries of a TOML text, each with its line.
pub(super) fn from_toml(path: &Path, text: &str) -> Result<Vec<Entry>, Problem> {
    let document = Document::parse(text.to_owned()).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(text, span.start));
        Problem::new(
            format!("{}:{line}", path.display()),
            None,
            format!("is not TOML: {}", error.message().trim()),
        )
    })?;
    let mut entries = Vec::new();
    walk(document.as_table(), &mut Vec::new(), &mut |keys, span, value| {
        let line = span.map_or(1, |start| line_of(text, start));
        let source = Source::File(path.to_owned(), line);
        entries.push(Entry {
            path: keys.to_vec(),
            readings: vec![value],
            source,
        });
    });
    Ok(entries)
}

/// An entry from an environment variable, if its name says that it is one.
pub(super) fn from_variable(name: &str, value: &str) -> Option<Entry> {
    let path = name
        .strip_prefix(ENV_PREFIX)?
        .split("__")
        .map(str::to_lowercase)
        .collect();
    Some(Entry {
        path,
        readings: readings(value),
        source: Source::Env(name.to_owned()),
    })
}

/// An entry from the command line.
pub(super) fn from_flag(flag: String, key: &str, value: &str) -> Entry {
    let path = key.split('.').map(str::to_owned).collect();
    Entry {
        path,
        readings: readings(value),
        source: Source::Flag(flag),
    }
}

/// Text from outside TOML may be a TOML literal (`true`, `8`, `["a"]`) or plain text; the tree decides which fits.
fn readings(text: &str) -> Vec<Value> {
    let literal = format!("v = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("v"));
    let plain = Value::String(text.to_owned());
    match literal {
        // A quoted text is what its quotes enclose; the quotes are not meant.
        Some(literal @ Value::String(_)) => vec![literal],
        Some(literal) => vec![literal, plain],
        None => vec![plain],
    }
}

/// Sets `path` in `table`, making tables on the way and replacing what is not one.
pub(super) fn put(table: &mut Table, path: &[String], value: Value) {
    let Some((first, rest)) = path.split_first() else {
        return;
    };
    if rest.is_empty() {
        match (table.get_mut(first), value) {
            // An empty section header sets nothing, but its name must still be known.
            (Some(Value::Table(_)), Value::Table(given)) if given.is_empty() => {}
            (_, value) => {
                table.insert(first.clone(), value);
            }
        }
        return;
    }
    let slot = table.entry(first.clone()).or_insert_with(|| Value::Table(Table::new()));
    if !slot.is_table() {
        *slot = Value::Table(Table::new());
    }
    if let Value::Table(inner) = slot {
        put(inner, rest, value);
    }
}

/// Visits every value that is not a table, and every empty table.
pub(super) fn leaves<'a>(table: &'a Table, path: &mut Vec<String>, visit: &mut impl FnMut(&[String], &'a Value)) {
    for (key, value) in table {
        path.push(key.clone());
        match value {
            Value::Table(inner) if !inner.is_empty() => leaves(inner, path, visit),
            value => visit(path, value),
        }
        path.pop();
    }
}

/// A value as a person would write it.
pub(super) fn print(value: &Value) -> String {
    match value {
        // A share such as 0.99 kept as f32 would print its binary expansion as f64.
        Value::Float(x) if f64::from(*x as f32) == *x => format!("{:?}", *x as f32),
        value => value.to_string(),
    }
}

fn walk(table: &dyn TableLike, path: &mut Vec<String>, visit: &mut impl FnMut(&[String], Option<usize>, Value)) {
    for (name, item) in table.iter() {
        path.push(name.to_owned());
        let key_start = table.key(name).and_then(toml_edit::Key::span).map(|span| span.start);
        let start = key_start.or_else(|| item.span().map(|span| span.start));
        match item.as_table_like() {
            Some(inner) if !inner.is_empty() => walk(inner, path, visit),
            _ => visit(path, start, to_value(item)),
        }
        path.pop();
    }
}

fn to_value(item: &Item) -> Value {
    match item {
        Item::None => Value::Table(Table::new()),
        Item::Value(value) => from_edit(value),
        Item::Table(table) => table_of(table),
        Item::ArrayOfTables(tables) => Value::Array(tables.iter().map(|table| table_of(table)).collect()),
    }
}

fn table_of(table: &dyn TableLike) -> Value {
    Value::Table(
        table
            .iter()
            .map(|(key, item)| (key.to_owned(), to_value(item)))
            .collect(),
    )
}

fn from_edit(value: &toml_edit::Value) -> Value {
    match value {
        toml_edit::Value::String(text) => Value::String(text.value().clone()),
        toml_edit::Value::Integer(n) => Value::Integer(*n.value()),
        toml_edit::Value::Float(x) => Value::Float(*x.value()),
        toml_edit::Value::Boolean(b) => Value::Boolean(*b.value()),
        // Nothing in the tree is a date; kept as text, the tree refuses it where it stands.
        toml_edit::Value::Datetime(date) => Value::String(date.value().to_string()),
        toml_edit::Value::Array(array) => Value::Array(array.iter().map(from_edit).collect()),
        toml_edit::Value::InlineTable(table) => table_of(table),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()
        .iter()
        .take(offset)
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}
