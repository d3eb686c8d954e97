//! This binary as a child process: what measures or shows a service starts one of its own, apart from any other.

use std::{
    fs::OpenOptions,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use kvasir_runtime::config::ENV_PREFIX;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::ready::Ready;

/// How long the model may take to load.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// How long an orderly end may take: the parts' own graces and a margin.
const STOPPED_WITHIN: Duration = Duration::from_secs(60);

/// What to start.
pub(crate) struct Start<'a> {
    /// `"up"`, `"store"`, ...
    pub(crate) part: &'a str,
    /// Its configuration file.
    pub(crate) config: &'a Path,
    /// Assignments that win over the file.
    pub(crate) set: &'a [String],
    /// Where the ready file comes to lie; must exist.
    pub(crate) folder: &'a Path,
    /// What it says on standard error is appended here.
    pub(crate) log: &'a Path,
}

/// A running service; killed when dropped, so that a caller that fails leaves nothing behind.
pub(crate) struct Service {
    child: Child,
    pub(crate) ready: Ready,
}

impl Service {
    /// Starts the process and waits until all its parts are ready.
    pub(crate) async fn start(start: &Start<'_>) -> Result<Self> {
        let binary = std::env::current_exe().context("cannot find this program's own file")?;
        let ready_file: PathBuf = start.folder.join("ready.json");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(start.log)
            .with_context(|| format!("cannot open the service's log {}", start.log.display()))?;
        let mut command = Command::new(binary);
        command.arg("--config").arg(start.config);
        for assignment in start.set {
            command.arg("--set").arg(assignment);
        }
        // Whatever the user's own service is told by its environment, this one is not it.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with(ENV_PREFIX)) {
            command.env_remove(name);
        }
        command.arg(start.part).arg("--ready-file").arg(&ready_file);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        let mut child = command.spawn().context("cannot start the service")?;
        let begun = Instant::now();
        while !ready_file.exists() {
            if let Some(status) = child.try_wait().context("cannot watch the service")? {
                bail!("the service ended while starting ({status}): {}", last_line(start.log));
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

    /// Its process id, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// SIGTERM; the process must end with success.
    pub(crate) async fn stop(mut self) -> Result<()> {
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
    pub(crate) async fn kill(mut self) -> Result<()> {
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
