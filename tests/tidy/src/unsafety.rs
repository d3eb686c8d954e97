//! `unsafe` lives in kvasir-simd, kvasir-cuda and kvasir-device only, and each block says which fact makes it sound.

use crate::{Repository, Violation, source};

/// The crates that may: vector instructions, the foreign code of a GPU's driver, and memory shared with the kernel or a process.
const ALLOWED: [&str; 3] = ["kernels/simd/", "kernels/cuda/", "storage/device/"];

/// Finds `unsafe` outside the crates that may use it, blocks without `// SAFETY:`, and crates that do not forbid it.
pub fn check(repository: &Repository) -> Vec<Violation> {
    let mut found = Vec::new();
    for (path, text) in repository.with_extension(&["rs"]) {
        let code = source::code_only(text);
        for (line, column) in source::lines_with_word(&code, "unsafe") {
            if !allowed(path) {
                let what = "unsafe outside kvasir-simd, kvasir-cuda and kvasir-device: use a safe interface, or move the part that needs it there";
                found.push(Violation::new(path, line, what));
            } else if !explained(text, &code, line, column) {
                let what = "unsafe without a reason: write `// SAFETY:` (or `# Safety` on a function) above it, with the fact and who keeps it";
                found.push(Violation::new(path, line, what));
            }
        }
        let root = path.ends_with("/src/lib.rs") || path.ends_with("/src/main.rs");
        if root && !allowed(path) && !code.contains("#![forbid(unsafe_code)]") {
            found.push(Violation::new(
                path,
                0,
                "the crate's root must say #![forbid(unsafe_code)]",
            ));
        }
    }
    found
}

fn allowed(path: &str) -> bool {
    ALLOWED.iter().any(|folder| path.starts_with(folder))
}

/// Whether the comment lines above (or the line itself) state the reason. Attributes may stand between.
fn explained(text: &str, code: &str, line: usize, column: usize) -> bool {
    let lines: Vec<&str> = text.lines().collect();
    let after = code
        .lines()
        .nth(line - 1)
        .map_or("", |l| l[column + "unsafe".len()..].trim_start());
    // In a function pointer type, or an attribute such as #[unsafe(..)], there is no body to explain.
    // The name of an ABI is a string, which the code without strings has as spaces.
    let pointer = after.strip_prefix("extern").map_or(after, str::trim_start);
    if after.starts_with('(') || pointer.starts_with("fn(") {
        return true;
    }
    let says = |line: &str| line.contains("SAFETY:") || line.contains("# Safety");
    if says(lines[line - 1]) {
        return true;
    }
    let above = lines[..line - 1].iter().rev().map(|l| l.trim());
    above
        .take_while(|l| l.starts_with("//") || l.starts_with("#[") || l.starts_with(')') || continues(l))
        .any(says)
}

/// The start of a statement whose `unsafe` stands on a later line, as in `let x =` or `match`.
fn continues(line: &str) -> bool {
    line.ends_with('=') || line.ends_with("=>") || line.ends_with('(')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_one(path: &str, text: &str) -> Vec<usize> {
        check(&Repository::of(&[(path, text)]))
            .into_iter()
            .map(|v| v.line)
            .collect()
    }

    #[test]
    fn unsafe_is_found_where_it_must_not_be() {
        let table: [(&str, &str, &[usize]); 11] = [
            (
                "storage/a/src/b.rs",
                "fn f() {\n    // SAFETY: no\n    unsafe { g() }\n}\n",
                &[3],
            ),
            (
                "storage/a/src/b.rs",
                "// unsafe\nlet s = \"unsafe\"; let unsafe_code = 1;\n",
                &[],
            ),
            ("storage/a/src/lib.rs", "//! a\n#![forbid(unsafe_code)]\n", &[]),
            ("storage/a/src/lib.rs", "//! a\n", &[0]),
            (
                "kernels/simd/src/b.rs",
                "fn f() {\n    // SAFETY: i < n was asserted above\n    unsafe { g() }\n}\n",
                &[],
            ),
            (
                "kernels/simd/src/b.rs",
                "fn f() {\n    // SAFETY: long\n    // reason\n    let x =\n        unsafe { g() };\n}\n",
                &[],
            ),
            ("kernels/simd/src/b.rs", "fn f() {\n    unsafe { g() }\n}\n", &[2]),
            ("kernels/cuda/src/b.rs", "fn f() {\n    unsafe { g() }\n}\n", &[2]),
            (
                "kernels/cuda/src/b.rs",
                "type F = unsafe extern \"C\" fn(u32) -> u32;\n",
                &[],
            ),
            ("kernels/cuda/src/b.rs", "unsafe extern \"C\" {\n    fn g();\n}\n", &[1]),
            (
                "kernels/simd/src/b.rs",
                "/// G.\n///\n/// # Safety\n/// The CPU has AVX2.\n#[target_feature(enable = \"avx2\")]\nunsafe fn g() {}\n",
                &[],
            ),
        ];
        for (path, text, lines) in table {
            assert_eq!(check_one(path, text), lines, "{path}: {text}");
        }
    }
}
