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

use super::{
    metrics::Metrics,
    process::{Resident, processor_time, resident, written_bytes},
};
use crate::{
    args::ConfigArgs,
    child::{Service, Start},
};

/// The store that is wanted.
#[derive(Clone, Copy, Debug)]
pub(in crate::bench) struct Wanted<'a> {
    /// One that runs already, at this URL.
    pub(in crate::bench) running: Option<&'a str>,
    /// Its process.
    pub(in crate::bench) running_pid: Option<u32>,
    /// Folder in which one that is started has its data.
    pub(in crate::bench) out: &'a Path,
    /// Its memory.
    pub(in crate::bench) host_bytes: ByteSize,
    /// Its disk; what is configured if `None`.
    pub(in crate::bench) disk_bytes: Option<ByteSize>,
    /// Whether what the disk gives up goes to objects, in a folder beside it.
    pub(in crate::bench) objects: bool,
    /// Its memory for contexts that are attended to; what is configured if `None`.
    pub(in crate::bench) context_bytes: Option<ByteSize>,
}

/// A store and what is known of its process.
pub(in crate::bench) struct Host {
    url: String,
    pid: Option<u32>,
    /// `None` for a store that was there before.
    own: Option<(Service, PathBuf)>,
    runs: AtomicU64,
}

impl Host {
    /// Takes the store that runs, or starts one.
    pub(in crate::bench) async fn start(wanted: Wanted<'_>, config: &ConfigArgs) -> Result<Self> {
        // Names of blocks differ from run to run: a store that was there before may hold earlier ones.
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let runs = AtomicU64::new(since.as_micros() as u64);
        if let Some(url) = wanted.running {
            return Ok(Self {
                url: url.to_owned(),
                pid: wanted.running_pid,
                own: None,
                runs,
            });
        }
        let data = wanted.out.join(format!("store-{}", std::process::id()));
        std::fs::create_dir_all(&data).with_context(|| format!("cannot make the folder {}", data.display()))?;
        let data = data.canonicalize().context("cannot find the folder just made")?;
        let file = data.join("kvasir.toml");
        // JSON's strings are TOML's.
        let mut text = format!(
            "# Written by `kvasir bench`.\n[store]\ndata_dir = {}\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n\
             host_bytes_max = \"{}\"\n",
            json!(data.join("blocks")),
            wanted.host_bytes,
        );
        if let Some(disk_bytes) = wanted.disk_bytes {
            text += &format!("disk_bytes_max = \"{disk_bytes}\"\n");
        }
        if let Some(context_bytes) = wanted.context_bytes {
            text += &format!("context_bytes_max = \"{context_bytes}\"\n");
        }
        if wanted.objects {
            let folder = data.join("objects");
            std::fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            // Small segments, so that the disk gives up a small part at a time.
            text += &format!(
                "segment_bytes = \"32MiB\"\nobject_url = {}\n",
                json!(format!("file://{}", folder.display()))
            );
        }
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let service = Service::start(&Start {
            part: "store",
            config: &file,
            set: &config.set,
            folder: &data,
            log: &data.join("store.log"),
        })
        .await?;
        let store = service.ready.store.as_ref().context("the child runs no store")?;
        Ok(Self {
            url: store.grpc.clone(),
            pid: service.pid(),
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

    /// Processor time so far of this process and of the store, where its process is known.
    pub(in crate::bench) fn processor_times(&self) -> (Option<Duration>, Option<Duration>) {
        (processor_time(std::process::id()), self.pid.and_then(processor_time))
    }

    /// What the store has resident now, where its process is known.
    pub(in crate::bench) fn resident(&self) -> Option<Resident> {
        self.pid.and_then(resident)
    }

    /// Bytes that the store has written to disks so far, where its process is known.
    pub(in crate::bench) fn written_bytes(&self) -> Option<u64> {
        self.pid.and_then(written_bytes)
    }

    /// The numbers that a store of our own publishes; they are up to a second old. `None` for one that was there before.
    pub(in crate::bench) async fn metrics(&self) -> Result<Option<Metrics>> {
        let admin = self.own.as_ref().and_then(|(service, _)| service.ready.store.as_ref());
        match admin {
            Some(store) => Metrics::of(&store.admin).await.map(Some),
            None => Ok(None),
        }
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
