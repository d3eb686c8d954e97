//! The service under demonstration: a child process that is ours to stop and to kill.

use std::{
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use kvasir_runtime::config::ENV_PREFIX;
use serde_json::json;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::{args::ConfigArgs, ready::Ready, tree::Configuration};

/// How long the model may take to load.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// How long an orderly end may take: the parts' own graces and a margin.
const STOPPED_WITHIN: Duration = Duration::from_secs(60);

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
             [router]\nlisten = \"127.0.0.1:0\"\n",
            json!(model),
            json!(data)
        );
        std::fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        Ok(Self {
            data,
            config,
            log,
            set: args.set.clone(),
            block_tokens: configuration.tree().worker.block_tokens,
        })
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Takes the data away; the report and the log stay.
    pub(super) fn clean(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.data) {
            tracing::warn!(path = %self.data.display(), %error, "could not remove the demo's data");
        }
    }
}

/// A running `kvasir up`; killed when dropped, so that a demo that fails leaves nothing behind.
pub(super) struct Service {
    child: Child,
    pub(super) ready: Ready,
}

impl Service {
    /// Starts the process and waits until all its parts are ready.
    pub(super) async fn start(place: &Place) -> Result<Self> {
        let binary = std::env::current_exe().context("cannot find this program's own file")?;
        let ready_file = place.data.join("ready.json");
        std::fs::create_dir_all(&place.data).with_context(|| format!("cannot make {}", place.data.display()))?;
        let log = OpenOptions::new()
            .append(true)
            .open(&place.log)
            .context("cannot open the service's log")?;
        let mut command = Command::new(binary);
        command.arg("--config").arg(&place.config);
        for assignment in &place.set {
            command.arg("--set").arg(assignment);
        }
        // Whatever the user's own service is told by its environment, this one is not it.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with(ENV_PREFIX)) {
            command.env_remove(name);
        }
        command.arg("up").arg("--ready-file").arg(&ready_file);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        let mut child = command.spawn().context("cannot start the service")?;
        let begun = Instant::now();
        while !ready_file.exists() {
            if let Some(status) = child.try_wait().context("cannot watch the service")? {
                bail!("the service ended while starting ({status}): {}", last_line(&place.log));
            }
            if begun.elapsed() > READY_WITHIN {
                bail!("the service was not ready within {READY_WITHIN:?}");
            }
            sleep(Duration::from_millis(10)).await;
        }
        let text = std::fs::read(&ready_file).context("the ready file is gone")?;
        // The process may be killed before it can take the file away, and the next one must not be taken for it.
        std::fs::remove_file(&ready_file).context("cannot remove the ready file")?;
        let ready = serde_json::from_slice(&text).context("the ready file is not as documented")?;
        Ok(Self { child, ready })
    }

    pub(super) fn router(&self) -> &str {
        self.ready.router.as_deref().unwrap_or_default()
    }

    /// SIGTERM; the process must end with success.
    pub(super) async fn stop(mut self) -> Result<()> {
        let pid = self.child.id().context("the service has ended by itself")?.to_string();
        // The standard library sends SIGKILL only; every Unix has this command.
        let sent = Command::new("sh")
            .args(["-c", "kill -TERM \"$0\"", &pid])
            .status()
            .await;
        if !sent.is_ok_and(|status| status.success()) {
            bail!("cannot send SIGTERM to process {pid}");
        }
        match timeout(STOPPED_WITHIN, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => bail!("it ended with {status}"),
            Ok(Err(error)) => Err(error).context("cannot wait for the service"),
            Err(_) => bail!("it did not end within {STOPPED_WITHIN:?} of SIGTERM"),
        }
    }

    /// SIGKILL.
    pub(super) async fn kill(mut self) -> Result<()> {
        self.child.kill().await.context("cannot kill the service")
    }
}

/// What a process that failed said last.
fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it said nothing")
        .to_owned()
}
