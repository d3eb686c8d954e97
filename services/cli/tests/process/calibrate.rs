//! `kvasir calibrate` and `kvasir bench dump`, on a real model and short texts.

use std::{ops::Range, path::Path};

use kvasir_index::Basis;
use kvasir_model::{CaptureOptions, CaptureSink, CapturedLayer, LoadOptions, Model, StepAborted, capture};
use kvasir_testkit::model;
use serde_json::Value;

use super::{folder, kvasir, kvasir::run};

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ARCHITECTURE.md");

#[tokio::test]
async fn what_cannot_be_calibrated_or_dumped_is_refused_before_the_work() {
    let folder = folder();
    let short = folder.path().join("short.txt");
    std::fs::write(&short, "A short text.").expect("a file");
    std::fs::write(folder.path().join("latin.txt"), [b'a', 0xe9, b'b']).expect("a file");
    let short = short.display().to_string();
    // Arguments, exit code, what is said on standard error.
    let table: [(&[&str], i32, &[&str]); 11] = [
        (&["calibrate", "--text", "/no/text.txt"], 1, &["/no/text.txt", "--text"]),
        (&["calibrate", "--text", "latin.txt"], 1, &["latin.txt", "UTF-8"]),
        (&["calibrate", "--text", &short], 1, &["at least 1024", "--text"]),
        (
            &["calibrate", "--text", TEXT, "--tokens", "1023"],
            1,
            &["1023 tokens", "--tokens"],
        ),
        (
            &["calibrate", "--text", TEXT, "--out", "/no/folder/m.basis"],
            1,
            &["/no/folder/m.basis", "--out"],
        ),
        (&["calibrate", "--text", TEXT, "--rank", "0"], 2, &["--rank"]),
        (
            &["--model", "/no/model.gguf", "calibrate"],
            1,
            &["/no/model.gguf", "make model"],
        ),
        (
            &["bench", "dump", "d", "--text", &short],
            1,
            &["8192 are wanted", "--tokens"],
        ),
        (
            &["bench", "dump", "d", "--text", TEXT, "--tokens", "8193"],
            1,
            &["8193 tokens", "8192"],
        ),
        (
            &[
                "bench", "dump", "d", "--text", TEXT, "--tokens", "9", "--layers", "1,30",
            ],
            1,
            &["layer 30", "has 30"],
        ),
        (
            &["bench", "dump", &short, "--text", TEXT, "--tokens", "9"],
            1,
            &["short.txt"],
        ),
    ];
    for (args, code, named) in table {
        let said = run(kvasir::kvasir(folder.path()).args(args)).await;
        assert_eq!(said.status.code(), Some(code), "{args:?}: {}", said.err);
        for word in named {
            assert!(said.err.contains(word), "{args:?} should name {word}: {}", said.err);
        }
        assert!(!said.err.contains("panicked"), "{args:?}: {}", said.err);
    }
    assert!(!folder.path().join("d").exists(), "no folder for a dump that cannot be");
}

#[tokio::test]
async fn a_basis_is_written_and_is_the_same_on_any_number_of_threads() {
    let folder = folder();
    let file = model();
    let (shape, fingerprint) = (file.shape(), file.schema(64).model_fingerprint());
    let mut files = Vec::new();
    for threads in ["1", "2"] {
        let name = format!("{threads}.basis");
        let said = run(kvasir::kvasir(folder.path()).args([
            "calibrate",
            "--text",
            TEXT,
            "--tokens",
            "1024",
            "--rank",
            "8",
            "--threads",
            threads,
            "--out",
            &name,
        ]))
        .await;
        assert!(said.status.success(), "{}", said.err);
        assert!(
            said.err.contains("positions up to 1024"),
            "a short window is warned of: {}",
            said.err
        );
        assert!(said.out.contains("of 90 heads streaming"), "{}", said.out);
        let bytes = std::fs::read(folder.path().join(&name)).expect("the basis");
        let basis = Basis::decode(&bytes).expect("a sound basis");
        let fits = basis.check(&fingerprint, shape.layers, shape.kv_heads, shape.head_dim);
        assert_eq!(fits, Ok(()));
        let id: String = basis.id().iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(
            said.out.contains(&format!("{name}: {} bytes, id {id}", bytes.len())),
            "{}",
            said.out
        );
        // 384 positions of each of two windows have tokens outside sink and window, 31 apart: too few to conclude.
        assert_eq!((basis.rank, basis.streaming_heads()), (8, 0));
        files.push(bytes);
    }
    assert!(files[0] == files[1]);
    let names: Vec<_> = std::fs::read_dir(folder.path()).expect("the folder").collect();
    assert_eq!(names.len(), 2, "nothing half-written stays: {names:?}");
}

/// Layer 3, put together from steps of another length.
#[derive(Default)]
struct Layer3 {
    /// `[tokens, q_heads, head_dim]`
    q: Vec<f32>,
    predicted: Vec<f32>,
    /// KV head 1.
    keys: Vec<half::f16>,
    values: Vec<half::f16>,
}

impl CaptureSink for Layer3 {
    fn layer(&mut self, layer: &CapturedLayer<'_>) -> Result<(), StepAborted> {
        if layer.layer == 3 {
            self.q.extend_from_slice(layer.q);
            self.predicted.extend_from_slice(layer.predicted.expect("asked for"));
            layer.keys(1, layer.tokens.clone(), &mut self.keys);
            layer.values(1, layer.tokens.clone(), &mut self.values);
        }
        Ok(())
    }
}

/// Rows of one head, in the file's form.
fn rows(folder: &Path, name: &str, heads: usize, range: Range<usize>) -> Vec<u8> {
    let bytes = std::fs::read(folder.join(name)).expect(name);
    assert_eq!(bytes.len(), heads * 300 * 64 * 2, "{name}");
    bytes[range.start * 300 * 64 * 2..range.end * 300 * 64 * 2].to_vec()
}

#[tokio::test]
async fn a_dump_holds_what_the_forward_made() {
    let folder = folder();
    let dump = folder.path().join("dump");
    let said = run(kvasir::kvasir(folder.path()).args([
        "bench", "dump", "dump", "--text", TEXT, "--tokens", "300", "--layers", "3,0",
    ]))
    .await;
    assert!(said.status.success(), "{}", said.err);
    let meta: Value = serde_json::from_slice(&std::fs::read(dump.join("meta.json")).expect("meta.json")).expect("JSON");
    assert_eq!(meta["q_shape"], serde_json::json!([9, 300, 64]));
    assert_eq!(meta["kv_shape"], serde_json::json!([3, 300, 64]));
    assert_eq!(
        (&meta["layers"], &meta["layers_total"]),
        (&serde_json::json!([0, 3]), &serde_json::json!(30))
    );
    // A page of English: a mistaken rope or tokenizer would show in the thousands.
    let perplexity = meta["perplexity"].as_f64().expect("a number");
    assert!((2.0..200.0).contains(&perplexity), "perplexity {perplexity}");
    let mut names: Vec<_> = std::fs::read_dir(&dump)
        .expect("the dump")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["L0.k", "L0.q", "L0.v", "L3.k", "L3.p", "L3.q", "L3.v", "meta.json"]
    );

    let mut tokens = model()
        .tokenizer()
        .encode(&std::fs::read_to_string(TEXT).expect("the page"), false)
        .expect("tokens");
    tokens.truncate(300);
    let mut forward = Model::load(
        &model(),
        &LoadOptions {
            threads: 2,
            block_tokens: 64,
        },
    )
    .expect("the model");
    let mut layer = Layer3::default();
    let options = CaptureOptions {
        step_tokens: 77,
        predicted: true,
        logits: false,
    };
    capture(&mut forward, &tokens, &options, &mut layer).expect("a capture");
    let bytes =
        |values: &mut dyn Iterator<Item = half::f16>| values.flat_map(half::f16::to_le_bytes).collect::<Vec<u8>>();
    assert!(rows(&dump, "L3.k", 3, 1..2) == bytes(&mut layer.keys.iter().copied()));
    assert!(rows(&dump, "L3.v", 3, 1..2) == bytes(&mut layer.values.iter().copied()));
    for (name, all) in [("L3.q", &layer.q), ("L3.p", &layer.predicted)] {
        for head in [0, 4, 8] {
            let of_head = all
                .chunks_exact(9 * 64)
                .flat_map(|token| &token[head * 64..(head + 1) * 64]);
            let expected = bytes(&mut of_head.map(|value| half::f16::from_f32(*value)));
            assert!(rows(&dump, name, 9, head..head + 1) == expected, "{name}, head {head}");
        }
    }
}

#[tokio::test]
async fn python_brings_a_text() {
    let folder = folder();
    let said =
        run(kvasir::kvasir(folder.path()).args(["bench", "dump", "dump", "--tokens", "40", "--layers", "0"])).await;
    assert!(said.status.success(), "{}", said.err);
    let meta = std::fs::read_to_string(folder.path().join("dump/meta.json")).expect("meta.json");
    assert!(meta.contains("PSF"), "{meta}");
}
