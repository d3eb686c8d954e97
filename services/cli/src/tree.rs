//! The configuration of every part in one tree, and the values that follow from others.
//!
//! A value that nobody set may follow from one that somebody did: the store's folder from `up.data_dir`, a worker's
//! `store_url` from the store that runs in the same process. All such relations are here and nowhere else; one that was set
//! is never overruled.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::Result;
use kvasir_router::RouterConfig;
use kvasir_runtime::{
    config::{Loaded, Loader, Source},
    telemetry::LogConfig,
};
use kvasir_store::StoreConfig;
use kvasir_worker::{DeviceKind, WorkerConfig};
use serde::{Deserialize, Serialize};

use crate::{args::ConfigArgs, ready::url};

/// The model that deploy/bootstrap.sh puts into the cache folder.
pub(crate) const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The whole tree: one section per part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Tree {
    /// What is logged and how.
    pub(crate) log: LogConfig,
    /// Which model is served.
    pub(crate) model: ModelConfig,
    /// Where a process keeps its data.
    pub(crate) up: UpConfig,
    pub(crate) store: StoreConfig,
    pub(crate) worker: WorkerConfig,
    pub(crate) router: RouterConfig,
}

/// `[model]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ModelConfig {
    /// A GGUF file of architecture `llama`, for the worker and the router.
    pub(crate) path: PathBuf,
}

/// `[up]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct UpConfig {
    /// The one folder that everything durable lies under; made when missing.
    pub(crate) data_dir: PathBuf,
}

impl Default for UpConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("./kvasir-data"),
        }
    }
}

/// A checked tree with what follows from it.
#[derive(Clone, Debug)]
pub(crate) struct Configuration {
    loaded: Loaded<Tree>,
    /// Keys nobody set whose value follows from another key, and from which.
    derived: Vec<(&'static str, &'static str)>,
}

impl Configuration {
    /// Reads files, environment and flags, and checks them.
    pub(crate) fn load(args: &ConfigArgs) -> Result<Self> {
        let variables =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let mut loader = match &args.config {
            Some(path) => Loader::new().file(path),
            None => {
                let of_the_user = user_folder("XDG_CONFIG_HOME", ".config").join("kvasir/kvasir.toml");
                Loader::new()
                    .file_if_present(&of_the_user)
                    .file_if_present(Path::new("kvasir.toml"))
            }
        };
        loader = loader.environment(variables);
        if let Some(folder) = &args.data_dir {
            loader = loader.flag("--data-dir", "up.data_dir", folder.display());
        }
        if let Some(path) = &args.model {
            loader = loader.flag("--model", "model.path", path.display());
        }
        if let Some(device) = &args.device {
            loader = loader.flag("--device", "worker.device", device);
        }
        if let Some(bytes) = &args.gpu_memory {
            loader = loader.flag("--gpu-memory", "worker.kv_bytes_max", bytes);
        }
        for assignment in &args.set {
            loader = loader.set(assignment);
        }
        let defaults = Tree {
            model: ModelConfig {
                path: cache_folder().join("models").join(MODEL_FILE),
            },
            ..Tree::default()
        };
        Ok(Self::derive(loader.load(defaults)?))
    }

    fn derive(mut loaded: Loaded<Tree>) -> Self {
        let mut derived = Vec::new();
        if loaded.source("store.data_dir") == Source::Default {
            loaded.tree.store.data_dir = loaded.tree.up.data_dir.join("store");
            derived.push(("store.data_dir", "up.data_dir"));
        }
        if loaded.source("worker.gpu.kernels_dir") == Source::Default {
            loaded.tree.worker.gpu.kernels_dir = loaded.tree.up.data_dir.join("kernels");
            derived.push(("worker.gpu.kernels_dir", "up.data_dir"));
        }
        if loaded.tree.worker.device == DeviceKind::Gpu {
            let [step_tokens, streams, queue] = [
                "worker.step_tokens_max",
                "worker.offload_streams",
                "worker.offload_queue_bytes_max",
            ]
            .map(|key| loaded.source(key) == Source::Default);
            let worker = &mut loaded.tree.worker;
            if step_tokens {
                worker.step_tokens_max = worker.device.step_tokens();
                derived.push(("worker.step_tokens_max", "worker.device"));
            }
            if streams {
                worker.offload_streams = worker.device.offload_streams();
                derived.push(("worker.offload_streams", "worker.device"));
            }
            if queue {
                worker.offload_queue_bytes_max = worker.gpu.queue_bytes();
                derived.push(("worker.offload_queue_bytes_max", "worker.gpu.pinned_bytes"));
            }
        }
        if loaded.source("router.block_tokens") == Source::Default {
            loaded.tree.router.block_tokens = loaded.tree.worker.block_tokens;
            derived.push(("router.block_tokens", "worker.block_tokens"));
        }
        Self { loaded, derived }
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.loaded.tree
    }

    pub(crate) fn loaded(&self) -> &Loaded<Tree> {
        &self.loaded
    }

    /// The key that an unset `key` follows from.
    pub(crate) fn derived_from(&self, key: &str) -> Option<&'static str> {
        self.derived
            .iter()
            .find(|(derived, _)| *derived == key)
            .map(|(_, from)| *from)
    }

    /// The worker's configuration beside a store at `store`, where this process runs one.
    pub(crate) fn worker(&self, store: Option<SocketAddr>) -> WorkerConfig {
        let mut config = self.loaded.tree.worker.clone();
        if let Some(store) = store.filter(|_| self.unset("worker.store_url")) {
            config.store_url = url(store);
        }
        config
    }

    /// The router's configuration beside a store and a worker, where this process runs them.
    pub(crate) fn router(&self, store: Option<SocketAddr>, worker: Option<SocketAddr>) -> RouterConfig {
        let mut config = self.loaded.tree.router.clone();
        if let Some(store) = store.filter(|_| self.unset("router.store_url")) {
            config.store_url = url(store);
        }
        if let Some(worker) = worker.filter(|_| self.unset("router.workers")) {
            config.workers = vec![url(worker)];
        }
        config
    }

    fn unset(&self, key: &str) -> bool {
        self.loaded.source(key) == Source::Default
    }
}

/// Where deploy/bootstrap.sh keeps the model and the Python environments.
pub(crate) fn cache_folder() -> PathBuf {
    user_folder("XDG_CACHE_HOME", ".cache").join("kvasir")
}

/// A folder of the user by the XDG rule: the variable if it names one, else a folder in the home folder.
fn user_folder(variable: &str, in_home: &str) -> PathBuf {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set(variable).unwrap_or_else(|| set("HOME").unwrap_or_default().join(in_home))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(assignments: &[&str]) -> Configuration {
        let loader = assignments
            .iter()
            .fold(Loader::new(), |loader, assignment| loader.set(assignment));
        Configuration::derive(loader.load(Tree::default()).unwrap_or_else(|error| panic!("{error}")))
    }

    #[test]
    fn unset_values_follow_and_set_ones_stay() {
        let addr = |port: u16| Some(SocketAddr::from(([127, 0, 0, 1], port)));
        let plain = load(&["up.data_dir=/srv/kvasir", "worker.block_tokens=32"]);
        assert_eq!(plain.tree().store.data_dir, Path::new("/srv/kvasir/store"));
        assert_eq!(plain.tree().router.block_tokens, 32);
        assert_eq!(plain.derived_from("store.data_dir"), Some("up.data_dir"));
        assert_eq!(plain.worker(addr(9)).store_url, "http://127.0.0.1:9");
        assert_eq!(plain.worker(None).store_url, WorkerConfig::default().store_url);
        let router = plain.router(addr(9), addr(8));
        assert_eq!(
            (router.store_url.as_str(), &router.workers[..]),
            ("http://127.0.0.1:9", &["http://127.0.0.1:8".to_owned()][..])
        );

        let told = load(&[
            "store.data_dir=/fast/store",
            "router.block_tokens=16",
            "worker.store_url=http://10.0.0.1:1",
            "router.store_url=http://10.0.0.1:2",
            "router.workers=[\"http://10.0.0.1:3\"]",
        ]);
        assert_eq!(told.tree().store.data_dir, Path::new("/fast/store"));
        assert_eq!(told.derived_from("store.data_dir"), None);
        assert_eq!(told.tree().router.block_tokens, 16);
        assert_eq!(told.worker(addr(9)).store_url, "http://10.0.0.1:1");
        let router = told.router(addr(9), addr(8));
        assert_eq!(router.store_url, "http://10.0.0.1:2");
        assert_eq!(router.workers, ["http://10.0.0.1:3"]);
    }
    #[test]
    fn a_gpu_has_defaults_of_its_own() {
        let of = |configuration: &Configuration| {
            let worker = &configuration.tree().worker;
            let queue = worker.offload_queue_bytes_max;
            (worker.step_tokens_max, worker.offload_streams, queue.as_u64() >> 20)
        };
        assert_eq!(of(&load(&[])), (256, 1, 256));
        assert_eq!(of(&load(&["worker.device=gpu"])), (2048, 4, 1536));
        let small = load(&["worker.device=gpu", "worker.gpu.pinned_bytes=512MiB"]);
        assert_eq!(of(&small), (2048, 4, 384), "what is queued lies in page-locked memory");
        assert_eq!(
            small.derived_from("worker.offload_queue_bytes_max"),
            Some("worker.gpu.pinned_bytes")
        );
        small.tree().worker.validate().expect("fits together");
        let told = load(&[
            "worker.device=gpu",
            "worker.offload_queue_bytes_max=1GiB",
            "worker.offload_streams=2",
        ]);
        assert_eq!(of(&told), (2048, 2, 1024));
    }
}
