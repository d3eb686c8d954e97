//! Row 20: too little memory. At the bound that it was configured for a store is not killed; below it the kernel may kill it, and
//! it comes back as from any kill.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rand::Rng;

use super::kill::{Ledger, check, load};
use crate::{
    Run, Tally,
    corpus::{Corpus, schema},
    remote::{Remote, block_on},
    run::Skipped,
    store::Launch,
};

/// What the small store of [`Launch::in_folder`] may take: 8 MiB of blocks, 16 MiB of queue, 64 MiB of put messages, the index and
/// the program.
const ENOUGH_MIB: u64 = 256;
/// Not enough for the program and its queues.
const TOO_LITTLE_MIB: u64 = 20;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(|run, _| block_on(one_folder(run)))
}

async fn one_folder(run: &mut Run) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut launch = Launch::in_folder(folder.path());
    let corpus = Corpus::new("pressure", &schema(2, 16 << 10), run.rng.random(), 0);
    let mut ledger = Ledger::default();
    for limit in [ENOUGH_MIB, TOO_LITTLE_MIB, ENOUGH_MIB] {
        // One for each life: what the last one left in the page cache is not this one's.
        let group = Group::make(limit)?;
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", group.0.display());
        launch.wrapper = vec!["sh".to_owned(), "-c".to_owned(), enter];
        run.tally.faults += 1;
        let mut store = match launch.start() {
            Ok(store) => store,
            // Killed before it could serve.
            Err(_) if limit == TOO_LITTLE_MIB => {
                run.tally.note("killed while starting", 1);
                continue;
            }
            Err(error) => return Err(error),
        };
        run.note_longest("longest start, ms", store.ready_after);
        let remote = Remote::connect(&store.url, &corpus).await;
        let mut during = Tally::default();
        let seed = run.rng.random();
        let ended = match &remote {
            Ok(remote) => {
                if limit == ENOUGH_MIB {
                    check(run, remote, &corpus, &ledger).await?;
                }
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis(800)) => None,
                    error = load(remote, &corpus, &mut ledger, &mut during, seed) => Some(error),
                }
            }
            Err(_) => None,
        };
        run.tally.absorb(during);
        if limit == ENOUGH_MIB {
            ensure!(ended.is_none(), "a call failed within {limit} MiB: {ended:?}");
            ensure!(
                store.child.ended()?.is_none(),
                "the store was ended within {limit} MiB: {}",
                launch.last_words()
            );
        } else {
            run.tally
                .note("killed by the kernel", u64::from(store.child.ended()?.is_some()));
        }
        store.kill()?;
        ledger.bury();
    }
    // A panic for want of memory would be ours; a kill is the kernel's.
    run.tally.deaths += launch.panics();
    Ok(())
}

/// A control group of ours; removed when dropped.
struct Group(PathBuf);

impl Group {
    fn make(mib: u64) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let root = Path::new("/sys/fs/cgroup/memory");
        if !root.join("memory.limit_in_bytes").exists() {
            return Err(Skipped("there is no memory controller of the first kind here".to_owned()).into());
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("kvasir-faults-{}-{number}", std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            return Err(Skipped(format!("control groups are refused here: {error}")).into());
        }
        let group = Self(path);
        let file = group.0.join("memory.limit_in_bytes");
        fs::write(&file, (mib << 20).to_string()).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
