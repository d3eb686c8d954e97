//! Where files lie and how long they are.

use crate::{Repository, Violation, generated};

/// The only names at the top. A new one is a decision about the house: change this list and ARCHITECTURE.md together.
const TOP_LEVEL: [&str; 20] = [
    ".cargo",
    ".ci",
    ".config",
    ".gitignore",
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "Makefile",
    "README.md",
    "clippy.toml",
    "deny.toml",
    "deploy",
    "kernels",
    "proto",
    "rust-toolchain.toml",
    "rustfmt.toml",
    "services",
    "storage",
    "tests",
];

/// Beyond this a file has more than one subject.
const LINES_MAX: usize = 800;
/// A crate's root says what it is; the rest is in modules.
const ROOT_LINES_MAX: usize = 80;

/// Finds files and folders at the top that have no business there.
pub fn check_top_level(repository: &Repository) -> Vec<Violation> {
    let mut names: Vec<&str> = repository
        .files()
        .map(|(path, _)| path.split('/').next().unwrap_or(path))
        .collect();
    names.dedup();
    let stray = names.into_iter().filter(|name| !TOP_LEVEL.contains(name));
    stray
        .map(|name| Violation::new(name, 0, "does not belong at the top level: move it where it is used"))
        .collect()
}

/// Finds files that are too long, `mod.rs` files, and crates without a README or with a crowded root.
pub fn check_files(repository: &Repository) -> Vec<Violation> {
    let mut found = Vec::new();
    for (path, text) in repository.with_extension(&["rs", "py", "sh", "proto", "toml", "yaml", "yml", "md"]) {
        let lines = text.lines().count();
        if lines > LINES_MAX && !generated::is_generated(text) {
            found.push(Violation::new(
                path,
                0,
                format!("has {lines} lines, more than {LINES_MAX}: split it by subject"),
            ));
        }
        if path.ends_with("/src/lib.rs") && lines > ROOT_LINES_MAX {
            let what =
                format!("has {lines} lines, more than {ROOT_LINES_MAX} for a crate's root: move code into modules");
            found.push(Violation::new(path, 0, what));
        }
        if path.ends_with("/mod.rs") {
            found.push(Violation::new(
                path,
                0,
                "modules are name.rs beside name/, not name/mod.rs",
            ));
        }
    }
    for member in repository.crates().0 {
        let readme = format!("{}/README.md", member.folder);
        if !repository.exists(&readme) {
            found.push(Violation::new(
                &readme,
                0,
                "missing: say in a few lines what the crate is and where to start reading",
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stray_folder_or_file_is_found() {
        let planted = Repository::of(&[
            ("README.md", ""),
            ("scripts/x.sh", ""),
            ("storage/a/x.rs", ""),
            ("notes.txt", ""),
        ]);
        let found: Vec<String> = check_top_level(&planted).into_iter().map(|v| v.path).collect();
        assert_eq!(found, ["notes.txt", "scripts"]);
    }

    #[test]
    fn long_files_and_wrong_modules_are_found() {
        let long = "x\n".repeat(LINES_MAX + 1);
        let generated = format!("// @generated\n{long}");
        let root = "x\n".repeat(ROOT_LINES_MAX + 1);
        let table: [(&str, &str, bool); 7] = [
            ("a/src/b.rs", &long, true),
            ("a/src/b.rs", &"x\n".repeat(LINES_MAX), false),
            ("a/src/generated.rs", &generated, false),
            ("a/src/lib.rs", &root, true),
            ("a/src/other.rs", &root, false),
            ("a/src/b/mod.rs", "", true),
            ("a/data.bin", &long, false),
        ];
        for (path, text, wrong) in table {
            assert_eq!(
                !check_files(&Repository::of(&[(path, text)])).is_empty(),
                wrong,
                "{path}, {} lines",
                text.lines().count()
            );
        }
    }

    #[test]
    fn a_crate_without_readme_is_found() {
        let manifest = ("a/b/Cargo.toml", "[package]\nname = \"kvasir-b\"\n");
        assert_eq!(check_files(&Repository::of(&[manifest]))[0].path, "a/b/README.md");
        assert!(check_files(&Repository::of(&[manifest, ("a/b/README.md", "b")])).is_empty());
    }
}
