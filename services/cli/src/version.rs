//! `kvasir version`: the release, and the versions of what it computes and writes.

use crate::output::print;

pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How the binary was compiled; figures from `dev` and `release` are told apart by it.
pub(crate) const PROFILE: &str = if cfg!(debug_assertions) { "dev" } else { "release" };

pub(crate) fn show() {
    print(format_args!("kvasir {VERSION} ({PROFILE})"));
    print(format_args!("layout  {}", kvasir_block::LayerBlockLayout::NAME));
    print("protocol  kvasir.v1");
}
