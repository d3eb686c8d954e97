//! The epoch: a number that no earlier life of this folder had, nor, in practice, a folder that was here before it.

use std::{
    fs, io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use kvasir_block::planted::{Bug, planted};

use crate::{CacheError, ErrorKind, small_file::write_durably};

/// The next epoch, written down: milliseconds since 1970, or one more than last time where the clock went back.
pub(super) fn next(path: &Path) -> Result<u64, CacheError> {
    let failed = |error: io::Error| {
        CacheError::because(
            ErrorKind::Disk,
            format!("cannot keep the epoch in {}: {error}", path.display()),
            error,
        )
    };
    let last = match fs::read_to_string(path) {
        Ok(text) => text.trim().parse::<u64>().unwrap_or_else(|_| {
            tracing::warn!(file = %path.display(), "the epoch cannot be read, going by the clock");
            0
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        // Not text: damaged like any other unreadable number.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => 0,
        Err(error) => return Err(failed(error)),
    };
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64);
    let epoch = if planted(Bug::EpochReused) && last > 0 {
        last
    } else {
        clock.max(last.saturating_add(1))
    };
    write_durably(path, format!("{epoch}\n").as_bytes()).map_err(failed)?;
    Ok(epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_whatever_the_clock_says_and_survives_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("epoch");
        let first = next(&path).unwrap();
        assert!(first > 1_600_000_000_000, "milliseconds since 1970");
        assert!(next(&path).unwrap() > first);
        let future = 1u64 << 60;
        fs::write(&path, format!("{future}\n")).unwrap();
        assert_eq!(next(&path).unwrap(), future + 1);
        for damage in [&b"nonsense"[..], b"", b"\xFF\xFE"] {
            fs::write(&path, damage).unwrap();
            assert!(next(&path).unwrap() >= first);
        }
    }
}
