//! A decode stream whose messages come as bytes, one after the other, on a thread of its own.
//!
//! That thread does the searches itself: there is no hand-over to another one between a query and its reply, nor between a hint's
//! search and the query that takes it up.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_proto::v1::{self, decode_request::Request};
use prost::Message;
use tokio::runtime::Handle;
use tonic::{Code, Status};

use super::session::Session;
use crate::{ahead::Ahead, grpc::status::of_cache, served::Served};

/// One stream.
pub(crate) struct Exchange {
    session: Session,
    /// The search that the last hint began.
    ahead: Option<Ahead>,
    runtime: Handle,
}

/// Why a stream ended.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) code: RefusedAs,
    pub(crate) message: String,
}

/// Kinds of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusedAs {
    NotFound,
    Invalid,
    Exhausted,
    Unavailable,
    Internal,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self {
            code: match status.code() {
                Code::NotFound => RefusedAs::NotFound,
                Code::ResourceExhausted => RefusedAs::Exhausted,
                Code::Unavailable => RefusedAs::Unavailable,
                Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => RefusedAs::Invalid,
                _ => RefusedAs::Internal,
            },
            message: status.message().to_owned(),
        }
    }
}

impl Exchange {
    /// Takes a place among the streams. The thread is none of `runtime`'s.
    pub(crate) fn new(served: &Arc<Served>, runtime: &Handle) -> Result<Self, Refused> {
        Ok(Self {
            session: Session::new(served)?,
            ahead: None,
            runtime: runtime.clone(),
        })
    }

    /// Takes one message; the reply, or none to a hint. `is_asked` says whether another one is there already.
    pub(crate) fn take(&mut self, message: Bytes, is_asked: &dyn Fn() -> bool) -> Result<Option<Vec<u8>>, Refused> {
        let request = v1::DecodeRequest::decode(message)
            .map_err(|error| Status::invalid_argument(format!("request: is no DecodeRequest: {error}")))?;
        let reply = match request.request {
            Some(Request::Open(open)) => self.runtime.clone().block_on(self.session.open(open))?,
            Some(Request::Query(query)) => self.answer(query)?,
            Some(Request::Hint(hint)) => {
                self.ahead = None;
                self.ahead = self.search_ahead(&hint, is_asked)?;
                return Ok(None);
            }
            None => {
                let status = Status::invalid_argument("request: is empty, send open, query or hint");
                return Err(status.into());
            }
        };
        Ok(Some(reply.encode_to_vec()))
    }

    fn answer(&mut self, query: v1::Query) -> Result<v1::DecodeReply, Status> {
        let (asked, pending) = self.session.ask(query)?;
        let served = &self.session.served;
        let answer = served.searches.answer_here(
            &self.runtime,
            served.cache()?,
            Arc::clone(&pending.context),
            asked,
            self.ahead.take(),
        );
        let answer = answer?.map_err(|error| of_cache(&error))?;
        Ok(self.session.reply(&pending, answer))
    }

    fn search_ahead(&self, hint: &v1::Hint, is_asked: &dyn Fn() -> bool) -> Result<Option<Ahead>, Status> {
        let (context, forecast) = self.session.forecast(hint)?;
        let served = &self.session.served;
        let ahead = served
            .searches
            .hint_here(&self.runtime, &served.cache()?, &context, forecast, is_asked);
        ahead.map_err(|error| of_cache(&error))
    }
}
