//! The task that sends what is queued.

use std::{collections::HashSet, sync::Arc, time::Duration};

use kvasir_block::BlockHash;
use kvasir_client::{ClientError, Namespace, PutOutcome, PutStream};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{Offload, Pushed};
use crate::store_session::StoreSession;

/// How long a stream stays open for more blocks: longer than a layer of a step takes.
const LINGER: Duration = Duration::from_millis(200);
/// How often the outcomes of an idle stream are looked at: short against what anyone waits for.
const LOOK: Duration = Duration::from_millis(5);

/// Sends queued blocks until the queue is closed and empty, or `stop` is cancelled. While the store is away the queue
/// fills up and drops; nothing else waits.
pub(crate) async fn drain(offload: Arc<Offload>, session: Arc<StoreSession>, stop: CancellationToken) {
    loop {
        let next = async {
            let block = offload.take().await?;
            Some((block, session.connected().await))
        };
        let (block, namespace) = tokio::select! {
            () = stop.cancelled() => return,
            next = next => match next {
                Some(next) => next,
                None => return,
            },
        };
        let mut burst = Burst::new(&offload, block.hash);
        let sent = tokio::select! {
            () = stop.cancelled() => return,
            sent = burst.send(block, &namespace, &session) => sent,
        };
        if let Err(error) = sent {
            tracing::warn!(%error, blocks = burst.unanswered.len(), "pushing to the store failed, those blocks may be pushed again");
            burst.lose();
            session.lost(&error);
        }
    }
}

/// Blocks sent over one stream.
struct Burst<'a> {
    offload: &'a Offload,
    /// Blocks some of whose layers were sent over this stream and not all answered.
    unanswered: HashSet<BlockHash>,
}

impl<'a> Burst<'a> {
    fn new(offload: &'a Offload, first: BlockHash) -> Self {
        Self {
            offload,
            unanswered: HashSet::from([first]),
        }
    }

    async fn send(&mut self, first: Pushed, namespace: &Namespace, session: &StoreSession) -> Result<(), ClientError> {
        let mut stream = session.client().put_blocks(namespace).await?;
        let mut next = Some(first);
        while let Some(block) = next {
            self.unanswered.insert(block.hash);
            stream.put(block.summed()).await?;
            self.note(stream.outcomes());
            next = self.wait_for_more(&mut stream).await?;
        }
        self.note(stream.finish().await?);
        Ok(())
    }

    /// The next block, or `None` when none came for a while or ever will.
    async fn wait_for_more(&mut self, stream: &mut PutStream) -> Result<Option<Pushed>, ClientError> {
        if self.offload.queued() == 0 {
            // Nothing to batch with: what is batched leaves now rather than after the wait.
            stream.flush().await?;
        }
        let until = Instant::now() + LINGER;
        loop {
            match timeout(LOOK, self.offload.take()).await {
                Ok(next) => return Ok(next),
                Err(_) if Instant::now() >= until => return Ok(None),
                Err(_) => self.note(stream.outcomes()),
            }
        }
    }

    fn note(&mut self, outcomes: Vec<(BlockHash, u16, PutOutcome)>) {
        for (hash, _, outcome) in outcomes {
            self.offload.answered(hash, outcome);
        }
        let offload = self.offload;
        self.unanswered
            .retain(|hash| offload.standing(std::slice::from_ref(hash)).under_way > 0);
    }

    fn lose(&mut self) {
        for hash in self.unanswered.drain() {
            self.offload.abandon(hash);
        }
    }
}
