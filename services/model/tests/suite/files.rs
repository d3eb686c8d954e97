//! Files that must be refused, each with what is wrong and what to do.

use kvasir_model::{LoadError, LoadOptions, Model, ModelFile};

use crate::made_up::{Folder, Gguf, Kind, Value, open_bytes};

#[test]
fn the_small_model_is_sound() {
    let file = Gguf::small().open().expect("a sound file");
    assert_eq!(file.name(), "made-up");
    assert_eq!(file.shape().head_dim, 16);
    // One matrix is f32 and gets quantised, which changes what the forward computes.
    assert!(
        file.schema(4).numerics.ends_with("+llama/1+q8_0"),
        "{}",
        file.schema(4).numerics
    );
    assert!(file.template().is_none());
}

#[test]
fn metadata_is_checked() {
    type Change = fn(&mut Gguf);
    let table: [(&str, Change); 28] = [
        (
            "architecture \"qwen2\" is not supported: use a model of architecture llama or gemma3",
            |g| {
                g.set("general.architecture", Value::Text("qwen2".to_owned()));
            },
        ),
        ("key general.architecture is missing", |g| {
            g.remove("general.architecture")
        }),
        ("key llama.block_count is missing", |g| g.remove("llama.block_count")),
        ("key llama.block_count is 0, and must be from 1", |g| {
            g.set("llama.block_count", Value::U32(0))
        }),
        ("key llama.block_count is \"two\", and must be a whole number", |g| {
            g.set("llama.block_count", Value::Text("two".to_owned()));
        }),
        (
            "key llama.attention.head_count_kv is 3, which does not divide the 4 query heads",
            |g| {
                g.set("llama.attention.head_count_kv", Value::U32(3));
            },
        ),
        (
            "tensor blk.0.attn_k.weight has shape [32, 64], and the metadata says [64, 64]",
            |g| {
                g.set("llama.attention.head_count_kv", Value::U32(4));
            },
        ),
        (
            "tensor blk.0.attn_q.weight has shape [64, 64], and the metadata says [128, 64]",
            |g| {
                g.set("llama.attention.key_length", Value::U32(32));
            },
        ),
        (
            "key llama.attention.value_length is 8, and keys have 16 elements",
            |g| {
                g.set("llama.attention.value_length", Value::U32(8));
            },
        ),
        (
            "key llama.rope.dimension_count is 18, and must be even and at most the 16",
            |g| {
                g.set("llama.rope.dimension_count", Value::U32(18));
            },
        ),
        ("key llama.rope.dimension_count is 7, and must be even", |g| {
            g.set("llama.rope.dimension_count", Value::U32(7))
        }),
        ("key llama.rope.freq_base is 0, and must be above 0", |g| {
            g.set("llama.rope.freq_base", Value::F32(0.0))
        }),
        (
            "key llama.rope.freq_base is F32(NaN), and must be a finite number",
            |g| {
                g.set("llama.rope.freq_base", Value::F32(f32::NAN));
            },
        ),
        (
            "key llama.context_length is 4294967295, whose rope table would take more than 1 GiB",
            |g| {
                g.set("llama.context_length", Value::U32(u32::MAX));
            },
        ),
        (
            "rope scaling \"yarn\" is not supported: use a model without rope scaling",
            |g| {
                g.set("llama.rope.scaling.type", Value::Text("yarn".to_owned()));
            },
        ),
        ("rope scaling (llama.rope.scaling.factor) is not supported", |g| {
            g.set("llama.rope.scaling.factor", Value::F32(4.0));
        }),
        ("a mixture of experts (llama.expert_count) is not supported", |g| {
            g.set("llama.expert_count", Value::U32(8))
        }),
        (
            "key tokenizer.ggml.tokens has 259 tokens, and vocab_size says 300",
            |g| {
                g.set("llama.vocab_size", Value::U32(300));
                g.tensor("token_embd.weight").dims[0] = 300;
                let more = vec![0; 41 * 2 * 34];
                g.tensor("token_embd.weight").data.extend(more);
            },
        ),
        ("tokenizer model \"bert\" is not supported", |g| {
            g.set("tokenizer.ggml.model", Value::Text("bert".to_owned()));
        }),
        (
            "a space before each text (tokenizer.ggml.add_space_prefix) is not supported",
            |g| {
                g.set("tokenizer.ggml.model", Value::Text("llama".to_owned()));
            },
        ),
        (
            "pre-tokenizer \"qwen2\" is not supported: use a model with pre-tokenizer smollm, gpt-2 or llama-bpe",
            |g| {
                g.set("tokenizer.ggml.pre", Value::Text("qwen2".to_owned()));
            },
        ),
        ("key tokenizer.ggml.merges cannot be used", |g| {
            g.set("tokenizer.ggml.merges", Value::Texts(vec!["日 本".to_owned()]));
        }),
        ("key tokenizer.ggml.merges has an entry that is not two tokens", |g| {
            g.set("tokenizer.ggml.merges", Value::Texts(vec!["ab".to_owned()]));
        }),
        ("key tokenizer.ggml.token_type has 1 entries for 259 tokens", |g| {
            g.set("tokenizer.ggml.token_type", Value::I32s(vec![1]));
        }),
        (
            "key tokenizer.ggml.eos_token_id is 259, and the vocabulary has 259 tokens",
            |g| {
                g.set("tokenizer.ggml.eos_token_id", Value::U32(259));
            },
        ),
        (
            "key tokenizer.ggml.bos_token_id is missing, and add_bos_token asks for it",
            |g| {
                g.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
            },
        ),
        ("key tokenizer.chat_template cannot be used", |g| {
            g.set("tokenizer.chat_template", Value::Text("{% for %}".to_owned()));
        }),
        ("is no readable GGUF file", |g| {
            g.set("general.alignment", Value::U32(0))
        }),
    ];
    for (expected, change) in table {
        let mut gguf = Gguf::small();
        change(&mut gguf);
        refused(gguf.open(), expected);
    }
}

#[test]
fn tensors_are_checked() {
    type Change = fn(&mut Gguf);
    let table: [(&str, Change); 8] = [
        ("tensor blk.1.ffn_down.weight is missing", |g| {
            g.tensors.retain(|t| t.name != "blk.1.ffn_down.weight")
        }),
        (
            "tensor output_norm.weight has shape [32], and the metadata says [64]",
            |g| {
                g.tensor("output_norm.weight").dims = vec![32];
            },
        ),
        (
            "tensor blk.0.attn_norm.weight has shape [8, 8], and the metadata says [64]",
            |g| {
                g.tensor("blk.0.attn_norm.weight").dims = vec![8, 8];
            },
        ),
        ("unknown dtype for tensor 99", |g| {
            g.tensor("blk.0.attn_q.weight").kind = Kind::Unknown as u32
        }),
        ("tensor blk.0.attn_q.bias is not supported: use a plain model", |g| {
            let mut bias = g.tensor("blk.0.attn_norm.weight").clone();
            bias.name = "blk.0.attn_q.bias".to_owned();
            g.tensors.push(bias);
        }),
        ("rope scaling (tensor rope_freqs.weight) is not supported", |g| {
            let mut factors = g.tensor("blk.0.attn_norm.weight").clone();
            factors.name = "rope_freqs.weight".to_owned();
            g.tensors.push(factors);
        }),
        (
            "tensor blk.0.attn_q.weight has rows of 63 elements, and Q4_1 comes in blocks of 32",
            |g| {
                g.tensor("blk.0.attn_q.weight").dims = vec![64, 63];
            },
        ),
        (
            "tensor blk.0.attn_q.weight has shape [4294967296, 4294967296], which no file can hold",
            |g| {
                g.tensor("blk.0.attn_q.weight").dims = vec![1 << 32, 1 << 32];
            },
        ),
    ];
    for (expected, change) in table {
        let mut gguf = Gguf::small();
        change(&mut gguf);
        refused(gguf.open(), expected);
    }
}

#[test]
fn damage_is_noticed_wherever_the_file_is_cut() {
    let whole = Gguf::small().bytes();
    // The last tensor's padding may be gone; everything else is needed.
    for len in (0..whole.len() - 32).step_by(97) {
        let error = open_bytes(&whole[..len])
            .err()
            .unwrap_or_else(|| panic!("cut to {len} bytes"));
        assert!(
            matches!(error, LoadError::Format { .. } | LoadError::Tensor { .. }),
            "cut to {len} bytes: {error}"
        );
    }
    refused(
        open_bytes(&whole[..whole.len() - 200]),
        "it is cut short; convert or fetch the model again",
    );
    let mut wrong = Gguf::small();
    wrong.magic = 0x1234_5678;
    refused(
        wrong.open(),
        "is no readable GGUF file: unknown magic 0x12345678; give a whole GGUF file",
    );
}

#[test]
fn a_length_that_the_file_cannot_hold_is_not_believed() {
    let whole = Gguf::small().bytes();
    // Tensor count, key count, length of the first key.
    for at in [8, 16, 24] {
        for huge in [u64::MAX, 1 << 40, 1 << 62] {
            let mut damaged = whole.clone();
            damaged[at..at + 8].copy_from_slice(&huge.to_le_bytes());
            refused(open_bytes(&damaged), "is no readable GGUF file");
        }
    }
}

#[test]
fn a_missing_file_and_a_folder_are_named() {
    let folder = Folder::new();
    let missing = folder.path().join("none.gguf");
    refused(ModelFile::open(&missing), "none.gguf: No such file");
    refused(ModelFile::open(folder.path()), "Is a directory");
}

#[test]
fn a_file_that_changes_after_it_was_opened_is_not_loaded() {
    let folder = Folder::new();
    let path = folder.path().join("changing.gguf");
    let bytes = Gguf::small().bytes();
    std::fs::write(&path, &bytes).expect("a small file");
    let file = ModelFile::open(&path).expect("a sound file");
    std::fs::write(&path, [&bytes[..], &[0]].concat()).expect("a small file");
    let error = Model::load(
        &file,
        &LoadOptions {
            threads: 1,
            block_tokens: 4,
        },
    )
    .err()
    .expect("a changed file");
    assert!(matches!(error, LoadError::Changed { .. }), "{error}");
}

#[test]
fn options_are_checked() {
    let file = Gguf::small().open().expect("a sound file");
    for (threads, block_tokens, expected) in [
        (0, 64, "load option threads is 0: from 1 to 1024"),
        (1025, 64, "load option threads is 1025"),
        (1, 0, "load option block_tokens is 0: must be at least 1"),
    ] {
        let error = Model::load(&file, &LoadOptions { threads, block_tokens })
            .err()
            .expect(expected)
            .to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

fn refused(found: Result<ModelFile, LoadError>, expected: &str) {
    let error = found
        .err()
        .unwrap_or_else(|| panic!("accepted, and should say: {expected}"))
        .to_string();
    assert!(error.contains(expected), "{error}\nshould say: {expected}");
    assert!(!error.contains('\n'), "one line: {error}");
}
