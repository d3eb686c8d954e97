//! Rewrites `proto/src/gen` from the `.proto` files: `cargo run -p kvasir-proto --example generate`.

use std::{error::Error, path::Path};

#[path = "../tests/bootstrap/codegen.rs"]
mod codegen;

fn main() -> Result<(), Box<dyn Error>> {
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen");
    codegen::generate(&out)?;
    for name in codegen::OUTPUTS {
        std::fs::metadata(out.join(name))?;
    }
    Ok(())
}
