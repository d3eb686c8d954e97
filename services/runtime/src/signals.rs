//! Ctrl-C and SIGTERM ask for an orderly end; asking twice ends at once.

use tokio_util::sync::CancellationToken;

/// The exit status after a second signal, as a shell reports a process that Ctrl-C ended.
const IMPATIENT_EXIT: i32 = 130;

/// Waits for Ctrl-C or SIGTERM and then cancels `token`. A second signal leaves the process at once: what was pushed but
/// not yet synced is lost, which costs time and never a wrong byte.
///
/// Must be called within a tokio runtime. Fails where the operating system refuses a signal handler.
pub fn cancel_on_signals(token: CancellationToken) -> std::io::Result<()> {
    let mut signals = Signals::install()?;
    tokio::spawn(async move {
        let first = signals.next().await;
        tracing::info!(signal = first, "stopping, send the signal again to leave at once");
        token.cancel();
        let second = signals.next().await;
        tracing::warn!(signal = second, "leaving without waiting");
        std::process::exit(IMPATIENT_EXIT);
    });
    Ok(())
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn install() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn install() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> &'static str {
        let _no_handler = tokio::signal::ctrl_c().await;
        "Ctrl-C"
    }
}
