//! The rules of the house that no compiler checks, each a pure function from a [`Repository`] to [`Violation`]s.
//!
//! It knows texts and manifests, nothing of what the code does. Meet first [`Repository`], then [`RULES`].
//!
//! ```
//! use kvasir_tidy::{Repository, marks};
//!
//! let planted = Repository::of(&[("a/src/lib.rs", "fn f() {\n    to\u{64}o!()\n}\n")]);
//! let found = marks::check(&planted);
//! assert_eq!(found[0].to_string(), "a/src/lib.rs:2: unfinished work: finish it, or open an issue and delete the mark");
//! ```
#![forbid(unsafe_code)]

pub mod borders;
pub mod floors;
pub mod generated;
pub mod links;
pub mod marks;
pub mod repository;
pub mod shape;
pub mod source;
pub mod unsafety;

pub use crate::repository::{Repository, Violation};

/// A rule: everything it finds wrong.
pub type Rule = fn(&Repository) -> Vec<Violation>;

/// Every rule with the name under which its failures are shown.
pub const RULES: [(&str, Rule); 8] = [
    ("floors", floors::check),
    ("borders", borders::check),
    ("unsafe", unsafety::check),
    ("top level", shape::check_top_level),
    ("file shape", shape::check_files),
    ("generated code", generated::check),
    ("links", links::check),
    ("marks", marks::check),
];
