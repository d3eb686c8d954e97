//! A small random model of Gemma 3's shape: its forward against one that is plain, in f64, and written anew here.

use kvasir_model::{Architecture, Attention, Logits, Sliding, StepError, StepSequence};
use kvasir_reference as reference;
use rand::{SeedableRng, rngs::StdRng};

use crate::made_up::{Gguf, Kind, Tensor, Value, load, pages, pool_for};

const LAYERS: usize = 3;
const HIDDEN: usize = 64;
const INNER: usize = 96;
const Q_HEADS: usize = 4;
const HEAD_DIM: usize = 32;
const WINDOW: usize = 9;
/// The last of three layers attends to everything.
const PERIOD: usize = 3;
const EPSILON: f32 = 1e-6;

/// One KV head, windows of 9 tokens, one layer of three without; a SentencePiece vocabulary. All matrices are f32, so that only
/// what the crate rounds differs from the reference.
pub(crate) fn small() -> Gguf {
    let mut rng = StdRng::seed_from_u64(6);
    let mut gguf = Gguf::small();
    let small: Vec<String> = gguf.metadata.iter().map(|(key, _)| key.clone()).collect();
    small
        .iter()
        .filter(|key| key.starts_with("llama."))
        .for_each(|key| gguf.remove(key));
    gguf.set("general.architecture", Value::Text("gemma3".to_owned()));
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", 2048),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", INNER),
        ("attention.head_count", Q_HEADS),
        ("attention.head_count_kv", 1),
        ("attention.key_length", HEAD_DIM),
        ("attention.value_length", HEAD_DIM),
        ("attention.sliding_window", WINDOW),
        ("attention.sliding_window_pattern", PERIOD),
    ] {
        gguf.set(&format!("gemma3.{key}"), Value::U32(value as u32));
    }
    gguf.set("gemma3.rope.freq_base", Value::F32(1_000_000.0));
    gguf.set("gemma3.attention.layer_norm_rms_epsilon", Value::F32(EPSILON));

    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = [
        "\u{2581}",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "\u{2581}a",
        "abc",
        "é",
        "<two>",
        "\n\n",
    ];
    let texts: Vec<String> = ["<bos>", "<eos>"]
        .map(str::to_owned)
        .into_iter()
        .chain(bytes)
        .chain(pieces.map(str::to_owned))
        .collect();
    let vocab = texts.len();
    let mut kinds = vec![1; vocab];
    kinds[..2].fill(3);
    kinds[2..258].fill(6);
    kinds[vocab - 2..].fill(4);
    let mut scores = vec![-1000.0; vocab];
    // "bc" before "ab", and then "abc" of "a" and "bc".
    for (piece, score) in [("ab", -3.0), ("bc", -2.0), ("\u{2581}a", -4.0), ("abc", -5.0)] {
        let id = texts.iter().position(|text| text == piece).expect("one of the pieces");
        scores[id] = score;
    }
    for (key, value) in [
        ("model", Value::Text("llama".to_owned())),
        ("pre", Value::Text("default".to_owned())),
        ("tokens", Value::Texts(texts)),
        ("token_type", Value::I32s(kinds)),
        ("scores", Value::F32s(scores)),
        ("bos_token_id", Value::U32(0)),
        ("eos_token_id", Value::U32(1)),
        ("add_bos_token", Value::Bool(true)),
        ("add_space_prefix", Value::Bool(false)),
    ] {
        gguf.set(&format!("tokenizer.ggml.{key}"), value);
    }
    gguf.remove("tokenizer.ggml.merges");

    let (hidden, inner, q, kv) = (
        HIDDEN as u64,
        INNER as u64,
        (Q_HEADS * HEAD_DIM) as u64,
        HEAD_DIM as u64,
    );
    let of_layer = [
        ("attn_norm", vec![hidden]),
        ("attn_q", vec![q, hidden]),
        ("attn_k", vec![kv, hidden]),
        ("attn_v", vec![kv, hidden]),
        ("attn_q_norm", vec![kv]),
        ("attn_k_norm", vec![kv]),
        ("attn_output", vec![hidden, q]),
        ("post_attention_norm", vec![hidden]),
        ("ffn_norm", vec![hidden]),
        ("ffn_gate", vec![inner, hidden]),
        ("ffn_up", vec![inner, hidden]),
        ("ffn_down", vec![hidden, inner]),
        ("post_ffw_norm", vec![hidden]),
    ];
    let mut tensor = |name: &str, dims: &[u64]| Tensor::random(name, dims, Kind::F32, &mut rng);
    gguf.tensors = vec![
        tensor("token_embd.weight", &[vocab as u64, hidden]),
        tensor("output_norm.weight", &[hidden]),
    ];
    for layer in 0..LAYERS {
        for (name, dims) in &of_layer {
            gguf.tensors.push(tensor(&format!("blk.{layer}.{name}.weight"), dims));
        }
    }
    gguf
}

/// What could be mistaken in a forward.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mistake {
    None,
    NoWindow,
    ShortWindow,
    OneTheta,
    Silu,
    NoQueryNorm,
    NoKeyNorm,
    NoNormBehindAttention,
    NoNormBehindFeedForward,
    PlainEmbedding,
    InterleavedRope,
}

/// The forward of one text as the paper has it.
struct Plain<'a> {
    gguf: &'a Gguf,
    mistake: Mistake,
}

impl Plain<'_> {
    fn weights(&self, name: &str) -> Vec<f32> {
        let name = format!("{name}.weight");
        let tensor = self.gguf.tensors.iter().find(|tensor| tensor.name == name);
        let data = &tensor.expect("a tensor of the small model").data;
        data.as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect()
    }

    fn product(&self, name: &str, x: &[f32]) -> Vec<f32> {
        let dot = |row: &[f32]| row.iter().zip(x).map(|(a, b)| f64::from(a * b)).sum::<f64>() as f32;
        self.weights(name).chunks_exact(x.len()).map(dot).collect()
    }

    fn norm(&self, name: &str, x: &[f32]) -> Vec<f32> {
        let weights = self.weights(name);
        x.chunks_exact(weights.len())
            .flat_map(|x| reference::rms_norm(x, &weights, EPSILON))
            .map(|x| x as f32)
            .collect()
    }

    fn normed_unless(&self, mistake: Mistake, name: &str, x: Vec<f32>) -> Vec<f32> {
        if self.mistake == mistake {
            x
        } else {
            self.norm(name, &x)
        }
    }

    /// Logits of the last of `tokens`.
    fn logits(&self, tokens: &[u32]) -> Vec<f32> {
        let embedding = self.weights("token_embd");
        let scale = if self.mistake == Mistake::PlainEmbedding {
            1.0
        } else {
            (HIDDEN as f32).sqrt()
        };
        let mut stream: Vec<Vec<f32>> = tokens
            .iter()
            .map(|token| {
                embedding[*token as usize * HIDDEN..][..HIDDEN]
                    .iter()
                    .map(|x| x * scale)
                    .collect()
            })
            .collect();
        for layer in 0..LAYERS {
            self.layer(layer, &mut stream);
        }
        let last = self.norm("output_norm", stream.last().expect("a token"));
        self.product("token_embd", &last)
    }

    fn layer(&self, layer: usize, stream: &mut [Vec<f32>]) {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let whole = layer % PERIOD == PERIOD - 1;
        let theta = if whole || self.mistake == Mistake::OneTheta {
            1e6
        } else {
            1e4
        };
        let window = match self.mistake {
            _ if whole => usize::MAX,
            Mistake::NoWindow => usize::MAX,
            Mistake::ShortWindow => WINDOW - 1,
            _ => WINDOW,
        };
        let interleaved = self.mistake == Mistake::InterleavedRope;
        let rotated = |x: &[f32], position: usize| -> Vec<f32> {
            let turn = |x| reference::rope(x, HEAD_DIM, theta, position, interleaved);
            x.chunks_exact(HEAD_DIM).flat_map(turn).map(|x| x as f32).collect()
        };
        let halves = |x: Vec<f32>| -> Vec<half::f16> { x.into_iter().map(half::f16::from_f32).collect() };
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (position, x) in stream.iter().enumerate() {
            let x = self.norm(&name("attn_norm"), x);
            let q = self.product(&name("attn_q"), &x);
            let q = self.normed_unless(Mistake::NoQueryNorm, &name("attn_q_norm"), q);
            let k = self.product(&name("attn_k"), &x);
            let k = self.normed_unless(Mistake::NoKeyNorm, &name("attn_k_norm"), k);
            queries.push(rotated(&q, position));
            keys.push(halves(rotated(&k, position)));
            values.push(halves(self.product(&name("attn_v"), &x)));
        }
        for (position, (x, q)) in stream.iter_mut().zip(&queries).enumerate() {
            let seen = (position + 1).saturating_sub(window)..position + 1;
            let rows: Vec<(&[half::f16], &[half::f16])> = seen.map(|at| (&keys[at][..], &values[at][..])).collect();
            let attended = q.chunks_exact(HEAD_DIM).flat_map(|q| {
                let (o, _) = reference::attend(q, &rows, 1.0 / (HEAD_DIM as f32).sqrt());
                o.into_iter().map(|o| o as f32)
            });
            let added = self.product(&name("attn_output"), &attended.collect::<Vec<f32>>());
            let added = self.normed_unless(Mistake::NoNormBehindAttention, &name("post_attention_norm"), added);
            x.iter_mut().zip(added).for_each(|(x, added)| *x += added);
            let normed = self.norm(&name("ffn_norm"), x);
            let (gate, up) = (
                self.product(&name("ffn_gate"), &normed),
                self.product(&name("ffn_up"), &normed),
            );
            let gated = match self.mistake {
                Mistake::Silu => reference::silu_mul(&gate, &up),
                _ => reference::gelu_mul(&gate, &up),
            };
            let gated: Vec<f32> = gated.into_iter().map(|x| x as f32).collect();
            let added = self.product(&name("ffn_down"), &gated);
            let added = self.normed_unless(Mistake::NoNormBehindFeedForward, &name("post_ffw_norm"), added);
            x.iter_mut().zip(added).for_each(|(x, added)| *x += added);
        }
    }
}

/// Mean difference over the standard deviation of the truth.
fn error(found: &[f32], truth: &[f32]) -> f32 {
    let n = truth.len() as f32;
    let mean = truth.iter().sum::<f32>() / n;
    let deviation = (truth.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
    found.iter().zip(truth).map(|(a, b)| (a - b).abs()).sum::<f32>() / n / deviation
}

#[test]
fn logits_are_those_of_a_plain_forward_and_of_no_mistaken_one() {
    let gguf = small();
    let mut model = load(&gguf, 2);
    let tokens: Vec<u32> = (0..30).map(|at| (at * 37 + 5) % 250).collect();
    let mut pool = pool_for(&model, 8);
    let own = pages(0, 8);
    let sequence = StepSequence {
        tokens: &tokens,
        position: 0,
        pages: &own,
        attention: Attention::Full,
        logits: Logits::Last,
    };
    let found = model
        .step(&[sequence], &mut pool, &mut ())
        .expect("a sound step")
        .rows
        .remove(0);
    let of = |mistake| Plain { gguf: &gguf, mistake }.logits(&tokens);
    let right = error(&found, &of(Mistake::None));
    assert!(right < 0.02, "{right}: int8 weights and activations should cost less");
    for mistake in [
        Mistake::NoWindow,
        Mistake::ShortWindow,
        Mistake::OneTheta,
        Mistake::Silu,
        Mistake::NoQueryNorm,
        Mistake::NoKeyNorm,
        Mistake::NoNormBehindAttention,
        Mistake::NoNormBehindFeedForward,
        Mistake::PlainEmbedding,
        Mistake::InterleavedRope,
    ] {
        let wrong = error(&found, &of(mistake));
        assert!(
            wrong > 2.0 * right,
            "{mistake:?} is not told from the truth: {wrong}, and {right}"
        );
    }
}

#[test]
fn its_identity_says_what_layers_see() {
    let file = small().open().expect("a sound file");
    let shape = file.shape();
    let sliding = Sliding {
        window: WINDOW,
        rope_theta: 10_000.0,
        period: PERIOD,
    };
    assert_eq!(shape.architecture, Architecture::Gemma3(sliding));
    assert_eq!(
        [0, 1, 2].map(|layer| shape.window(layer)),
        [Some(WINDOW), Some(WINDOW), None]
    );
    let schema = file.schema(64);
    assert_eq!(schema.attention, "sliding(window=9,rope_theta=10000,full_every=3)");
    assert!(schema.numerics.ends_with("+gemma3/1+q8_0"), "{}", schema.numerics);
    let fingerprint = |change: fn(&mut Gguf)| {
        let mut gguf = small();
        change(&mut gguf);
        let mut schema = gguf.open().expect("a sound file").schema(64);
        // Of the whole file, which would tell them apart in any case.
        schema.weights_sha256 = [0; 32];
        (schema.fingerprint(), schema.model_fingerprint())
    };
    let same = fingerprint(|_| {});
    for change in [
        |g: &mut Gguf| g.set("gemma3.attention.sliding_window", Value::U32(10)),
        |g: &mut Gguf| g.set("gemma3.attention.sliding_window_pattern", Value::U32(2)),
        |g: &mut Gguf| g.set("gemma3.rope.freq_base_swa", Value::F32(20_000.0)),
    ] {
        let other = fingerprint(change);
        assert!(other.0 != same.0 && other.1 != same.1);
    }
}

#[test]
fn what_would_miss_keys_is_refused() {
    let mut model = load(&small(), 1);
    let mut pool = pool_for(&model, 4);
    let own = pages(0, 4);
    let local = [0..4, 8..16];
    let sequence = StepSequence {
        tokens: &[1],
        position: 15,
        pages: &own,
        attention: Attention::Local(local.to_vec()),
        logits: Logits::Last,
    };
    let error = model.step(&[sequence], &mut pool, &mut ()).expect_err("local");
    assert!(
        matches!(&error, StepError::Invalid(problem) if problem.contains("layers of the model see a window")),
        "{error}"
    );
}

#[test]
fn pieces_are_joined_by_score_and_the_rest_is_bytes() {
    let file = small().open().expect("a sound file");
    let tokenizer = file.tokenizer();
    let id = |piece: &str| {
        let found = (0..tokenizer.vocab() as u32).find(|id| tokenizer.decoder().push(*id) == piece && *id >= 258);
        found.expect("one of the pieces")
    };
    let byte = |byte: u8| u32::from(byte) + 2;
    let table: [(&str, Vec<u32>); 8] = [
        ("", vec![]),
        ("abc", vec![id("abc")]),
        // "bc" has the better score; had "ab" been joined first, "c" would stand alone.
        ("abcb", vec![id("abc"), id("b")]),
        ("ab ab", vec![id("ab"), id(" "), id("ab")]),
        (" a", vec![id(" a")]),
        ("é\u{e8}", vec![id("é"), byte(0xc3), byte(0xa8)]),
        (
            "a<two>b\n\n\n",
            vec![id("a"), id("<two>"), id("b"), id("\n\n"), byte(b'\n')],
        ),
        ("<eos>", "<eos>".bytes().map(byte).collect()),
    ];
    for (text, expected) in table {
        let ids = tokenizer.encode(text, false).expect("any text");
        assert_eq!(ids, [&[0], &expected[..]].concat(), "{text:?}");
        let mut decoder = tokenizer.decoder();
        let back: String = ids.iter().map(|id| decoder.push(*id)).collect();
        assert_eq!(back + &decoder.finish(), text);
    }
    assert_eq!(tokenizer.encode("<eos>", true).expect("any text"), [0, 1]);
    assert_eq!(tokenizer.stops(), [1]);
}
