//! Sketch bases that come with the program: for models that everyone has, calibrated by `kvasir calibrate`.

use std::path::PathBuf;

use crate::ModelFile;

/// A basis and the model that it is for.
struct BuiltIn {
    /// `KvSchema::model_fingerprint`, in hexadecimal digits.
    model: &'static str,
    file: &'static [u8],
}

/// `bases/README.md` says how each was made.
const BUILT_IN: [BuiltIn; 1] = [BuiltIn {
    model: "3a84fe6e09c5f558478eab8ab80844fa990a4c96c7a7c94c3126da19abd9db0b",
    file: include_bytes!("../bases/SmolLM2-135M-Instruct.Q4_1.basis"),
}];

/// The basis file that comes with the program for this very model file, `None` if there is none. To be decoded by
/// `kvasir_index::Basis`.
pub fn built_in_basis(file: &ModelFile) -> Option<&'static [u8]> {
    let model = file.schema(1).model_fingerprint();
    let hex: String = model.iter().map(|byte| format!("{byte:02x}")).collect();
    let found = BUILT_IN.iter().find(|basis| basis.model == hex)?;
    Some(found.file)
}

impl ModelFile {
    /// Where a basis that was calibrated for this file lies: beside it, `.basis` behind the whole name.
    pub fn basis_path(&self) -> PathBuf {
        let mut path = self.path().to_owned().into_os_string();
        path.push(".basis");
        path.into()
    }
}
