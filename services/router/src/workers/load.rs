//! Follows one worker's load. The open stream is also the proof that the worker is there: when it breaks, the worker is
//! left out until it answers again.

use super::Worker;
use crate::{backoff::Backoff, grpc::CallError};

/// Applies load reports until the stream ends; answers with why it did.
pub(super) async fn follow(worker: &Worker, backoff: &mut Backoff) -> CallError {
    let mut stream = match worker.calls.watch_load().await {
        Ok(stream) => stream,
        Err(error) => return error,
    };
    loop {
        match stream.next().await {
            Ok(Some(report)) => {
                // Only a worker that talks counts as back: one that accepts and hangs up is asked ever more seldom.
                backoff.reset();
                worker.set_load(report);
            }
            Ok(None) => return CallError::Lost("it closed its load stream".to_owned()),
            Err(error) => return error,
        }
    }
}
