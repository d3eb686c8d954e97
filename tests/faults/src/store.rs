//! A real `kvasir store` as a child process: started, killed, started again over the same folder.

use std::{
    fs::OpenOptions,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long a start may take, recovery included; the folders are small.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// What to start, and how.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    /// Where its blocks, its log and its ready file lie.
    pub(crate) folder: PathBuf,
    /// Assignments as for `--set`.
    pub(crate) set: Vec<String>,
    /// What runs it: a program and its arguments, to which the command line is added. Empty for none.
    pub(crate) wrapper: Vec<String>,
    /// Variables of its environment.
    pub(crate) env: Vec<(String, String)>,
}

impl Launch {
    /// A small store in `folder`.
    pub(crate) fn in_folder(folder: &Path) -> Self {
        let set = [
            "store.listen=127.0.0.1:0",
            "store.admin_listen=127.0.0.1:0",
            "store.host_bytes_max=8MiB",
            "store.disk_bytes_max=512MiB",
            "store.segment_bytes=8MiB",
            "store.flush_queue_bytes_max=16MiB",
        ];
        let data_dir = format!("store.data_dir={}", folder.join("data").display());
        Self {
            folder: folder.to_owned(),
            set: set.iter().map(|set| (*set).to_owned()).chain([data_dir]).collect(),
            wrapper: Vec::new(),
            env: planted(),
        }
    }

    /// Bytes that the disk of [`Self::with_bucket`] may have.
    pub(crate) const DISK_WITH_BUCKET: usize = 8 << 20;

    /// A store with a disk of 8 MiB in segments of 1 and a bucket, a folder beside, so that it reclaims and demotes all the time.
    pub(crate) fn with_bucket(folder: &Path) -> Self {
        let mut launch = Self::in_folder(folder);
        let more = [
            "store.host_bytes_max=4MiB".to_owned(),
            format!("store.disk_bytes_max={}", Self::DISK_WITH_BUCKET),
            "store.segment_bytes=1MiB".to_owned(),
            "store.flush_queue_bytes_max=4MiB".to_owned(),
            "store.object_pack_bytes=512KiB".to_owned(),
            "store.object_pack_age_max=50ms".to_owned(),
            format!("store.object_url=file://{}", folder.join("bucket").display()),
        ];
        let key = |set: &str| set.split('=').next().map(str::to_owned);
        launch.set.retain(|set| more.iter().all(|other| key(other) != key(set)));
        launch.set.extend(more);
        launch
    }

    /// Starts it and waits until it is ready; says how long that took.
    pub(crate) fn start(&self) -> Result<StoreProcess> {
        let mut child = self.spawn()?;
        let begun = Instant::now();
        let ready_file = self.ready_file();
        loop {
            if let Ok(text) = std::fs::read(&ready_file)
                && let Ok(ready) = serde_json::from_slice::<Value>(&text)
            {
                // It cannot take the file away when it is killed.
                std::fs::remove_file(&ready_file)?;
                let url = ready.pointer("/store/grpc").and_then(Value::as_str);
                let url = url.context("the ready file names no store")?.to_owned();
                return Ok(StoreProcess {
                    child: child.take(),
                    url,
                    ready_after: begun.elapsed(),
                });
            }
            if let Some(status) = child.ended()? {
                bail!("the store ended while starting ({status}): {}", self.last_words());
            }
            if begun.elapsed() > READY_WITHIN {
                bail!("the store is not ready after {READY_WITHIN:?}: {}", self.last_words());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts it where it may end at any time, also before it is ready.
    pub(crate) fn spawn(&self) -> Result<Guarded> {
        let binary = binary()?;
        let _ = std::fs::remove_file(self.ready_file());
        let log = OpenOptions::new().create(true).append(true).open(self.log())?;
        let mut line = self.wrapper.iter().cloned().chain([binary.display().to_string()]);
        let mut command = Command::new(line.next().unwrap_or_default());
        command.args(line);
        for assignment in &self.set {
            command.args(["--set", assignment]);
        }
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KVASIR__")) {
            command.env_remove(name);
        }
        command
            .arg("store")
            .arg("--ready-file")
            .arg(self.ready_file())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("XDG_CONFIG_HOME", &self.folder)
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = command.spawn().context("cannot start the store")?;
        Ok(Guarded(Some(child)))
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.folder.join("store.log")
    }

    fn ready_file(&self) -> PathBuf {
        self.folder.join("ready.json")
    }

    /// What it said last on standard error.
    pub(crate) fn last_words(&self) -> String {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        last.unwrap_or("it said nothing").to_owned()
    }

    /// Panics in its log so far.
    pub(crate) fn panics(&self) -> u64 {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        text.lines().filter(|line| line.contains("panicked at")).count() as u64
    }
}

/// A child that is killed and reaped when dropped.
#[derive(Debug)]
pub(crate) struct Guarded(Option<Child>);

impl Guarded {
    fn take(&mut self) -> Self {
        Self(self.0.take())
    }

    /// Its status, if it has ended.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.0 {
            Some(child) => child.try_wait().context("cannot watch the store"),
            None => Ok(None),
        }
    }

    /// SIGKILL, and its status.
    pub(crate) fn kill(mut self) -> Result<Option<ExitStatus>> {
        match &mut self.0 {
            Some(child) => {
                // It may have ended by itself meanwhile; then there is nothing to kill.
                let _ = child.kill();
                child.wait().map(Some).context("cannot wait for the store")
            }
            None => Ok(None),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A store that serves.
#[derive(Debug)]
pub(crate) struct StoreProcess {
    pub(crate) child: Guarded,
    pub(crate) url: String,
    pub(crate) ready_after: Duration,
}

impl StoreProcess {
    /// SIGKILL. True if it was still running until then.
    pub(crate) fn kill(mut self) -> Result<bool> {
        let alive = self.child.ended()?.is_none();
        self.child.kill()?;
        Ok(alive)
    }
}

/// The binary: built with the workspace, beside what runs now; `KVASIR_BIN` names another.
fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("KVASIR_BIN").filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("kvasir"))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "no kvasir beside {}: build it with `cargo build -p kvasir`, or name one in KVASIR_BIN",
            own.display()
        )
    })
}

/// Tells a child about the bug that this process has.
#[cfg(feature = "planted-bugs")]
fn planted() -> Vec<(String, String)> {
    use kvasir_block::planted::{Bug, planted};
    let bug = Bug::ALL.iter().find(|bug| planted(**bug));
    bug.map(|bug| ("KVASIR_PLANTED_BUG".to_owned(), bug.name().to_owned()))
        .into_iter()
        .collect()
}

#[cfg(not(feature = "planted-bugs"))]
fn planted() -> Vec<(String, String)> {
    Vec::new()
}
