//! Builds for the fault suites only: the environment says which bug this process has, and at which point it stops.

use anyhow::{Context, Result};
use kvasir_block::planted::{Bug, abort_at, plant};

/// Name of a bug, as [`Bug::name`] has it.
const BUG: &str = "KVASIR_PLANTED_BUG";
/// `<point>:<n>`: the process aborts when it reaches the point for the n-th time.
const ABORT: &str = "KVASIR_ABORT_AT";

/// Does what the environment asks for, for as long as the process lives.
pub(crate) fn choose() -> Result<()> {
    let set = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    if let Some(name) = set(BUG) {
        let bug = Bug::named(&name).with_context(|| format!("{BUG}={name} is no bug that can be planted"))?;
        std::mem::forget(plant(bug));
    }
    if let Some(value) = set(ABORT) {
        let parts = value
            .rsplit_once(':')
            .and_then(|(point, nth)| Some((point, nth.parse().ok()?)));
        let (point, nth) = parts.with_context(|| format!("{ABORT}={value} is not <point>:<n>"))?;
        std::mem::forget(abort_at(point.to_owned(), nth));
    }
    Ok(())
}
