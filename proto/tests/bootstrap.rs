//! The generated code is committed; this test regenerates it and fails on drift.

use std::{fs, path::Path};

#[path = "bootstrap/codegen.rs"]
mod codegen;

#[test]
fn generated_code_is_what_the_protos_say() {
    let fresh = tempfile::tempdir().expect("a temporary folder");
    codegen::generate(fresh.path()).expect("the protos compile");
    for name in codegen::OUTPUTS {
        let committed = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen").join(name)).unwrap_or_default();
        let generated = fs::read(fresh.path().join(name)).expect("generation wrote its outputs");
        assert!(
            committed == generated,
            "proto/src/gen/{name} does not match proto/kvasir/v1/*.proto: \
             run `cargo run -p kvasir-proto --example generate` and commit the result",
        );
    }
}
