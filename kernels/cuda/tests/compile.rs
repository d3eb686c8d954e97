//! Every kernel compiles for every architecture, without a GPU, and none spills or keeps a stack.

use std::path::{Path, PathBuf};

use kvasir_cuda::{BuildError, Compiler, Family, Kernels, Variant};

/// Where `deploy/bootstrap.sh nvrtc` put the compiler.
fn nvrtc() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(
        || std::env::home_dir().expect("a home folder").join(".cache"),
        PathBuf::from,
    );
    let lib = cache.join("kvasir/nvrtc/lib");
    let python = std::fs::read_dir(&lib)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .map(|python| python.join("site-packages/nvidia/cu13/lib"))
        .find(|folder| folder.is_dir());
    python.unwrap_or_else(|| panic!("NVRTC is not in {}: run `deploy/bootstrap.sh nvrtc`", lib.display()))
}

fn compiler() -> Compiler {
    Compiler::open(Some(&nvrtc())).expect("NVRTC opens")
}

#[test]
fn every_kernel_fits_its_registers() {
    for arch in ["sm_90a", "sm_80", "sm_89", "sm_120"] {
        let built = Kernels::new(compiler(), arch, None).build().expect("compiles");
        assert_eq!(built.len(), Family::ALL.len());
        for (family, kernels) in built {
            assert!(!kernels.is_empty(), "{} has no kernel for {arch}", family.name());
            for kernel in kernels {
                assert!(kernel.registers > 0, "no report on {kernel:?}");
                assert_eq!((kernel.spill_bytes, kernel.stack_bytes), (0, 0), "{arch}: {kernel:?}");
            }
        }
    }
}

#[test]
fn compiled_kernels_are_kept_and_found_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let kernels = || Kernels::new(compiler(), "sm_90a", Some(folder.path().to_owned()));
    let first = kernels().cubin(Family::Merge).expect("compiles");
    assert_eq!(&first[..4], b"\x7fELF");
    let path = kernels().path(Family::Merge).expect("a path");
    let written = std::fs::metadata(&path).and_then(|data| data.modified()).expect("kept");
    assert_eq!(kernels().cubin(Family::Merge).expect("found"), first);
    std::fs::write(&path, b"damaged").expect("written");
    assert_eq!(kernels().cubin(Family::Merge).expect("compiles again"), first);
    assert!(
        std::fs::metadata(&path)
            .and_then(|data| data.modified())
            .expect("kept again")
            > written
    );
}

#[test]
fn what_is_wrong_is_said() {
    let nowhere = Compiler::open(Some(Path::new("/nonexistent")));
    assert!(matches!(&nowhere, Err(BuildError::NoCompiler { tried }) if tried.contains("/nonexistent")));
    let unknown = compiler().compile(Family::Merge, "sm_1", Variant::Plain).map(|_| ());
    assert!(matches!(&unknown, Err(BuildError::Rejected { arch, log, .. }) if arch == "sm_1" && !log.is_empty()));
}
