//! The ready file: where the parts of a started process listen, for whoever started it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What a ready file holds. Parts that the process does not run are `null`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) version: String,
    pub(crate) pid: u32,
    /// Public name of the model.
    pub(crate) model: Option<String>,
    pub(crate) store: Option<Part>,
    pub(crate) worker: Option<Part>,
    /// Base URL of the OpenAI API.
    pub(crate) router: Option<String>,
}

/// Addresses of a store or a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) grpc: String,
    /// Base URL of `/metrics`, `/healthz` and `/readyz`.
    pub(crate) admin: String,
}

impl Part {
    pub(crate) fn new(grpc: SocketAddr, admin: SocketAddr) -> Self {
        Self {
            grpc: url(grpc),
            admin: url(admin),
        }
    }
}

/// The URL under which this machine reaches a bound address.
pub(crate) fn url(mut addr: SocketAddr) -> String {
    if addr.ip().is_unspecified() {
        let loopback = match addr {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        addr.set_ip(loopback);
    }
    format!("http://{addr}")
}

/// A ready file on disk; taken away when dropped, so that it is there exactly while its process serves.
#[derive(Debug)]
pub(crate) struct ReadyFile(PathBuf);

impl ReadyFile {
    /// Takes away what an earlier process may have left.
    pub(crate) fn clear(path: &Path) -> Result<()> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).with_context(|| {
                format!(
                    "cannot remove the old ready file {}: choose another --ready-file",
                    path.display()
                )
            }),
            _ => Ok(()),
        }
    }

    /// Writes the whole file under another name and then renames it: a reader sees all of it or nothing.
    pub(crate) fn write(path: &Path, ready: &Ready) -> Result<Self> {
        let failed = || format!("cannot write {}: choose another --ready-file", path.display());
        let text = serde_json::to_string_pretty(ready).with_context(failed)?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let draft = path.with_file_name(format!(".{}.{}", name.unwrap_or_default(), std::process::id()));
        std::fs::write(&draft, text + "\n").with_context(failed)?;
        std::fs::rename(&draft, path).with_context(failed)?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        let _already_gone = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_urls_that_can_be_reached() {
        let table = [
            ("127.0.0.1:7400", "http://127.0.0.1:7400"),
            ("0.0.0.0:7400", "http://127.0.0.1:7400"),
            ("[::]:7400", "http://[::1]:7400"),
            ("10.0.0.7:7400", "http://10.0.0.7:7400"),
        ];
        for (addr, expected) in table {
            assert_eq!(url(addr.parse().expect("an address")), expected);
        }
    }

    #[test]
    fn the_file_is_there_while_it_is_held() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("ready.json");
        let ready = Ready {
            version: "1".to_owned(),
            pid: 7,
            model: None,
            store: Some(Part {
                grpc: "http://127.0.0.1:1".to_owned(),
                admin: "http://127.0.0.1:2".to_owned(),
            }),
            worker: None,
            router: None,
        };
        std::fs::write(&path, "old").expect("a file");
        ReadyFile::clear(&path).expect("can be removed");
        ReadyFile::clear(&path).expect("nothing to remove is fine");
        let held = ReadyFile::write(&path, &ready).expect("can be written");
        let read: Ready = serde_json::from_slice(&std::fs::read(&path).expect("is there")).expect("is whole");
        assert_eq!(read, ready);
        assert_eq!(
            std::fs::read_dir(folder.path()).expect("a folder").count(),
            1,
            "no draft is left"
        );
        drop(held);
        assert!(!path.exists());
        assert!(ReadyFile::write(&folder.path().join("no/such/folder"), &ready).is_err());
    }
}
