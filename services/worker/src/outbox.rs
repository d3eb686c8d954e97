//! From the compute thread to one caller: events that wait for a reader without a queue.
//!
//! The compute thread never waits for a reader. What a slow reader has not taken yet is joined to one event, so an
//! outbox holds at most the text and ids of one generation, which the context window bounds; and the pages of a
//! finished sequence are free whether or not its text was read.

use std::{sync::Arc, task::Poll};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::report::{Finished, Started};

/// What a caller receives: `Started`, then `Tokens`, then one of the last two.
#[derive(Debug, PartialEq)]
pub(crate) enum Delivery {
    /// The prompt's KV is settled and the first step is done.
    Started(Started),
    /// New text and ids.
    Tokens {
        /// Text that became certain.
        text: String,
        /// The model's choices.
        ids: Vec<u32>,
    },
    /// The end.
    Finished(Box<Finished>),
    /// The request was given up.
    Failed(Failure),
}

/// Why a request was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The worker is going away.
    Stopping,
    /// The worker broke; the message says how.
    Internal(String),
}

#[derive(Debug, Default)]
struct State {
    started: Option<Started>,
    text: String,
    ids: Vec<u32>,
    end: Option<Result<Finished, Failure>>,
    ended: bool,
    abandoned: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Notify,
}

/// The compute thread's side. Dropping it before the end fails the request.
#[derive(Debug)]
pub(crate) struct Outbox(Arc<Shared>);

/// The caller's side. Dropping it tells the compute thread to stop.
#[derive(Debug)]
pub(crate) struct Inbox(Arc<Shared>);

/// Both sides.
pub(crate) fn pair() -> (Outbox, Inbox) {
    let shared = Arc::new(Shared::default());
    (Outbox(Arc::clone(&shared)), Inbox(shared))
}

impl Outbox {
    pub(crate) fn started(&self, started: Started) {
        self.0.state.lock().started = Some(started);
        self.0.arrived.notify_one();
    }

    pub(crate) fn tokens(&self, text: &str, ids: &[u32]) {
        let mut state = self.0.state.lock();
        state.text.push_str(text);
        state.ids.extend_from_slice(ids);
        drop(state);
        self.0.arrived.notify_one();
    }

    pub(crate) fn finish(self, finished: Finished) {
        self.end(Ok(finished));
    }

    pub(crate) fn fail(self, failure: Failure) {
        self.end(Err(failure));
    }

    /// Whether nobody reads any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.0.state.lock().abandoned
    }

    fn end(&self, end: Result<Finished, Failure>) {
        let mut state = self.0.state.lock();
        if !state.ended {
            state.ended = true;
            state.end = Some(end);
        }
        drop(state);
        self.0.arrived.notify_one();
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        // Has no effect after an orderly end.
        self.end(Err(Failure::Internal(
            "the compute thread gave the request up".to_owned(),
        )));
    }
}

impl Inbox {
    /// The next delivery; `None` after the last one.
    pub(crate) async fn next(&mut self) -> Option<Delivery> {
        loop {
            // One permit is kept when it comes between the look and the wait; there is only one reader.
            let arrived = self.0.arrived.notified();
            let taken = self.0.state.lock().take();
            if let Poll::Ready(delivery) = taken {
                return delivery;
            }
            arrived.await;
        }
    }

    /// Says that nobody reads any more; dropping does too.
    pub(crate) fn leave(&self) {
        self.0.state.lock().abandoned = true;
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.leave();
    }
}

impl State {
    /// The next delivery, `None` after the last, pending while there is neither.
    fn take(&mut self) -> Poll<Option<Delivery>> {
        if let Some(started) = self.started.take() {
            return Poll::Ready(Some(Delivery::Started(started)));
        }
        if !self.text.is_empty() || !self.ids.is_empty() {
            return Poll::Ready(Some(Delivery::Tokens {
                text: std::mem::take(&mut self.text),
                ids: std::mem::take(&mut self.ids),
            }));
        }
        match self.end.take() {
            Some(Ok(finished)) => Poll::Ready(Some(Delivery::Finished(Box::new(finished)))),
            Some(Err(failure)) => Poll::Ready(Some(Delivery::Failed(failure))),
            None if self.ended => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_reader_gets_one_joined_event_and_then_the_end() {
        let (outbox, mut inbox) = pair();
        outbox.started(Started::default());
        outbox.tokens("a", &[1]);
        outbox.tokens("", &[2]);
        outbox.tokens("b", &[3]);
        outbox.finish(Finished::default());
        assert_eq!(inbox.next().await, Some(Delivery::Started(Started::default())));
        let joined = Delivery::Tokens {
            text: "ab".into(),
            ids: vec![1, 2, 3],
        };
        assert_eq!(inbox.next().await, Some(joined));
        assert_eq!(inbox.next().await, Some(Delivery::Finished(Box::default())));
        assert_eq!(inbox.next().await, None);
    }

    #[tokio::test]
    async fn a_waiting_reader_is_woken_and_a_lost_writer_is_a_failure() {
        let (outbox, mut inbox) = pair();
        let reader = tokio::spawn(async move { (inbox.next().await, inbox.next().await, inbox.next().await) });
        tokio::task::yield_now().await;
        outbox.tokens("a", &[1]);
        tokio::task::yield_now().await;
        drop(outbox);
        let (first, second, third) = reader.await.expect("reads");
        assert!(matches!(first, Some(Delivery::Tokens { .. })), "{first:?}");
        assert!(
            matches!(second, Some(Delivery::Failed(Failure::Internal(_)))),
            "{second:?}"
        );
        assert_eq!(third, None);
    }

    #[test]
    fn a_reader_that_left_is_noticed() {
        let (outbox, inbox) = pair();
        assert!(!outbox.is_abandoned());
        drop(inbox);
        assert!(outbox.is_abandoned());
    }
}
