//! Row 8: the disk is full. The store stays up, serves from memory, and writes again by itself once there is space.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kvasir_block::Checksum;
use kvasir_cache::{BlockCache, CacheConfig, PutOutcome};
use rand::Rng;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Read},
    run::Skipped,
};

/// Size of the file system.
const DISK_MIB: u64 = 96;
/// 256 layer blocks of 32 KiB: 8 MiB a round.
const BLOCKS: usize = 128;
const LAYERS: u16 = 2;
/// How soon it must write again.
const BACK_WITHIN: Duration = Duration::from_secs(10);

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    let disk = LoopDisk::mount()?;
    run.rounds(|run, round| {
        let dir = disk.path().join(format!("store-{round}"));
        let folder_rounds = run.plan.count.saturating_sub(run.tally.faults).min(10);
        one_store(run, &dir, disk.path(), folder_rounds)?;
        Ok(fs::remove_dir_all(&dir)?)
    })
}

fn one_store(run: &mut Run, dir: &Path, mount: &Path, rounds: u64) -> Result<()> {
    let config = CacheConfig {
        // More than there is: the file system says no before the limit does.
        disk_bytes_max: 4 << 30,
        host_bytes_max: 16 << 20,
        ..data::config(dir)
    };
    let first = Corpus::new("space", &schema(LAYERS, 32 << 10), run.rng.random(), BLOCKS / 4);
    let cache = data::open(config.clone(), &[&first])?;
    data::put(&cache, &first, first.keys())?;
    let mut last = first.clone();
    for _ in 0..rounds {
        let corpus = Corpus::new("space", &first.schema, run.rng.random(), BLOCKS);
        let ballast = Ballast::fill(mount, run.rng.random_range(0..4 << 20))?;
        let full = put_until_full(run, &cache, &corpus)?;
        run.tally.note("rounds that met a full disk", u64::from(full));
        run.tally.faults += 1;
        // What is in memory is served as ever.
        for key in corpus.keys().chain(first.keys()) {
            let corpus = if first.chain.contains(&key.hash) {
                &first
            } else {
                &corpus
            };
            data::read(&mut run.tally, &cache, corpus, key)?;
        }
        drop(ballast);
        let freed = Instant::now();
        while let Err(error) = cache.flush() {
            ensure!(
                freed.elapsed() < BACK_WITHIN,
                "no write {BACK_WITHIN:?} after space came back: {error}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        run.note_longest("longest until it wrote again, ms", freed.elapsed());
        let after = Corpus::new("space", &first.schema, run.rng.random(), 4);
        data::put(&cache, &after, after.keys())?;
        for key in after.keys() {
            let got = data::read(&mut run.tally, &cache, &after, key)?;
            ensure!(
                matches!(got, Read::Hit(_) | Read::Wrong),
                "{key:?} was synced and came to {got:?}"
            );
        }
        last = after;
    }
    ensure!(
        run.tally
            .notes
            .get("rounds that met a full disk")
            .is_some_and(|full| *full > 0),
        "the disk was never full"
    );
    cache.close()?;
    // The youngest of it is there in the next life.
    let cache = data::open(config, &[&last])?;
    for key in last.keys() {
        let got = data::read(&mut run.tally, &cache, &last, key)?;
        ensure!(
            matches!(got, Read::Hit(_) | Read::Wrong),
            "{key:?} was synced last and came to {got:?}"
        );
    }
    cache.close()?;
    Ok(())
}

/// Puts everything, whatever becomes of it; true if the disk was full.
fn put_until_full(run: &mut Run, cache: &BlockCache, corpus: &Corpus) -> Result<bool> {
    for key in corpus.keys() {
        let payload = corpus.payload(key);
        let outcome = cache.put(key, payload.clone(), Checksum::of(&payload))?;
        match outcome {
            PutOutcome::Stored | PutOutcome::Present => {}
            PutOutcome::Busy => run.tally.shed += 1,
            PutOutcome::ChecksumMismatch => anyhow::bail!("{key:?}: {outcome:?}"),
        }
    }
    // Either all of it found room, old segments having given way, or the tier says that it is degraded.
    Ok(cache.flush().is_err() || cache.stats().disk.failures > 0 || cache.stats().disk.reclaimed_segments > 0)
}

/// A file that leaves only so much of a file system free; its space comes back when dropped.
struct Ballast(PathBuf);

impl Ballast {
    fn fill(mount: &Path, leave: u64) -> Result<Self> {
        let path = mount.join("ballast");
        let output = Command::new("df")
            .arg("--output=avail")
            .arg("-B1")
            .arg(mount)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let free: u64 = text
            .lines()
            .nth(1)
            .and_then(|line| line.trim().parse().ok())
            .context("df says nothing")?;
        let bytes = free.saturating_sub(leave);
        let made = Command::new("fallocate")
            .arg("-l")
            .arg(bytes.max(1).to_string())
            .arg(&path)
            .status()?;
        ensure!(made.success(), "cannot fill the disk with {bytes} bytes");
        Ok(Self(path))
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A small ext4 in a file; unmounted when dropped.
struct LoopDisk {
    mount: PathBuf,
    _folder: tempfile::TempDir,
}

impl LoopDisk {
    fn mount() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (image, mount) = (folder.path().join("disk.img"), folder.path().join("mount"));
        fs::create_dir(&mount)?;
        fs::File::create(&image)?.set_len(DISK_MIB << 20)?;
        let step = |program: &str, args: &[&std::ffi::OsStr]| -> Result<()> {
            let said = Command::new(program).args(args).output();
            match said {
                Ok(output) if output.status.success() => Ok(()),
                Ok(output) => Err(Skipped(format!(
                    "{program} is refused here, and a full disk needs one: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                ))
                .into()),
                Err(error) => Err(Skipped(format!("{program} cannot be run: {error}")).into()),
            }
        };
        step("mkfs.ext4", &["-q".as_ref(), "-m0".as_ref(), image.as_os_str()])?;
        step(
            "mount",
            &["-o".as_ref(), "loop".as_ref(), image.as_os_str(), mount.as_os_str()],
        )?;
        Ok(Self { mount, _folder: folder })
    }

    fn path(&self) -> &Path {
        &self.mount
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mount).status();
    }
}
