//! Borders between parts that hold beyond the floors; ARCHITECTURE.md lists them under the floor table.

use crate::{Repository, Violation, floors, repository::Crate, source};

/// Transports and servers: storage and kernels know none.
const TRANSPORTS: [&str; 10] = [
    "tonic",
    "tonic-prost",
    "tonic-health",
    "tonic-reflection",
    "prost",
    "prost-types",
    "axum",
    "hyper",
    "reqwest",
    "h2",
];

/// What the router must not see: it chooses workers and never touches bytes.
const BYTES: [&str; 4] = ["kvasir-tier", "kvasir-index", "kvasir-cache", "kvasir-cuda"];

/// The floor of the services; below it code takes values, and does not look around for them.
const SERVICES_FLOOR: u32 = 4;

/// The frame of every process stands on floor 0 and exists to read the environment and install recorders.
const FRAME: &str = "kvasir-runtime";

/// Process-wide things that code below the services must not reach for.
const AMBIENT: [(&str, &str); 6] = [
    (
        "env::var",
        "reads an environment variable: take a value from the caller",
    ),
    (
        "env::var_os",
        "reads an environment variable: take a value from the caller",
    ),
    ("env::vars", "reads environment variables: take a value from the caller"),
    (
        "set_global_recorder",
        "installs a global metrics recorder: only a process does",
    ),
    (
        "set_global_default",
        "installs a global subscriber: only a process does",
    ),
    (
        "install_recorder",
        "installs a global metrics recorder: only a process does",
    ),
];

/// Services whose domain code must not speak in generated messages.
const SPEAKERS: [&str; 3] = ["services/store/", "services/worker/", "services/router/"];

/// Finds forbidden dependencies and imports.
pub fn check(repository: &Repository) -> Vec<Violation> {
    let (crates, mut found) = repository.crates();
    for member in &crates {
        found.extend(forbidden_dependencies(member));
    }
    found.extend(ambient(repository, &crates));
    found.extend(generated_types(repository));
    found
}

fn forbidden_dependencies(member: &Crate) -> Vec<Violation> {
    let top = member.folder.split('/').next().unwrap_or("");
    let refuse = |used: &String| -> Option<&'static str> {
        let used = used.as_str();
        match top {
            "storage" | "kernels" if TRANSPORTS.contains(&used) => Some("storage and kernels know no transport"),
            "storage" | "kernels" if used == FRAME => Some("storage and kernels know nothing of services"),
            "kernels" if used == "kvasir-block" => Some("kernels know shapes and slices, not blocks"),
            _ if used == "cudarc" && member.name != "kvasir-cuda" => Some("only kvasir-cuda speaks to the driver"),
            _ if member.name == "kvasir-router" && BYTES.contains(&used) => Some("the router sees no bytes"),
            _ => None,
        }
    };
    let manifest = format!("{}/Cargo.toml", member.folder);
    let of = |used: &String| {
        refuse(used).map(|why| Violation::new(&manifest, 0, format!("{} uses {used}: {why}", member.name)))
    };
    member.dependencies.iter().filter_map(of).collect()
}

fn ambient(repository: &Repository, crates: &[Crate]) -> Vec<Violation> {
    // Without a table the rule on floors has already failed.
    let floors = floors::floors(repository).unwrap_or_default();
    let below =
        |member: &&Crate| member.name != FRAME && floors.get(&member.name).is_some_and(|floor| *floor < SERVICES_FLOOR);
    let mut found = Vec::new();
    for member in crates.iter().filter(below) {
        if member.dependencies.iter().any(|used| used == "anyhow") {
            let what = format!(
                "{} uses anyhow: below the services errors are enums that a caller can match",
                member.name
            );
            found.push(Violation::new(&format!("{}/Cargo.toml", member.folder), 0, what));
        }
        for (path, text) in repository.with_extension(&["rs"]).filter(|(path, _)| member.owns(path)) {
            if source::is_test_file(path) || path.ends_with("/build.rs") {
                continue;
            }
            let code = source::code_without_tests(text);
            for (word, why) in AMBIENT {
                found.extend(source::lines_with_word(&code, word).map(|(line, _)| Violation::new(path, line, why)));
            }
        }
    }
    found
}

fn generated_types(repository: &Repository) -> Vec<Violation> {
    let mut found = Vec::new();
    for (path, text) in repository.with_extension(&["rs"]) {
        let speaks = SPEAKERS.iter().any(|folder| path.starts_with(&format!("{folder}src/")));
        let border = path.ends_with("/grpc.rs") || path.contains("/grpc/") || source::is_test_file(path);
        if !speaks || border {
            continue;
        }
        let code = source::code_without_tests(text);
        for (i, line) in code.lines().enumerate() {
            if line.contains("kvasir_proto::v1") || line.contains("kvasir_proto::pb") {
                let what = "generated messages stay in the service's grpc.rs or grpc/: convert to a domain type there";
                found.push(Violation::new(path, i + 1, what));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "## Floors\n| floor | crates |\n|---|---|\n| 0 | `kvasir-tier` `kvasir-simd` `kvasir-runtime` |\n| 4 | `kvasir-router` |\n";

    fn check_one(folder: &str, dependencies: &str, file: &str, text: &str) -> usize {
        let name = folder.rsplit('/').next().expect("a name");
        let manifest = format!("[package]\nname = \"kvasir-{name}\"\n{dependencies}\n");
        let (manifest_path, path) = (format!("{folder}/Cargo.toml"), format!("{folder}/{file}"));
        check(&Repository::of(&[
            (floors::PAGE, TABLE),
            (&manifest_path, &manifest),
            (&path, text),
        ]))
        .len()
    }

    #[test]
    fn forbidden_dependencies_are_found() {
        let table = [
            ("storage/tier", "[dependencies]\ntonic = \"1\"", 1),
            ("storage/tier", "[dependencies]\nkvasir-runtime = \"1\"", 1),
            ("storage/tier", "[dependencies]\nanyhow = \"1\"", 1),
            ("storage/tier", "[dev-dependencies]\nanyhow = \"1\"", 0),
            ("storage/tier", "[dependencies]\nbytes = \"1\"", 0),
            ("kernels/simd", "[dependencies]\nprost = \"1\"", 1),
            ("kernels/simd", "[dependencies]\nkvasir-block = \"1\"", 1),
            ("kernels/simd", "[dependencies]\ncudarc = \"1\"", 1),
            ("kernels/cuda", "[dependencies]\ncudarc = \"1\"", 0),
            ("services/router", "[dependencies]\nkvasir-cache = \"1\"", 1),
            ("services/router", "[dependencies]\ntonic = \"1\"\nanyhow = \"1\"", 0),
            ("services/runtime", "[dependencies]\ntonic = \"1\"", 0),
        ];
        for (folder, dependencies, violations) in table {
            assert_eq!(
                check_one(folder, dependencies, "src/lib.rs", ""),
                violations,
                "{folder} with {dependencies}"
            );
        }
    }

    #[test]
    fn reaching_for_the_process_is_found() {
        let table = [
            ("storage/tier", "src/a.rs", "fn f() { std::env::var(\"X\"); }", 1),
            (
                "storage/tier",
                "src/a.rs",
                "fn f() { env::vars(); metrics::set_global_recorder(r); }",
                2,
            ),
            (
                "storage/tier",
                "src/a.rs",
                "// env::var\n#[cfg(test)]\nmod tests { fn f() { std::env::var(\"X\"); } }",
                0,
            ),
            ("storage/tier", "tests/a.rs", "fn f() { std::env::var(\"X\"); }", 0),
            ("services/runtime", "src/a.rs", "fn f() { std::env::var(\"X\"); }", 0),
            ("services/router", "src/a.rs", "fn f() { std::env::var(\"X\"); }", 0),
            (
                "services/router",
                "src/policy.rs",
                "use kvasir_proto::v1::GenerateRequest;",
                1,
            ),
            (
                "services/router",
                "src/grpc.rs",
                "use kvasir_proto::v1::GenerateRequest;",
                0,
            ),
            (
                "services/router",
                "src/grpc/call.rs",
                "use kvasir_proto::v1::GenerateRequest;",
                0,
            ),
        ];
        for (folder, file, text, violations) in table {
            assert_eq!(check_one(folder, "", file, text), violations, "{folder}/{file}: {text}");
        }
    }
}
