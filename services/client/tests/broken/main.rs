//! What the client does with stores that break their word.

mod bulk;
mod script;
mod store;
mod support;
