//! The real binary as a child process.

use std::{
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::process::{Child, Command};

/// Every port free, as assignments.
pub(crate) const ANY_PORTS: [&str; 5] = [
    "store.listen=127.0.0.1:0",
    "store.admin_listen=127.0.0.1:0",
    "worker.listen=127.0.0.1:0",
    "worker.admin_listen=127.0.0.1:0",
    "router.listen=127.0.0.1:0",
];

/// A command line of the binary, apart from this machine's own configuration.
pub(crate) fn kvasir(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasir"));
    command
        .current_dir(folder)
        .env("XDG_CONFIG_HOME", folder)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KVASIR__")) {
        command.env_remove(name);
    }
    command
}

/// Runs to the end; what it said on both streams comes with the status.
pub(crate) async fn run(command: &mut Command) -> Said {
    let Output { status, stdout, stderr } = command.output().await.expect("the binary starts");
    Said {
        status,
        out: String::from_utf8_lossy(&stdout).into_owned(),
        err: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

pub(crate) struct Said {
    pub(crate) status: ExitStatus,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A part, or all of them, that is ready.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) ready: Value,
    /// Where standard output and standard error go.
    folder: PathBuf,
    name: String,
}

impl Running {
    /// Starts `kvasir <part>` with free ports and `assignments`, and waits until it is ready.
    pub(crate) async fn start(folder: &Path, part: &str, assignments: &[&str]) -> Self {
        let name = format!("{part}-{}", unique());
        let file = |suffix: &str| std::fs::File::create(folder.join(format!("{name}.{suffix}"))).expect("a log file");
        let ready_file = folder.join(format!("{name}.json"));
        let mut command = kvasir(folder);
        for assignment in ANY_PORTS.iter().chain(assignments) {
            command.args(["--set", assignment]);
        }
        command
            .arg(part)
            .arg("--ready-file")
            .arg(&ready_file)
            .stdout(file("out"))
            .stderr(file("err"));
        let mut child = command.spawn().expect("the binary starts");
        let begun = Instant::now();
        let ready = loop {
            if let Ok(text) = std::fs::read(&ready_file) {
                break serde_json::from_slice(&text).expect("the ready file is whole");
            }
            let ended = child.try_wait().expect("can be watched");
            let err = || std::fs::read_to_string(folder.join(format!("{name}.err"))).unwrap_or_default();
            assert!(ended.is_none(), "{part} ended while starting: {}", err());
            assert!(
                begun.elapsed() < Duration::from_secs(120),
                "{part} is not ready: {}",
                err()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        Self {
            child,
            ready,
            folder: folder.to_owned(),
            name,
        }
    }

    /// An address out of the ready file, as in `"/store/grpc"`.
    pub(crate) fn url(&self, pointer: &str) -> String {
        self.ready
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_else(|| panic!("{pointer} in {}", self.ready))
            .to_owned()
    }

    pub(crate) fn ready_file(&self) -> PathBuf {
        self.folder.join(format!("{}.json", self.name))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().expect("the process runs")
    }

    /// Sends a signal by name, as in `"TERM"`.
    pub(crate) fn signal(&self, signal: &str) {
        let sent = std::process::Command::new("sh")
            .args(["-c", "kill -\"$0\" \"$1\"", signal, &self.pid().to_string()])
            .status();
        assert!(sent.expect("sh runs").success(), "cannot send {signal}");
    }

    /// Waits for the end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let patience = Duration::from_secs(60);
        let status = tokio::time::timeout(patience, self.child.wait()).await;
        status
            .unwrap_or_else(|_| panic!("still there after {patience:?}: {}", self.err()))
            .expect("can be waited for")
    }

    /// SIGTERM and the exit status.
    pub(crate) async fn stop(mut self) -> ExitStatus {
        self.signal("TERM");
        self.ended().await
    }

    /// SIGKILL, to this child only.
    pub(crate) async fn kill(mut self) {
        self.child.kill().await.expect("can be killed");
    }

    pub(crate) fn out(&self) -> String {
        self.said("out")
    }

    pub(crate) fn err(&self) -> String {
        self.said("err")
    }

    fn said(&self, suffix: &str) -> String {
        std::fs::read_to_string(self.folder.join(format!("{}.{suffix}", self.name))).unwrap_or_default()
    }
}

/// A number that no other process of this test has.
fn unique() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
