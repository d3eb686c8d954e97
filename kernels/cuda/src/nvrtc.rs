//! NVRTC, CUDA's run-time compiler, opened from wherever it was installed.
//!
//! A binding of our own to eight functions, because the library is often outside the loader's path (a Python wheel keeps
//! it deep inside `site-packages`) and because it looks for its own second library by name only: both are opened by path,
//! the second first.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::{Path, PathBuf},
};

use libloading::{Library, Symbol};

use crate::{BuildError, Family, Variant, source::HEADERS};

/// Compiler flags besides the architecture. They are part of a compiled family's name in the cache. Line numbers cost no
/// speed, and tools that look at kernels name the line then.
pub(crate) const FLAGS: &[&str] = &["--std=c++17", "--ptxas-options=-v", "--generate-line-info"];

const NAMES: &[&str] = &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
const FOLDERS: &[&str] = &["/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib"];

type Program = *mut c_void;

/// An opened NVRTC.
#[derive(Debug)]
pub struct Compiler {
    shared: Library,
    /// Keeps NVRTC's second library loaded, so that NVRTC finds it by name.
    _builtins: Option<Library>,
    version: (i32, i32),
}

impl Compiler {
    /// Opens NVRTC: in `folder` if one is given, else by the system's loader and in CUDA's usual folders.
    ///
    /// # Errors
    /// If the library is not found, or lacks a function.
    pub fn open(folder: Option<&Path>) -> Result<Self, BuildError> {
        let folders: Vec<&Path> = match folder {
            Some(folder) => vec![folder],
            None => FOLDERS.iter().map(Path::new).collect(),
        };
        if folder.is_none()
            && let Some(library) = NAMES.iter().find_map(|name| load(Path::new(name)))
        {
            return Self::with(library, None);
        }
        for folder in &folders {
            if let Some(library) = NAMES
                .iter()
                .find_map(|name| Some(folder.join(name)).filter(|path| path.exists()))
            {
                let builtins = builtins(folder).and_then(|path| load(&path));
                if let Some(library) = load(&library) {
                    return Self::with(library, builtins);
                }
            }
        }
        let places: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
        Err(BuildError::NoCompiler {
            tried: format!("{} in {}", NAMES.join(", "), places.join(", ")),
        })
    }

    fn with(shared: Library, builtins: Option<Library>) -> Result<Self, BuildError> {
        let mut compiler = Self {
            shared,
            _builtins: builtins,
            version: (0, 0),
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the signature is nvrtc.h's; both pointers are to live integers.
        let code = unsafe {
            compiler.function::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(c"nvrtcVersion")?(
                &raw mut major,
                &raw mut minor,
            )
        };
        if code != 0 {
            return Err(BuildError::UnusableCompiler(
                "libnvrtc".into(),
                format!("nvrtcVersion answered {code}"),
            ));
        }
        compiler.version = (major, minor);
        Ok(compiler)
    }

    /// Version of NVRTC, `(13, 0)` for CUDA 13.0.
    pub const fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles a family for an architecture (`sm_90a`): machine code, and the compiler's report on its resources.
    ///
    /// # Errors
    /// If the source is rejected; the error holds the compiler's own words.
    pub fn compile(&self, family: Family, arch: &str, variant: Variant) -> Result<(Vec<u8>, String), BuildError> {
        let rejected = |log: String| BuildError::Rejected {
            family: family.name(),
            arch: arch.to_owned(),
            log,
        };
        let text = |text: &str| CString::new(text).map_err(|_| rejected("a source holds a zero byte".into()));
        let source = text(family.source())?;
        let name = text(&format!("{}.cu", family.name()))?;
        let names = HEADERS
            .iter()
            .map(|(name, _)| text(name))
            .collect::<Result<Vec<_>, _>>()?;
        let headers = HEADERS
            .iter()
            .map(|(_, source)| text(source))
            .collect::<Result<Vec<_>, _>>()?;
        let flags = std::iter::once(format!("--gpu-architecture={arch}"))
            .chain(FLAGS.iter().map(|&flag| flag.to_owned()))
            .chain(variant.define().map(|name| format!("--define-macro={name}")))
            .map(|flag| text(&flag))
            .collect::<Result<Vec<_>, _>>()?;
        let (names, headers, flags) = (pointers(&names), pointers(&headers), pointers(&flags));

        let mut program = OpenProgram {
            compiler: self,
            program: std::ptr::null_mut(),
        };
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        // SAFETY: the signature is nvrtc.h's; every string ends in zero and outlives the call, and NVRTC copies them.
        let code = unsafe {
            self.function::<Create>(c"nvrtcCreateProgram")?(
                &raw mut program.program,
                source.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as c_int,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        if code != 0 {
            return Err(rejected(format!("nvrtcCreateProgram answered {code}")));
        }
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        // SAFETY: the program is live and the options are zero-ended strings that outlive the call.
        let code = unsafe {
            self.function::<Compile>(c"nvrtcCompileProgram")?(program.program, flags.len() as c_int, flags.as_ptr())
        };
        let log = program.read(c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog")?;
        let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
        if code != 0 {
            return Err(rejected(log));
        }
        Ok((program.read(c"nvrtcGetCUBINSize", c"nvrtcGetCUBIN")?, log))
    }

    /// # Safety
    /// `F` must be the C signature of the function called `name` in nvrtc.h.
    unsafe fn function<F>(&self, name: &CStr) -> Result<Symbol<'_, F>, BuildError> {
        // SAFETY: the caller gives the right signature.
        unsafe { self.shared.get(name.to_bytes_with_nul()) }
            .map_err(|error| BuildError::UnusableCompiler("libnvrtc".into(), error.to_string()))
    }
}

struct OpenProgram<'a> {
    compiler: &'a Compiler,
    program: Program,
}

impl OpenProgram<'_> {
    /// One of NVRTC's pairs "how long is it" and "give it to me".
    fn read(&self, size: &CStr, get: &CStr) -> Result<Vec<u8>, BuildError> {
        type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
        type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
        let mut bytes = 0;
        // SAFETY: the signatures are nvrtc.h's, the program is live, and the buffer has the size that NVRTC just named.
        let (code, out) = unsafe {
            let mut code = self.compiler.function::<Size>(size)?(self.program, &raw mut bytes);
            let mut out = vec![0u8; bytes];
            if code == 0 && bytes > 0 {
                code = self.compiler.function::<Get>(get)?(self.program, out.as_mut_ptr().cast());
            }
            (code, out)
        };
        match code {
            0 => Ok(out),
            _ => Err(BuildError::UnusableCompiler(
                "libnvrtc".into(),
                format!("{get:?} answered {code}"),
            )),
        }
    }
}

impl Drop for OpenProgram<'_> {
    fn drop(&mut self) {
        type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
        if self.program.is_null() {
            return;
        }
        // SAFETY: the program is live and is not used after this.
        if let Ok(destroy) = unsafe { self.compiler.function::<Destroy>(c"nvrtcDestroyProgram") } {
            // SAFETY: as above.
            unsafe { destroy(&raw mut self.program) };
        }
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|text| text.as_ptr()).collect()
}

fn load(path: &Path) -> Option<Library> {
    // SAFETY: NVRTC's initialisers only set up its own state; the names are NVRTC's alone.
    unsafe { Library::new(path) }.ok()
}

/// `libnvrtc-builtins.so.13.0` and the like; a wheel has an `.alt.` twin for old C libraries, which is not wanted.
fn builtins(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    entries.filter_map(|entry| Some(entry.ok()?.path())).find(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("libnvrtc-builtins.so")
    })
}
