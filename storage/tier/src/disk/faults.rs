//! Faults that tests switch on: a full disk, a failing write, a failing sync. In a build without tests nothing is left of them.

use std::io;

#[cfg(test)]
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug, Default)]
pub(crate) struct Faults {
    #[cfg(test)]
    pub(crate) disk_full: AtomicBool,
    #[cfg(test)]
    pub(crate) sync_fails: AtomicBool,
}

impl Faults {
    #[cfg(test)]
    pub(crate) fn check_write(&self) -> io::Result<()> {
        if self.disk_full.load(Ordering::Relaxed) {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    }

    #[cfg(test)]
    pub(crate) fn check_sync(&self) -> io::Result<()> {
        if self.sync_fails.load(Ordering::Relaxed) {
            Err(io::Error::other("injected sync failure"))
        } else {
            Ok(())
        }
    }

    #[cfg(not(test))]
    pub(crate) fn check_write(&self) -> io::Result<()> {
        Ok(())
    }

    #[cfg(not(test))]
    pub(crate) fn check_sync(&self) -> io::Result<()> {
        Ok(())
    }
}
