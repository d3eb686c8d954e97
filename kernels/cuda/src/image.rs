//! Machine code of the kernel families: compiled by NVRTC, kept on disk.

use std::{
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{BuildError, Compiler, Family, Resources, Variant, source::hex};

const MAGIC: &[u8; 8] = b"KVCUBIN1";
const HEADER_BYTES: usize = 8 + 32;

/// Compiles kernel families for one architecture and keeps the results in a folder, so that a second start takes no time.
///
/// A file's name holds the family, the architecture, NVRTC's version and the hash of all sources and flags; its head holds
/// a checksum of the rest. A damaged or unreadable file is compiled again, and a folder that cannot be written costs only
/// the compilation.
#[derive(Debug)]
pub struct Kernels {
    compiler: Compiler,
    arch: String,
    folder: Option<PathBuf>,
    variant: Variant,
}

impl Kernels {
    /// Kernels for `arch` (`sm_90a`), kept in `folder` if one is given. Needs no GPU.
    pub fn new(compiler: Compiler, arch: &str, folder: Option<PathBuf>) -> Self {
        Self {
            compiler,
            arch: arch.to_owned(),
            folder,
            variant: Variant::Plain,
        }
    }

    /// The same kernels in another variant.
    #[must_use]
    pub fn variant(self, variant: Variant) -> Self {
        Self { variant, ..self }
    }

    /// Name of the architecture that a compute capability is compiled for: Hopper has instructions of its own under
    /// `sm_90a`, all others are compiled under their plain name.
    pub fn arch_of(major: i32, minor: i32) -> String {
        match (major, minor) {
            (9, 0) => "sm_90a".to_owned(),
            _ => format!("sm_{major}{minor}"),
        }
    }

    /// Architecture that is compiled for.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// Fills the cache with every family, and says what each kernel uses.
    ///
    /// # Errors
    /// If a source is rejected.
    pub fn build(&self) -> Result<Vec<(Family, Vec<Resources>)>, BuildError> {
        Family::ALL
            .iter()
            .map(|&family| {
                let (cubin, log) = self.compiler.compile(family, &self.arch, self.variant)?;
                self.keep(family, &cubin);
                Ok((family, Resources::parse(&log)))
            })
            .collect()
    }

    /// Machine code of a family: from the folder, or compiled now and kept there.
    ///
    /// # Errors
    /// If a source is rejected.
    pub fn cubin(&self, family: Family) -> Result<Vec<u8>, BuildError> {
        if let Some(cubin) = self.path(family).and_then(|path| read(&path)) {
            return Ok(cubin);
        }
        let (cubin, _) = self.compiler.compile(family, &self.arch, self.variant)?;
        self.keep(family, &cubin);
        Ok(cubin)
    }

    /// File of a family in the folder.
    pub fn path(&self, family: Family) -> Option<PathBuf> {
        let (major, minor) = self.compiler.version();
        let name = format!(
            "{}-{}{}-nvrtc{major}.{minor}-{}.cubin",
            family.name(),
            self.arch,
            self.variant
                .define()
                .map_or(String::new(), |name| format!("-{}", name.to_lowercase())),
            family.digest()
        );
        Some(self.folder.as_ref()?.join(name))
    }

    fn keep(&self, family: Family, cubin: &[u8]) {
        let Some(path) = self.path(family) else { return };
        if let Err(error) = write(&path, cubin) {
            tracing::warn!(path = %path.display(), %error, "kernel cache not written: the next start compiles again");
        }
    }
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let (head, cubin) = bytes.split_at_checked(HEADER_BYTES)?;
    if head.get(..8)? == MAGIC && head.get(8..)? == Sha256::digest(cubin).as_slice() {
        return Some(cubin.to_vec());
    }
    tracing::warn!(path = %path.display(), "damaged file in the kernel cache: compiling again");
    None
}

/// Written beside its place and renamed into it: another process sees the whole file or none.
fn write(path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let beside = path.with_extension(format!("{}-{}", std::process::id(), hex(&Sha256::digest(cubin)[..4])));
    let mut bytes = Vec::with_capacity(HEADER_BYTES + cubin.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&Sha256::digest(cubin));
    bytes.extend_from_slice(cubin);
    fs::write(&beside, &bytes)?;
    fs::rename(&beside, path).inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_file_is_read_back_and_a_damaged_one_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new/decode.cubin");
        assert_eq!(read(&path), None);
        write(&path, b"machine code").expect("written");
        assert_eq!(read(&path).as_deref(), Some(&b"machine code"[..]));

        let whole = fs::read(&path).expect("read");
        for damaged in [&whole[..whole.len() - 1], &whole[..20], &[0; 64][..], &[]] {
            fs::write(&path, damaged).expect("written");
            assert_eq!(read(&path), None, "{} bytes", damaged.len());
        }
        assert_eq!(
            fs::read_dir(folder.path().join("new")).expect("listed").count(),
            1,
            "nothing is left beside"
        );
    }

    #[test]
    fn architectures() {
        for ((major, minor), name) in [
            ((8, 0), "sm_80"),
            ((8, 9), "sm_89"),
            ((9, 0), "sm_90a"),
            ((12, 0), "sm_120"),
        ] {
            assert_eq!(Kernels::arch_of(major, minor), name);
        }
    }
}
