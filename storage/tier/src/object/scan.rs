//! Finding: listing namespaces and reading the manifests of packs that are new, from whichever store; removing packs of
//! this store that are too old.
//!
//! One namespace at a time, each when it is opened, when asked for, and every interval. A listing that fails changes
//! nothing; one that reaches the end also says which packs are gone.

use std::{collections::HashMap, sync::Arc, time::Instant};

use futures::StreamExt as _;
use kvasir_block::NamespaceId;
use tokio::{sync::watch, time::timeout};

use super::{
    Shared,
    bucket::{Listed, Met, Unmade},
    format::{HEADER_BYTES, PACK_BYTES_MAX, decode_tail},
    upload,
};

/// Listed objects looked at under one lock.
const BATCH: usize = 1000;
/// Most manifests read in one scan; the newest first, the others at the next scan.
const MANIFESTS_MAX: usize = 4096;
/// Manifests read at a time.
const MANIFESTS_AT_ONCE: usize = 4;

/// Scans until the stop.
pub(super) async fn run(shared: &Arc<Shared>, mut stop: watch::Receiver<bool>) {
    tokio::select! {
        _ = stop.wait_for(|stop| *stop) => {}
        () = forever(shared) => {}
    }
}

async fn forever(shared: &Shared) {
    let config = &shared.config;
    let retry = config.scan_interval.min(config.breaker.pause);
    // A store that never writes has nothing to remove.
    let mut knows_own = config.read_only;
    let mut due: HashMap<NamespaceId, Instant> = HashMap::new();
    loop {
        knows_own = knows_own || find_own(shared).await.is_ok();
        let namespaces = shared.state.lock().catalog.namespaces();
        for namespace in namespaces {
            let requested = match shared.state.lock().catalog.scans(namespace) {
                Some(scans) if scans.requested > scans.done => scans.requested,
                Some(scans) if due.get(&namespace).is_none_or(|due| *due <= Instant::now()) => scans.done,
                _ => continue,
            };
            let complete = scan(shared, namespace).await.unwrap_or(false);
            due.insert(
                namespace,
                Instant::now() + if complete { config.scan_interval } else { retry },
            );
            if let Some(scans) = shared.state.lock().catalog.scans(namespace) {
                (scans.done, scans.complete) = (requested, complete);
            }
            shared.progress.notify_all();
        }
        remove_aged(shared).await;
        let next = due.values().min().map_or(config.scan_interval, |due| {
            due.saturating_duration_since(Instant::now())
        });
        let _ = timeout(if knows_own { next } else { next.min(retry) }, shared.look.notified()).await;
    }
}

/// What this store wrote before it was started, in every namespace: the limit counts it.
async fn find_own(shared: &Shared) -> Result<(), Unmade> {
    shared
        .bucket
        .list(None, |met| {
            if let Met::Pack(listed) = met
                && listed.name.store == shared.config.store
            {
                shared.state.lock().catalog.wrote(&listed);
            }
        })
        .await
}

/// Lists a namespace and reads what is new. True if all of it is known now, as far as the bounds allow.
async fn scan(shared: &Shared, namespace: NamespaceId) -> Result<bool, Unmade> {
    shared.state.lock().catalog.begin_scan(namespace);
    let (mut batch, mut unknown, mut foreign) = (Vec::new(), Vec::new(), 0);
    let mut is_cut = false;
    let mut look = |batch: &mut Vec<Listed>, unknown: &mut Vec<Listed>| {
        unknown.extend(shared.state.lock().catalog.listed(namespace, batch));
        batch.clear();
        if unknown.len() > 2 * MANIFESTS_MAX {
            is_cut |= keep_newest(unknown);
        }
    };
    shared
        .bucket
        .list(Some(namespace), |met| match met {
            Met::Pack(listed) if listed.namespace == namespace => {
                batch.push(listed);
                if batch.len() >= BATCH {
                    look(&mut batch, &mut unknown);
                }
            }
            _ => foreign += 1,
        })
        .await?;
    look(&mut batch, &mut unknown);
    is_cut |= keep_newest(&mut unknown);
    {
        let mut state = shared.state.lock();
        let gone = state.catalog.end_scan(namespace);
        state.counts.vanished_objects += gone;
        state.counts.foreign_objects += foreign;
        state.counts.scans += 1;
    }
    let reads = futures::stream::iter(unknown).map(|listed| read_manifest(shared, listed));
    let all_read = reads
        .buffer_unordered(MANIFESTS_AT_ONCE)
        .fold(true, async |all, read| all & read.is_ok())
        .await;
    Ok(all_read && !is_cut)
}

/// Newest first, and no more than a scan reads; true if some were left out.
fn keep_newest(unknown: &mut Vec<Listed>) -> bool {
    unknown.sort_by_key(|listed| std::cmp::Reverse((listed.modified_ms, listed.name.sequence)));
    let is_cut = unknown.len() > MANIFESTS_MAX;
    unknown.truncate(MANIFESTS_MAX);
    is_cut
}

async fn read_manifest(shared: &Shared, listed: Listed) -> Result<(), Unmade> {
    if !shared.state.lock().catalog.would_learn(&listed) {
        shared.state.lock().counts.unread_manifests += 1;
        return Ok(());
    }
    let (namespace, name, tail_bytes) = (listed.namespace, &listed.name, listed.name.tail_bytes());
    // Sizes are checked before anything is read, and so before memory is taken for it.
    let tail = if (HEADER_BYTES as u64 + tail_bytes..=PACK_BYTES_MAX).contains(&listed.bytes) {
        match shared
            .bucket
            .read(namespace, name, listed.bytes - tail_bytes..listed.bytes)
            .await
        {
            Err(Unmade::Failed(failure)) if !failure.is_outage() => return Ok(()),
            tail => tail?,
        }
    } else {
        Vec::new()
    };
    let manifest = decode_tail(namespace, name, listed.bytes, &tail);
    let mut state = shared.state.lock();
    match manifest {
        Ok(entries) => {
            state.counts.manifests += 1;
            if !state.catalog.learn(&listed, &entries) {
                state.counts.unread_manifests += 1;
            }
        }
        Err(error) => {
            tracing::warn!(pack = %name, %error, "refusing a pack");
            state.counts.refused_manifests += 1;
            state.catalog.refuse(namespace, *name);
        }
    }
    Ok(())
}

async fn remove_aged(shared: &Shared) {
    let Some(age_max) = shared.config.written_age_max.filter(|_| !shared.config.read_only) else {
        return;
    };
    // The bucket's clock against ours: where they disagree, a pack goes early or late, and either way it is only a cache.
    let oldest_ms = upload::now().saturating_sub(age_max).as_millis() as i64;
    loop {
        let aged = shared
            .state
            .lock()
            .catalog
            .oldest_own()
            .filter(|own| own.modified_ms < oldest_ms);
        match aged {
            Some(own) => {
                if upload::remove(shared, &own).await.is_err() {
                    return;
                }
            }
            None => return,
        }
    }
}
