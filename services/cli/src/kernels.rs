//! `kvasir kernels build`: fills the cache of compiled kernels ahead of the first start.

use std::path::Path;

use anyhow::{Context, Result, bail};
use kvasir_cuda::{Compiler, Kernels};

use crate::{output::print, tree::Configuration};

/// Compiles every kernel for each architecture into `worker.gpu.kernels_dir`, and says what they use.
pub(crate) fn build(configuration: &Configuration, archs: &[String]) -> Result<()> {
    let gpu = &configuration.tree().worker.gpu;
    let given = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
    let Some(folder) = given(&gpu.kernels_dir) else {
        bail!("worker.gpu.kernels_dir is empty: name the folder that the kernels are to be kept in");
    };
    for arch in archs {
        let compiler = Compiler::open(given(&gpu.nvrtc_dir).as_deref()).context("worker.gpu.nvrtc_dir")?;
        let kernels = Kernels::new(compiler, arch, Some(folder.clone()));
        for (family, built) in kernels.build()? {
            let most = built.iter().map(|kernel| kernel.registers).max().unwrap_or(0);
            let spilled: u32 = built.iter().map(|kernel| kernel.spill_bytes).sum();
            print(format_args!(
                "{arch}  {:8}  {:2} kernels, at most {most} registers, {spilled} bytes spilled",
                family.name(),
                built.len()
            ));
        }
    }
    print(format_args!("kept in {}", folder.display()));
    Ok(())
}
