//! A GGUF writer, and a small random model written with it.

use std::path::{Path, PathBuf};

use half::f16;
use kvasir_model::{LoadError, LoadOptions, Model, ModelFile, PageId, PagePool};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A metadata value.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// GGUF's number of a tensor type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32 = 0,
    Q4_0 = 2,
    Q4_1 = 3,
    Q8_0 = 8,
    Unknown = 99,
}

/// A tensor, outermost dimension first.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

/// A file in the making.
#[derive(Clone, Debug)]
pub(crate) struct Gguf {
    pub(crate) magic: u32,
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<Tensor>,
}

impl Gguf {
    /// Two layers, four query and two KV heads of 16, 64 hidden elements, a vocabulary of bytes; weights seeded. The second
    /// layer mixes tensor types, as files quantised for size do.
    pub(crate) fn small() -> Self {
        let mut rng = StdRng::seed_from_u64(5);
        let texts = vocabulary();
        let mut types = vec![1; texts.len()];
        types[0] = 3;
        types[1] = 3;
        let metadata = [
            ("general.architecture", Value::Text("llama".to_owned())),
            ("llama.block_count", Value::U32(2)),
            ("llama.context_length", Value::U32(2048)),
            ("llama.embedding_length", Value::U32(64)),
            ("llama.feed_forward_length", Value::U32(96)),
            ("llama.attention.head_count", Value::U32(4)),
            ("llama.attention.head_count_kv", Value::U32(2)),
            ("llama.rope.freq_base", Value::F32(10_000.0)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("tokenizer.ggml.model", Value::Text("gpt2".to_owned())),
            ("tokenizer.ggml.pre", Value::Text("smollm".to_owned())),
            ("tokenizer.ggml.merges", Value::Texts(vec!["a b".to_owned()])),
            ("tokenizer.ggml.token_type", Value::I32s(types)),
            ("tokenizer.ggml.eos_token_id", Value::U32(1)),
        ];
        let mut tensors = vec![
            Tensor::random("token_embd.weight", &[texts.len() as u64, 64], Kind::Q8_0, &mut rng),
            Tensor::random("output_norm.weight", &[64], Kind::F32, &mut rng),
        ];
        let matrices: [(&str, [u64; 2], [Kind; 2]); 7] = [
            ("attn_q", [64, 64], [Kind::Q4_1, Kind::Q4_1]),
            ("attn_k", [32, 64], [Kind::Q4_1, Kind::Q4_0]),
            ("attn_v", [32, 64], [Kind::Q4_1, Kind::Q8_0]),
            ("attn_output", [64, 64], [Kind::Q4_1, Kind::F32]),
            ("ffn_gate", [96, 64], [Kind::Q4_1, Kind::Q8_0]),
            ("ffn_up", [96, 64], [Kind::Q4_1, Kind::Q4_1]),
            ("ffn_down", [64, 96], [Kind::Q4_1, Kind::Q4_1]),
        ];
        for layer in 0..2 {
            for norm in ["attn_norm", "ffn_norm"] {
                tensors.push(Tensor::random(
                    &format!("blk.{layer}.{norm}.weight"),
                    &[64],
                    Kind::F32,
                    &mut rng,
                ));
            }
            for (name, dims, kinds) in &matrices {
                let name = format!("blk.{layer}.{name}.weight");
                tensors.push(Tensor::random(&name, dims, kinds[layer], &mut rng));
            }
        }
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value));
        let mut gguf = Self {
            magic: 0x4655_4747,
            metadata: metadata.collect(),
            tensors,
        };
        gguf.set("tokenizer.ggml.tokens", Value::Texts(texts));
        gguf
    }

    /// Sets or replaces a key.
    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.remove(key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(other, _)| other != key);
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .expect("a tensor of the small model")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.magic.to_le_bytes());
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            match value {
                Value::U32(v) => number(&mut out, 4, &v.to_le_bytes()),
                Value::F32(v) => number(&mut out, 6, &v.to_le_bytes()),
                Value::Bool(v) => number(&mut out, 7, &[u8::from(*v)]),
                Value::Text(v) => {
                    number(&mut out, 8, &[]);
                    text(&mut out, v);
                }
                Value::Texts(v) => {
                    array(&mut out, 8, v.len());
                    v.iter().for_each(|v| text(&mut out, v));
                }
                Value::I32s(v) => {
                    array(&mut out, 5, v.len());
                    v.iter().for_each(|v| out.extend(v.to_le_bytes()));
                }
                Value::F32s(v) => {
                    array(&mut out, 6, v.len());
                    v.iter().for_each(|v| out.extend(v.to_le_bytes()));
                }
            }
        }
        let mut offset = 0_u64;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().rev().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (tensor.data.len() as u64).next_multiple_of(32);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        for tensor in &self.tensors {
            out.extend(&tensor.data);
            out.resize(out.len().next_multiple_of(32), 0);
        }
        out
    }

    /// Writes the file and opens it.
    pub(crate) fn open(&self) -> Result<ModelFile, LoadError> {
        open_bytes(&self.bytes())
    }
}

/// Opens `bytes` as the file `Made-Up.Q4_1.gguf`, which is gone from its folder afterwards but still readable.
pub(crate) fn open_bytes(bytes: &[u8]) -> Result<ModelFile, LoadError> {
    let folder = Folder::new();
    let path = folder.0.join("Made-Up.Q4_1.gguf");
    std::fs::write(&path, bytes).expect("the temporary folder is writable");
    ModelFile::open(&path)
}

/// A folder that is removed when dropped.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "kvasir-model-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("the temporary folder is writable");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What stays behind lies in the system's temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The small model with pages of four tokens.
pub(crate) fn small_model(threads: usize) -> Model {
    load(&Gguf::small(), threads)
}

/// The model in `gguf` with pages of four tokens.
pub(crate) fn load(gguf: &Gguf, threads: usize) -> Model {
    let file = gguf.open().expect("the small model is sound");
    Model::load(
        &file,
        &LoadOptions {
            threads,
            block_tokens: 4,
        },
    )
    .expect("the small model is sound")
}

/// A pool for `model`.
pub(crate) fn pool_for(model: &Model, pages: usize) -> PagePool {
    PagePool::new(model.schema().layout(), model.shape().layers, pages).expect("a pool of a few megabytes")
}

/// Pages `first..first + blocks` in an order of their own.
pub(crate) fn pages(first: u32, blocks: u32) -> Vec<Option<PageId>> {
    (0..blocks)
        .map(|block| Some(PageId(first + blocks - 1 - block)))
        .collect()
}

/// Two control tokens, the bytes in byte-level writing, and one merge.
fn vocabulary() -> Vec<String> {
    let itself = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let bytes = (0..256)
        .filter(itself)
        .chain(256..324)
        .filter_map(char::from_u32)
        .map(String::from);
    ["<|start|>", "<|im_end|>"]
        .map(str::to_owned)
        .into_iter()
        .chain(bytes)
        .chain(["ab".to_owned()])
        .collect()
}

impl Tensor {
    pub(crate) fn random(name: &str, dims: &[u64], kind: Kind, rng: &mut StdRng) -> Self {
        let elements: u64 = dims.iter().product();
        let blocks = elements as usize / 32;
        let half = |value: f32| f16::from_f32(value).to_le_bytes();
        let mut data = Vec::new();
        match kind {
            // Norms are near one, the one matrix of this type is small.
            Kind::F32 => (0..elements).for_each(|_| {
                let value = rng.random_range(-0.2_f32..0.2) + if dims.len() == 1 { 1.0 } else { 0.0 };
                data.extend(value.to_le_bytes());
            }),
            Kind::Q4_0 | Kind::Q4_1 => (0..blocks).for_each(|_| {
                let d = rng.random_range(0.01_f32..0.04);
                data.extend(half(d));
                if kind == Kind::Q4_1 {
                    data.extend(half(-7.5 * d));
                }
                data.extend((0..16).map(|_| rng.random::<u8>()));
            }),
            Kind::Q8_0 => (0..blocks).for_each(|_| {
                data.extend(half(rng.random_range(0.001_f32..0.003)));
                data.extend((0..32).map(|_| rng.random::<u8>()));
            }),
            Kind::Unknown => {}
        }
        Self {
            name: name.to_owned(),
            dims: dims.to_vec(),
            kind: kind as u32,
            data,
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn number(out: &mut Vec<u8>, kind: u32, bytes: &[u8]) {
    out.extend(kind.to_le_bytes());
    out.extend(bytes);
}

fn array(out: &mut Vec<u8>, kind: u32, len: usize) {
    number(out, 9, &kind.to_le_bytes());
    out.extend((len as u64).to_le_bytes());
}
