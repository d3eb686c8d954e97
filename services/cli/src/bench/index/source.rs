//! Where recordings come from: a dump of a real text, or made up and accepted by the gate.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use half::f16;
use kvasir_index::{
    Basis, HeadBasis, Moments,
    evaluate::{
        Recording, Setting,
        synthetic::{Shape, Statistics, Synthetic},
    },
};
use kvasir_model::built_in_basis;
use kvasir_simd::Pool;

use crate::{args::IndexBenchArgs, bench::dump::Meta, output::say, tree::Configuration, up::open_model_blocking};

/// Seeds that are tried for a recording that the gate accepts.
const TRIES: u64 = 4;
/// Of a made-up recording every so many tokens' queries and keys go into its basis.
const BASIS_STRIDE: usize = 4;

/// Recordings, layer by layer.
pub(super) enum Source {
    Dump(Box<Dump>),
    Synthetic(Box<MadeUp>),
}

/// A folder that `kvasir bench dump` wrote.
pub(super) struct Dump {
    folder: PathBuf,
    pub(super) meta: Meta,
    pub(super) layers: Vec<usize>,
    basis: Basis,
    /// Which basis, in words.
    pub(super) basis_from: String,
}

/// One KV head that no model made.
pub(super) struct MadeUp {
    made: Synthetic,
    pub(super) statistics: Statistics,
    basis: HeadBasis,
}

/// The arrays of one layer.
pub(super) struct Layer {
    q: Vec<f16>,
    keys: Vec<f16>,
    values: Vec<f16>,
}

impl Source {
    pub(super) fn open(args: &IndexBenchArgs, configuration: &Configuration, pool: &Pool) -> Result<Self> {
        match (&args.dump, args.synthetic) {
            (Some(folder), None) => Ok(Self::Dump(Box::new(Dump::open(folder, args, configuration)?))),
            (None, Some(tokens)) => Ok(Self::Synthetic(Box::new(MadeUp::new(tokens, args, pool)?))),
            _ => {
                bail!("nothing to measure on: name a folder that `kvasir bench dump` wrote, or give --synthetic TOKENS")
            }
        }
    }
}

impl Dump {
    fn open(folder: &Path, args: &IndexBenchArgs, configuration: &Configuration) -> Result<Self> {
        let meta = Meta::read(folder)?;
        let mut layers = if args.layers.is_empty() {
            meta.layers.clone()
        } else {
            args.layers.clone()
        };
        layers.sort_unstable();
        layers.dedup();
        if let Some(layer) = layers.iter().find(|layer| !meta.layers.contains(layer)) {
            bail!(
                "layer {layer} (--layers) is not in the dump, which has {:?}",
                meta.layers
            );
        }
        let (bytes, basis_from) = basis(args.basis.as_deref(), configuration)?;
        let basis = Basis::decode(&bytes).with_context(|| format!("the basis ({basis_from}) cannot be used"))?;
        let model: String = basis.model.iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(
            meta.model_fingerprint.as_ref() == Some(&model),
            "the basis ({basis_from}) is for another model than the dump, {}: name its own with --basis",
            meta.model
        );
        let sizes = (basis.layers, basis.kv_heads, basis.head_dim);
        ensure!(
            sizes == (meta.layers_total, meta.kv_shape[0], meta.kv_shape[2]),
            "the basis ({basis_from}) has other sizes than the dump: {sizes:?} layers, KV heads and elements"
        );
        Ok(Self {
            folder: folder.to_owned(),
            meta,
            layers,
            basis,
            basis_from,
        })
    }

    /// Reads the arrays of a layer.
    pub(super) fn layer(&self, layer: usize) -> Result<Layer> {
        let read = |what: &str, shape: [usize; 3]| halves(&self.folder.join(format!("L{layer}.{what}")), shape);
        Ok(Layer {
            q: read("q", self.meta.q_shape)?,
            keys: read("k", self.meta.kv_shape)?,
            values: read("v", self.meta.kv_shape)?,
        })
    }

    /// What one KV head of a layer saw, and the basis of its sketches.
    pub(super) fn head<'a>(
        &'a self,
        layer: usize,
        arrays: &'a Layer,
        kv_head: usize,
    ) -> (Recording<'a>, &'a HeadBasis) {
        let [q_heads, tokens, head_dim] = self.meta.q_shape;
        let (heads, rows) = (q_heads / self.meta.kv_shape[0], tokens * head_dim);
        let recording = Recording {
            q: &arrays.q[kv_head * heads * rows..][..heads * rows],
            keys: &arrays.keys[kv_head * rows..][..rows],
            values: &arrays.values[kv_head * rows..][..rows],
            heads,
            head_dim,
        };
        (recording, self.basis.head(layer, kv_head))
    }
}

impl MadeUp {
    fn new(tokens: usize, args: &IndexBenchArgs, pool: &Pool) -> Result<Self> {
        let shape = Shape {
            tokens,
            head_dim: args.head_dim,
            heads: args.heads,
            theta: Shape::theta_for(tokens),
            seed: args.seed,
        };
        let setting = Setting::default();
        let (made, statistics) = Synthetic::accepted(shape, &setting, TRIES, pool)?;
        say(format_args!(
            "made {tokens} tokens up, accepted with seed {}",
            made.shape().seed
        ));
        let recording = made.recording();
        let mut moments = Moments::new(shape.head_dim);
        moments.add_queries(&recording.samples(&setting, BASIS_STRIDE));
        let prefill = setting.prefill(&recording);
        for key in recording.keys[..prefill * shape.head_dim]
            .chunks_exact(shape.head_dim)
            .step_by(BASIS_STRIDE)
        {
            moments.add_keys(key);
        }
        let basis = moments.basis(Basis::RANK.min(shape.head_dim))?.basis;
        if let Some(folder) = &args.write {
            write(&made, folder)?;
        }
        Ok(Self {
            made,
            statistics,
            basis,
        })
    }

    pub(super) fn shape(&self) -> Shape {
        self.made.shape()
    }

    pub(super) fn head(&self) -> (Recording<'_>, &HeadBasis) {
        (self.made.recording(), &self.basis)
    }
}

/// The bytes of a basis, and where they are from: the file `named`, the one beside the configured model, or the one that comes
/// with the program for it.
fn basis(named: Option<&Path>, configuration: &Configuration) -> Result<(Vec<u8>, String)> {
    let read = |path: &Path| {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read the basis {} (--basis)", path.display()));
        anyhow::Ok((bytes?, path.display().to_string()))
    };
    if let Some(path) = named {
        return read(path);
    }
    let file = open_model_blocking(&configuration.tree().model.path)?;
    let beside = file.basis_path();
    if beside.exists() {
        return read(&beside);
    }
    let found = built_in_basis(&file).context(
        "no basis comes with the program for the configured model: make one with `kvasir calibrate`, or name it with --basis",
    )?;
    Ok((found.to_vec(), "built in".to_owned()))
}

/// Writes a recording as a dump of one layer, so that other programs measure on the same arrays.
fn write(made: &Synthetic, folder: &Path) -> Result<()> {
    let (shape, recording) = (made.shape(), made.recording());
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {} (--write)", folder.display()))?;
    for (what, rows) in [("q", recording.q), ("k", recording.keys), ("v", recording.values)] {
        let path = folder.join(format!("L0.{what}"));
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {} (--write)", path.display()))?;
    }
    let meta = Meta {
        model: "none".to_owned(),
        layers: vec![0],
        layers_total: 1,
        rope_theta: shape.theta as f32,
        text: format!("made up, seed {}", shape.seed),
        ..Meta::new(shape.heads, 1, shape.tokens, shape.head_dim)
    };
    let path = meta.write(folder)?;
    say(format_args!("its arrays: {}", path.display()));
    Ok(())
}

/// A file of `shape` halves.
fn halves(path: &Path, shape: [usize; 3]) -> Result<Vec<f16>> {
    let expected = 2 * shape.iter().product::<usize>() as u64;
    let size = std::fs::metadata(path).map(|file| file.len());
    let size = size.with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(
        size == expected,
        "{} has {size} bytes and meta.json says {expected}: dump anew",
        path.display()
    );
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes
        .as_chunks()
        .0
        .iter()
        .map(|pair| f16::from_le_bytes(*pair))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_another_length_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("L0.q");
        std::fs::write(&path, [0, 0x3c, 0, 0xc0]).expect("written");
        let read = halves(&path, [1, 2, 1]).expect("two halves");
        assert_eq!(read, [1.0, -2.0].map(f16::from_f32));
        let error = halves(&path, [1, 3, 1]).expect_err("three are wanted").to_string();
        assert!(error.contains("has 4 bytes and meta.json says 6"), "{error}");
        assert!(halves(&folder.path().join("L1.q"), [1, 1, 1]).is_err());
    }
}
