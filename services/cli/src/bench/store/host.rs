//! The store under load: a child of ours, or one that runs already.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use kvasir_block::Tenant;
use kvasir_runtime::units::ByteSize;
use serde_json::json;

use super::processor_time;
use crate::{
    args::ConfigArgs,
    child::{Service, Start},
};

/// A store and what is known of its process.
pub(in crate::bench) struct Host {
    url: String,
    /// `None` for a store that was there before.
    own: Option<(Service, PathBuf)>,
    runs: AtomicU64,
}

impl Host {
    /// Takes the store at `running`, or starts one in `out` with `host_bytes` of memory.
    pub(in crate::bench) async fn start(
        running: Option<&str>,
        out: &Path,
        host_bytes: ByteSize,
        config: &ConfigArgs,
    ) -> Result<Self> {
        // Names of blocks differ from run to run: a store that was there before may hold earlier ones.
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let runs = AtomicU64::new(since.as_micros() as u64);
        if let Some(url) = running {
            return Ok(Self {
                url: url.to_owned(),
                own: None,
                runs,
            });
        }
        let data = out.join(format!("store-{}", std::process::id()));
        std::fs::create_dir_all(&data).with_context(|| format!("cannot make the folder {}", data.display()))?;
        let data = data.canonicalize().context("cannot find the folder just made")?;
        let file = data.join("kvasir.toml");
        // JSON's strings are TOML's.
        let text = format!(
            "# Written by `kvasir bench`.\n[store]\ndata_dir = {}\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n\
             host_bytes_max = \"{host_bytes}\"\n",
            json!(data.join("blocks"))
        );
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let service = Service::start(&Start {
            part: "store",
            config: &file,
            set: &config.set,
            folder: &data,
            log: &data.join("store.log"),
        })
        .await?;
        let url = service
            .ready
            .store
            .as_ref()
            .context("the child runs no store")?
            .grpc
            .clone();
        Ok(Self {
            url,
            own: Some((service, data)),
            runs,
        })
    }

    pub(in crate::bench) fn url(&self) -> &str {
        &self.url
    }

    pub(in crate::bench) fn tenant(&self) -> Result<Tenant> {
        Tenant::new("bench").context("a tenant has a name")
    }

    /// A number that no data set had before.
    pub(in crate::bench) fn next_run(&self) -> u64 {
        self.runs.fetch_add(1, Ordering::Relaxed)
    }

    /// Processor time so far of this process and of the store, where it is ours.
    pub(in crate::bench) fn processor_times(&self) -> (Option<Duration>, Option<Duration>) {
        let store = self
            .own
            .as_ref()
            .and_then(|(service, _)| processor_time(service.pid()?));
        (processor_time(std::process::id()), store)
    }

    /// Stops a store of our own and removes its data.
    pub(in crate::bench) async fn stop(self) -> Result<()> {
        let Some((service, data)) = self.own else {
            return Ok(());
        };
        service.stop().await.context("the store did not stop in good order")?;
        std::fs::remove_dir_all(&data).with_context(|| format!("cannot remove {}", data.display()))
    }
}
