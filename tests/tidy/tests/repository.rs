//! Every rule, on this repository. (That a rule catches what it should is shown beside the rule, with planted violations.)

use std::path::Path;

use kvasir_tidy::{RULES, Repository};

#[test]
fn the_repository_keeps_its_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let repository = Repository::read(&root).expect("the repository can be read");
    let (crates, _) = repository.crates();
    assert!(
        crates.len() > 10,
        "only {} crates were found: is {} the repository?",
        crates.len(),
        root.display()
    );
    let mut report = String::new();
    for (name, rule) in RULES {
        for violation in rule(&repository) {
            report.push_str(&format!("  [{name}] {violation}\n"));
        }
    }
    assert!(report.is_empty(), "the repository breaks its own rules:\n{report}");
}
