//! Where the service under demonstration lives: its folder, its settings and its log.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    args::ConfigArgs,
    child::{Service, Start},
    tree::Configuration,
};

/// Folders and settings that all processes of one demo share.
pub(super) struct Place {
    /// Everything of this run; the report and the log lie beside it.
    data: PathBuf,
    config: PathBuf,
    log: PathBuf,
    /// Assignments that the user gave; they win over the demo's own.
    set: Vec<String>,
    pub(super) block_tokens: u16,
}

impl Place {
    /// Makes the folder and writes the configuration: the model that was asked for, free ports, data apart from any other.
    pub(super) fn make(out: &Path, configuration: &Configuration, args: &ConfigArgs) -> Result<Self> {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make the folder {}", out.display()))?;
        // The child may stand in another folder, and paths of its own would then mean others.
        let out = out
            .canonicalize()
            .with_context(|| format!("cannot find the folder {}", out.display()))?;
        let data = out.join(format!("data-{}", std::process::id()));
        let config = out.join("kvasir.toml");
        let log = out.join("service.log");
        let model = &configuration.tree().model.path;
        let model = model.canonicalize().unwrap_or_else(|_| model.clone());
        // JSON's strings are TOML's.
        let text = format!(
            "# Written by `kvasir demo`.\n[model]\npath = {}\n\n[up]\ndata_dir = {}\n\n[store]\nlisten = \"127.0.0.1:0\"\n\
             admin_listen = \"127.0.0.1:0\"\n\n[worker]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n\n\
             [worker.gpu]\nkernels_dir = {}\n\n[router]\nlisten = \"127.0.0.1:0\"\n",
            json!(model),
            json!(data),
            // Kept for the next demo: compiling them takes longer than all the rest.
            json!(out.join("kernels"))
        );
        std::fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let device = args.device.iter().map(|device| format!("worker.device={device}"));
        let memory = args
            .gpu_memory
            .iter()
            .map(|bytes| format!("worker.kv_bytes_max={bytes}"));
        File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        Ok(Self {
            data,
            config,
            log,
            set: device.chain(memory).chain(args.set.iter().cloned()).collect(),
            block_tokens: configuration.tree().worker.block_tokens,
        })
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Starts `kvasir up` here and waits until all its parts are ready.
    pub(super) async fn start(&self) -> Result<Service> {
        std::fs::create_dir_all(&self.data).with_context(|| format!("cannot make {}", self.data.display()))?;
        Service::start(&Start {
            part: "up",
            config: &self.config,
            set: &self.set,
            folder: &self.data,
            log: &self.log,
        })
        .await
    }

    /// Takes the data away; the report and the log stay.
    pub(super) fn clean(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.data) {
            tracing::warn!(path = %self.data.display(), %error, "could not remove the demo's data");
        }
    }
}
