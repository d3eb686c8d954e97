//! The Unix socket for processes of this machine, and what they hold of the store's memory.
//!
//! Who connects is known to the kernel: the store's own user, and those of `local_uids`. With the welcome it is passed the arena's
//! descriptor, which maps for reading only; from then on a hit in memory is answered with its place, and no byte of it is copied.
//! The place stays as it is until it is returned or the peer's end of the socket is closed, which the kernel tells also of a process
//! that was killed. There is no time after which it ends, so a reader never looks at other bytes than those it was promised; what
//! bounds it is how much each connection and all of them may hold. Beyond that blocks come over the socket.
//!
//! Requests are those of [`crate::bulk`], and so is the code that answers them.

mod places;

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
};

use anyhow::Context;

pub(crate) use self::places::{Budget, Places};
use crate::StoreConfig;

/// Bytes that the path of a Unix socket may have on Linux, the zero at its end not counted.
const PATH_BYTES_MAX: usize = 107;

/// The listener; its file goes with it.
#[derive(Debug)]
pub(crate) struct LocalListener {
    listener: UnixListener,
    path: String,
}

impl LocalListener {
    /// Binds `store.local_socket`; `None` where there is none to be.
    pub(crate) fn bind(config: &StoreConfig) -> anyhow::Result<Option<Self>> {
        if config.local_socket.as_os_str().is_empty() {
            return Ok(None);
        }
        let path = std::path::absolute(config.data_dir.join(&config.local_socket))?;
        let shown = path.display();
        let text = match path.to_str() {
            Some(text) if text.len() <= PATH_BYTES_MAX => text.to_owned(),
            _ => {
                tracing::warn!(path = %shown, "no local path: a Unix socket's path is text of at most {PATH_BYTES_MAX} bytes, \
                    choose a shorter store.local_socket");
                return Ok(None);
            }
        };
        clear(&path)?;
        let listener =
            UnixListener::bind(&path).with_context(|| format!("cannot listen on store.local_socket = {shown}"))?;
        // Others may knock where some of them are let in; who they are is checked in either case.
        let mode = if config.local_uids.is_empty() { 0o600 } else { 0o666 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .with_context(|| format!("cannot set the mode of store.local_socket = {shown}"))?;
        Ok(Some(Self { listener, path: text }))
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Another handle of it.
    pub(crate) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl AsFd for LocalListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = self.path, %error, "cannot remove the local socket");
        }
    }
}

/// Removes the socket of a store that ended without doing so; nothing else, and not one that is served.
fn clear(path: &Path) -> anyhow::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    let shown = path.display();
    if !found.file_type().is_socket() {
        anyhow::bail!("store.local_socket = {shown} is a file of another kind: choose another path");
    }
    if UnixStream::connect(path).is_ok() {
        anyhow::bail!("store.local_socket = {shown} is served by another process: choose another path");
    }
    fs::remove_file(path).with_context(|| format!("cannot remove the old store.local_socket = {shown}"))
}

/// Whether a user may read the store's memory.
pub(crate) fn may_enter(uid: u32, listed: &[u32]) -> bool {
    uid == rustix::process::geteuid().as_raw() || listed.contains(&uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_user_and_listed_ones_enter() {
        let own = rustix::process::geteuid().as_raw();
        for (uid, listed, expected) in [
            (own, vec![], true),
            (own + 1, vec![], false),
            (own + 1, vec![own + 1], true),
            (own + 2, vec![own + 1], false),
        ] {
            assert_eq!(may_enter(uid, &listed), expected, "{uid} with {listed:?}");
        }
    }

    #[test]
    fn an_old_socket_is_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a folder");
        let config = StoreConfig {
            data_dir: dir.path().to_owned(),
            ..StoreConfig::default()
        };
        let path = dir.path().join(&config.local_socket);
        // Left behind: bound once, served by nobody.
        drop(UnixListener::bind(&path).expect("bound"));
        let bound = LocalListener::bind(&config).expect("bound").expect("a socket");
        let mode = fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = LocalListener::bind(&config).expect_err("in use").to_string();
        assert!(error.contains("is served by another process"), "{error}");
        drop(bound);
        assert!(!path.exists());
        fs::write(&path, "precious").expect("written");
        let error = LocalListener::bind(&config).expect_err("a file").to_string();
        assert!(error.contains("is a file of another kind"), "{error}");
        assert_eq!(fs::read(&path).expect("still there"), b"precious");
        let far = StoreConfig {
            local_socket: "x".repeat(200).into(),
            ..config
        };
        assert!(LocalListener::bind(&far).expect("no error").is_none());
    }
}
