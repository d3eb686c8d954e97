//! `kvasir bench index` on a small recording that is the same everywhere, and what `tests/recall` makes of its result.

use std::{path::Path, process::Command};

use serde_json::{Value, json};

use crate::kvasir::{kvasir, run};

/// Tokens, elements and query heads of the recording.
const SMALL: [&str; 6] = ["--synthetic", "4096", "--head-dim", "64", "--heads", "4"];
/// By how much a figure may differ: the last bit of a sine is the platform's own.
const ROOM: f64 = 0.01;

/// Keys scored and bytes read at each effort, and recalls, of every index: drift shows here, and is written down on purpose.
fn golden(report: &Value) -> Value {
    let figures = |index: &Value| {
        let points = index["curve"].as_array().expect("a curve").iter();
        let points: Vec<Value> = points
            .map(|at| {
                let round = |name: &str| {
                    let value = at[name].as_f64().expect(name);
                    (value * 1e4).round() / 1e4
                };
                json!([
                    round("keys_share"),
                    round("bytes_share"),
                    round("recall_10"),
                    round("recall_100")
                ])
            })
            .collect();
        (index["name"].as_str().expect("a name").to_owned(), Value::from(points))
    };
    let indexes = report["groups"][0]["indexes"].as_array().expect("indexes");
    indexes.iter().map(figures).collect::<serde_json::Map<_, _>>().into()
}

fn assert_near(found: &Value, golden: &Value, what: &str) {
    match (found, golden) {
        (Value::Object(found), Value::Object(golden)) => {
            assert!(found.keys().eq(golden.keys()), "{what}: {found:?}");
            found
                .iter()
                .for_each(|(name, value)| assert_near(value, &golden[name], &format!("{what} {name}")));
        }
        (Value::Array(found), Value::Array(golden)) => {
            assert_eq!(found.len(), golden.len(), "{what}");
            for (at, (found, golden)) in found.iter().zip(golden).enumerate() {
                assert_near(found, golden, &format!("{what}[{at}]"));
            }
        }
        _ => {
            let (found, golden) = (found.as_f64().expect("a number"), golden.as_f64().expect("a number"));
            assert!(
                (found - golden).abs() <= ROOM * golden.abs().max(0.2),
                "{what}: {found}, written down as {golden} (tests/recall/golden.json)"
            );
        }
    }
}

#[tokio::test]
async fn counts_and_recalls_do_not_drift_unseen() {
    let folder = tempfile::tempdir().expect("a folder");
    let arrays = folder.path().join("arrays").display().to_string();
    let mut args = vec![
        "bench",
        "index",
        "--json",
        "--efforts",
        "0.02,0.1",
        "--stride",
        "16",
        "--write",
        &arrays,
    ];
    args.extend(SMALL);
    let said = run(kvasir(folder.path()).args(&args)).await;
    assert!(said.status.success(), "{}", said.err);
    let report: Value = serde_json::from_str(&said.out).expect("JSON");
    let written = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/recall/golden.json");
    let written: Value = serde_json::from_str(&std::fs::read_to_string(written).expect("a file")).expect("JSON");
    let found = golden(&report);
    assert!(found.as_object().is_some_and(|found| found.len() == 8), "{found}");
    assert_near(&found, &written, "");

    // The arrays are a dump that is measured alike; only its basis cannot be found, since no model made it.
    let meta: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("arrays/meta.json")).expect("a file")).expect("JSON");
    assert_eq!(
        (&meta["q_shape"], &meta["kv_shape"]),
        (&json!([4, 4096, 64]), &json!([1, 4096, 64]))
    );
    let size = |name: &str| {
        std::fs::metadata(folder.path().join("arrays").join(name))
            .expect(name)
            .len()
    };
    assert_eq!(
        ["L0.q", "L0.k", "L0.v"].map(size),
        [4 * 4096 * 128, 4096 * 128, 4096 * 128]
    );

    // What the comparison makes of it, with nobody to compare with.
    let json = folder.path().join("ours.json");
    std::fs::write(&json, &said.out).expect("written");
    let join = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/recall/join.py");
    let mut command = Command::new("python3");
    command.arg(join).arg(&json).arg("--out").arg(folder.path());
    let done = command.env("PYTHONDONTWRITEBYTECODE", "1").output();
    let done = done.expect("python3 is there: `deploy/bootstrap.sh system` installs it");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let table = std::fs::read_to_string(folder.path().join("recall.md")).expect("a table");
    assert!(
        table.contains("| roar | ") && table.contains("made up, 4,096 tokens"),
        "{table}"
    );
}

#[tokio::test]
async fn mistakes_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().display().to_string();
    for (args, named) in [
        (vec!["bench", "index"], "--synthetic"),
        (vec!["bench", "index", &path], "`kvasir bench dump` writes it"),
        (
            vec!["bench", "index", &path, "--synthetic", "4096"],
            "cannot be used with",
        ),
        (
            vec!["bench", "index", "--synthetic", "100"],
            "tokens: is 2,048 to 2,097,152",
        ),
        (
            vec!["bench", "index", "--synthetic", "4096", "--efforts", "2"],
            "--efforts",
        ),
        (vec!["bench", "index", "--synthetic", "4096", "--mass", "1"], "--mass"),
        (
            vec!["bench", "index", "--synthetic", "4096", "--stride", "0"],
            "--stride",
        ),
        (
            vec!["bench", "index", "--synthetic", "4096", "--indexes", "tree"],
            "tree",
        ),
    ] {
        let said = run(kvasir(folder.path()).args(&args)).await;
        assert!(!said.status.success(), "{args:?}");
        assert!(said.err.contains(named), "{args:?}: {}", said.err);
    }
}

#[test]
fn the_comparison_is_right_without_peers() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let done = Command::new("python3")
        .arg("tests/recall/test_recall.py")
        .current_dir(repository)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("python3 is there: `deploy/bootstrap.sh system` installs it");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && said.contains("OK"), "{said}");
}
