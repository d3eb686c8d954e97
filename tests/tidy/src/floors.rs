//! Crates use lower floors only, as the table under `## Floors` in ARCHITECTURE.md says.

use std::collections::BTreeMap;

use crate::{Repository, Violation, repository::Crate};

/// The page with the table.
pub const PAGE: &str = "ARCHITECTURE.md";

/// Finds imports that climb, crates without a floor, and floors of crates that are gone.
pub fn check(repository: &Repository) -> Vec<Violation> {
    let (crates, mut found) = repository.crates();
    let floors = match floors(repository) {
        Ok(floors) => floors,
        Err(violation) => return vec![violation],
    };
    for member in &crates {
        let manifest = format!("{}/Cargo.toml", member.folder);
        let Some(floor) = floors.get(member.name.as_str()) else {
            found.push(Violation::new(
                &manifest,
                0,
                format!("{} has no floor: add it to the table in {PAGE}", member.name),
            ));
            continue;
        };
        // A test may compare a crate with its neighbour (a kernel with its reference), so dev-dependencies may stay on the
        // floor.
        let built_with = member.dependencies.iter().map(|used| (used, *floor));
        let tested_with = member.dev_dependencies.iter().map(|used| (used, *floor + 1));
        for (used, limit) in built_with.chain(tested_with) {
            let Some(used_floor) = floors.get(used.as_str()).filter(|used_floor| **used_floor >= limit) else {
                continue;
            };
            let what = format!(
                "{} (floor {floor}) uses {used} (floor {used_floor}): a crate uses lower floors only ({PAGE}); \
                 move the shared part down, or the crate up",
                member.name
            );
            found.push(Violation::new(&manifest, 0, what));
        }
    }
    for name in floors
        .keys()
        .filter(|name| !crates.iter().any(|member| &member.name == *name))
    {
        found.push(Violation::new(
            PAGE,
            0,
            format!("the floor table names {name}, which is no crate of the workspace"),
        ));
    }
    found.extend(check_folders(&crates));
    found
}

/// The table: package name → floor.
pub fn floors(repository: &Repository) -> Result<BTreeMap<String, u32>, Violation> {
    let wrong = |line, what: &str| Violation::new(PAGE, line, what);
    let page = repository
        .text(PAGE)
        .ok_or_else(|| wrong(0, "missing: it holds the floor table"))?;
    let mut lines = page
        .lines()
        .enumerate()
        .skip_while(|(_, line)| line.trim() != "## Floors");
    let heading = lines.next().ok_or_else(|| wrong(0, "has no heading `## Floors`"))?.0 + 1;
    let rows = lines
        .map(|(i, line)| (i + 1, line.trim()))
        .take_while(|(_, line)| !line.starts_with("## "));
    let rows: Vec<_> = rows.filter(|(_, line)| line.starts_with('|')).skip(2).collect();
    if rows.is_empty() {
        return Err(wrong(
            heading,
            "the floor table is missing: columns `| floor | crates |`",
        ));
    }
    let mut floors = BTreeMap::new();
    for (line, row) in rows {
        let mut cells = row.trim_matches('|').splitn(2, '|');
        let floor = cells.next().and_then(|cell| cell.trim().parse().ok());
        let floor: u32 = floor.ok_or_else(|| wrong(line, "the first column of the floor table is a number"))?;
        for name in cells.next().unwrap_or("").split('`').skip(1).step_by(2) {
            if floors.insert(name.to_owned(), floor).is_some() {
                return Err(wrong(line, &format!("{name} stands in the floor table twice")));
            }
        }
    }
    Ok(floors)
}

/// Folder `storage/tier` is crate `kvasir-tier`, always; `services/cli` is the binary `kvasir`.
fn check_folders(crates: &[Crate]) -> Vec<Violation> {
    let expected = |folder: &str| match folder {
        "services/cli" => "kvasir".to_owned(),
        folder => format!("kvasir-{}", folder.rsplit('/').next().unwrap_or(folder)),
    };
    let misnamed = crates.iter().filter(|member| member.name != expected(&member.folder));
    let violation = |member: &Crate| {
        let what = format!(
            "package {} lies in {}: it must be called {}",
            member.name,
            member.folder,
            expected(&member.folder)
        );
        Violation::new(&format!("{}/Cargo.toml", member.folder), 0, what)
    };
    misnamed.map(violation).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "# A\n## Floors\ntext\n\n| floor | crates |\n|---|---|\n| 0 | `kvasir-block` `kvasir-simd` |\n\
                         | 2 | `kvasir-tier` |\n| 5 | `kvasir-testkit` `kvasir-integration` |\n\n## Next\n| 9 | `kvasir-x` |\n";

    fn check_one(folder: &str, dependencies: &str) -> Vec<String> {
        let manifest = |folder: &str, dependencies: &str| {
            let name = folder.rsplit('/').next().expect("a name");
            (
                format!("{folder}/Cargo.toml"),
                format!("[package]\nname = \"kvasir-{name}\"\n{dependencies}\n"),
            )
        };
        let folders = [
            "storage/block",
            "kernels/simd",
            "storage/tier",
            "tests/testkit",
            "tests/integration",
        ];
        let manifests: Vec<_> = folders
            .iter()
            .map(|f| manifest(f, if *f == folder { dependencies } else { "" }))
            .collect();
        let mut files: Vec<(&str, &str)> = manifests
            .iter()
            .map(|(path, text)| (path.as_str(), text.as_str()))
            .collect();
        files.push((PAGE, TABLE));
        check(&Repository::of(&files))
            .into_iter()
            .map(|v| v.to_string())
            .collect()
    }

    #[test]
    fn imports_that_climb_are_found() {
        let table = [
            ("storage/tier", "[dependencies]\nkvasir-block.workspace = true", 0),
            ("storage/tier", "[dependencies]\nserde = \"1\"", 0),
            ("storage/block", "[dependencies]\nkvasir-tier.workspace = true", 1),
            ("storage/block", "[dev-dependencies]\nkvasir-tier.workspace = true", 1),
            ("storage/block", "[build-dependencies]\nkvasir-tier.workspace = true", 1),
            (
                "storage/block",
                "[target.'cfg(unix)'.dependencies]\nkvasir-tier.workspace = true",
                1,
            ),
            (
                "storage/block",
                "[dependencies]\nb = { package = \"kvasir-tier\", path = \"../tier\" }",
                1,
            ),
            ("storage/block", "[dependencies]\nkvasir-simd.workspace = true", 1),
            (
                "tests/integration",
                "[dev-dependencies]\nkvasir-testkit.workspace = true",
                0,
            ),
            (
                "tests/integration",
                "[dependencies]\nkvasir-testkit.workspace = true",
                1,
            ),
            ("kernels/simd", "[dev-dependencies]\nkvasir-block.workspace = true", 0),
        ];
        for (folder, dependencies, violations) in table {
            let found = check_one(folder, dependencies);
            assert_eq!(found.len(), violations, "{folder} with {dependencies}: {found:?}");
        }
        let found = check_one("storage/block", "[dependencies]\nkvasir-tier.workspace = true");
        assert!(
            found[0].contains("kvasir-block (floor 0) uses kvasir-tier (floor 2)"),
            "{found:?}"
        );
    }

    #[test]
    fn the_table_and_the_workspace_must_agree() {
        let other = ("storage/other/Cargo.toml", "[package]\nname = \"kvasir-other\"\n");
        let found = check(&Repository::of(&[
            (
                PAGE,
                "## Floors\n| floor | crates |\n|---|---|\n| 0 | `kvasir-gone` |\n",
            ),
            other,
        ]));
        assert_eq!(found.len(), 2, "{found:?}");
        let misnamed = ("storage/other/Cargo.toml", "[package]\nname = \"kvasir-gone\"\n");
        let found = check(&Repository::of(&[
            (
                PAGE,
                "## Floors\n| floor | crates |\n|---|---|\n| 0 | `kvasir-gone` |\n",
            ),
            misnamed,
        ]));
        assert!(found[0].what.contains("must be called kvasir-other"), "{found:?}");
    }

    #[test]
    fn a_broken_table_is_named() {
        for page in [
            "# A\n",
            "## Floors\nnothing\n",
            "## Floors\n| f | c |\n|---|---|\n| low | `a` |\n",
            "## Floors\n| f | c |\n|---|---|\n| 0 | `a` `a` |\n",
        ] {
            assert_eq!(check(&Repository::of(&[(PAGE, page)])).len(), 1, "{page}");
        }
    }
}
