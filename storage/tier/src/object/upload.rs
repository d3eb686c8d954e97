//! Writing: closed packs become objects, a few at a time, inside the limit of what this store may have in the bucket.
//!
//! An object is written with one PUT, so it is there whole or not at all, and a process that dies leaves nothing behind.
//! While the bucket does not serve us, packs wait and the queue fills. A pack that the bucket refuses for itself is given
//! up after a few attempts, and counted.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kvasir_block::planted::point;
use tokio::{sync::watch, task::JoinSet, time::sleep};

use super::{
    Shared,
    bucket::{Listed, Unmade},
    catalog::Own,
    format::{EncodedPack, encode_pack},
    queue::ClosedPack,
};

/// Between attempts, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// When no pack is open there is nothing to close.
const IDLE: Duration = Duration::from_secs(3600);

/// Writes packs until the stop; what is being written then is given up.
pub(super) async fn run(shared: &Arc<Shared>, mut stop: watch::Receiver<bool>) {
    let mut writing = JoinSet::new();
    loop {
        let mut next_close = Instant::now() + IDLE;
        if writing.len() < shared.config.puts_max {
            let mut state = shared.state.lock();
            next_close = state.queue.close_aged(Instant::now()).unwrap_or(next_close);
            if let Some(pack) = state.queue.pop() {
                drop(state);
                writing.spawn(write(Arc::clone(shared), pack));
                continue;
            }
        }
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            () = shared.work.notified() => {}
            () = tokio::time::sleep_until(next_close.into()) => {}
            Some(ended) = writing.join_next() => if let Err(error) = ended {
                tracing::error!(%error, "writing a pack ended in a panic");
            },
        }
    }
    writing.shutdown().await;
}

/// Gives the queue its room back however the writing ends.
struct Settle<'a> {
    shared: &'a Shared,
    pack: &'a ClosedPack,
    writing_bytes: u64,
    is_done: bool,
}

impl Drop for Settle<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.writing_bytes -= self.writing_bytes;
        if self.is_done {
            state.queue.settle(self.pack);
        }
        drop(state);
        self.shared.progress.notify_all();
    }
}

async fn write(shared: Arc<Shared>, pack: Arc<ClosedPack>) {
    let mut settle = Settle {
        shared: &shared,
        pack: &pack,
        writing_bytes: 0,
        is_done: false,
    };
    // What no longer has its checksum would be found by every reader: it stays here.
    let whole: Vec<_> = pack
        .records
        .iter()
        .filter(|(_, payload, checksum)| checksum.verifies(payload))
        .cloned()
        .collect();
    let lost = pack.records.len() - whole.len();
    if lost > 0 {
        tracing::error!(
            layer_blocks = lost,
            "queued payloads have lost their checksum, dropping them"
        );
        shared.state.lock().counts.lost += lost as u64;
    }
    if whole.is_empty() {
        settle.is_done = true;
        return;
    }
    let encoded = encode_pack(pack.namespace, shared.config.store, next_sequence(&shared), &whole);
    settle.writing_bytes = encoded.bytes;
    shared.state.lock().writing_bytes += encoded.bytes;

    let (mut attempts, mut pause) = (0, BACKOFF.0);
    loop {
        let outcome = match make_room(&shared).await {
            Ok(()) => {
                point("pack: to be written");
                shared.bucket.put(pack.namespace, &encoded.name, &encoded.pieces).await
            }
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => {
                point("pack: written");
                published(&shared, &pack, &encoded);
                point("pack: listed");
                settle.is_done = true;
                return;
            }
            Err(Unmade::Failed(failure)) => {
                attempts += 1;
                let mut state = shared.state.lock();
                let reason = format!("cannot write to the bucket ({}): {}", failure.name(), failure.advice());
                if state.degraded.is_none() {
                    tracing::warn!(
                        kind = failure.name(),
                        advice = failure.advice(),
                        "cannot write to the bucket"
                    );
                }
                state.degraded = Some(reason);
                if !failure.is_outage() && attempts > shared.config.retries_max {
                    tracing::error!(layer_blocks = whole.len(), "the bucket refuses a pack, dropping it");
                    state.counts.lost += whole.len() as u64;
                    settle.is_done = true;
                    drop(state);
                    return;
                }
            }
            Err(Unmade::Paused | Unmade::TooLate) => {}
        }
        sleep(pause.min(shared.config.breaker.pause)).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

fn published(shared: &Shared, pack: &ClosedPack, encoded: &EncodedPack) {
    let listed = Listed {
        namespace: pack.namespace,
        name: encoded.name,
        bytes: encoded.bytes,
        modified_ms: now().as_millis() as i64,
    };
    let mut state = shared.state.lock();
    // Where the bound on entries leaves no room, it is still ours to remove.
    state.catalog.wrote(&listed);
    state.catalog.learn(&listed, &encoded.entries);
    state.counts.written_objects += 1;
    state.counts.written_bytes += encoded.bytes;
    if let Some(was) = state.degraded.take() {
        tracing::info!(was, "the bucket takes packs again");
    }
}

/// Removes this store's oldest packs until what it has and what it is writing fit under the limit.
async fn make_room(shared: &Shared) -> Result<(), Unmade> {
    loop {
        let oldest = {
            let state = shared.state.lock();
            let wanted = state.catalog.own_bytes() + state.writing_bytes;
            state
                .catalog
                .oldest_own()
                .filter(|_| wanted > shared.config.written_bytes_max)
        };
        match oldest {
            Some(own) => remove(shared, &own).await?,
            None => return Ok(()),
        }
    }
}

/// Removes a pack of this store.
pub(super) async fn remove(shared: &Shared, own: &Own) -> Result<(), Unmade> {
    shared.bucket.delete(own.namespace, &own.name).await?;
    let mut state = shared.state.lock();
    state.catalog.forget_pack(own.namespace, &own.name);
    state.counts.removed_objects += 1;
    tracing::debug!(pack = %own.name, bytes = own.bytes, "removed a pack");
    Ok(())
}

/// Later than every pack that this store is known to have written, whatever the clock says.
fn next_sequence(shared: &Shared) -> u64 {
    let mut state = shared.state.lock();
    let after = state.last_sequence.max(state.catalog.last_sequence());
    state.last_sequence = (now().as_micros() as u64).max(after.saturating_add(1));
    state.last_sequence
}

/// Since 1970; a clock before that counts as 1970.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
