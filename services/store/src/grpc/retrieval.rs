//! Decode: one context per stream, one query at a time; queries of several streams may share a scan (`searches`). Hints are taken
//! while a query is being answered, so that the next layer's search begins at once (`ahead`).

mod ask;
mod exchange;
mod reply;
mod session;

use std::sync::Arc;

use futures::{StreamExt, stream, stream::BoxStream};
use kvasir_proto::v1::{self, decode_request, retrieval_server::Retrieval};
use kvasir_runtime::request_id::RequestId;
use tonic::{Request, Response, Status, Streaming};

pub(crate) use self::exchange::{Exchange, Refused, RefusedAs};
use self::session::Session;
use super::{
    indexes,
    status::{observed, of_cache, refused, stopping},
};
use crate::{ahead::Ahead, served::Served};

const CALL: &str = "decode";

#[derive(Clone, Debug)]
pub(super) struct RetrievalApi(pub(super) Arc<Served>);

#[tonic::async_trait]
impl Retrieval for RetrievalApi {
    type DecodeStream = BoxStream<'static, Result<v1::DecodeReply, Status>>;

    async fn decode(
        &self,
        request: Request<Streaming<v1::DecodeRequest>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let span = RequestId::of(&request).span(CALL);
        let session = Session::new(&self.0).inspect_err(|status| refused(CALL, &span, status))?;
        let call = Call {
            session,
            requests: request.into_inner(),
            ahead: None,
            next: None,
            span,
        };
        Ok(Response::new(stream::try_unfold(call, Call::next).boxed()))
    }

    async fn put_queries(
        &self,
        request: Request<v1::PutQueriesRequest>,
    ) -> Result<Response<v1::PutQueriesReply>, Status> {
        let span = RequestId::of(&request).span("put_queries");
        let put = indexes::put_queries(&self.0, request.into_inner());
        observed("put_queries", span, put).await.map(Response::new)
    }

    async fn build_index(
        &self,
        request: Request<v1::BuildIndexRequest>,
    ) -> Result<Response<v1::BuildIndexReply>, Status> {
        let span = RequestId::of(&request).span("build_index");
        let asked = indexes::build_index(&self.0, request.into_inner());
        observed("build_index", span, asked).await.map(Response::new)
    }
}

/// What a message leads to.
enum Turn {
    Reply(Box<v1::DecodeReply>),
    Silent,
    End,
}

struct Call {
    session: Session,
    requests: Streaming<v1::DecodeRequest>,
    /// The search that the last hint began.
    ahead: Option<Ahead>,
    /// What came while a query was being answered, and is no hint.
    next: Option<Result<Option<v1::DecodeRequest>, Status>>,
    span: tracing::Span,
}

impl Call {
    async fn next(mut self) -> Result<Option<(v1::DecodeReply, Self)>, Status> {
        loop {
            match self.turn().await? {
                Turn::Reply(reply) => return Ok(Some((*reply, self))),
                Turn::Silent => {}
                Turn::End => return Ok(None),
            }
        }
    }

    async fn message(&mut self) -> Result<Option<v1::DecodeRequest>, Status> {
        let stop = self.session.served.stopping.clone();
        if let Some(next) = self.next.take() {
            return next;
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(stopping()),
            message = self.requests.message() => message,
        }
    }

    /// Waits for `work`, and takes the hints that come meanwhile.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Status> {
        tokio::pin!(work);
        loop {
            let message = tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                message = self.requests.message(), if self.next.is_none() => message,
            };
            match message {
                Ok(Some(v1::DecodeRequest {
                    request: Some(decode_request::Request::Hint(hint)),
                })) => self.hint(&hint)?,
                other => self.next = Some(other),
            }
        }
    }

    /// Takes one message.
    async fn turn(&mut self) -> Result<Turn, Status> {
        let message = self.message().await;
        let span = self.span.clone();
        let request = match message {
            Ok(Some(v1::DecodeRequest { request })) => request,
            Ok(None) => return Ok(Turn::End),
            Err(status) => {
                refused(CALL, &span, &status);
                return Err(status);
            }
        };
        let reply = match request {
            Some(decode_request::Request::Open(open)) => {
                observed("open_context", span, self.session.open(open)).await?
            }
            Some(decode_request::Request::Query(query)) => observed(CALL, span, self.answer(query)).await?,
            Some(decode_request::Request::Hint(hint)) => {
                self.hint(&hint)?;
                return Ok(Turn::Silent);
            }
            None => return Err(Status::invalid_argument("request: is empty, send open, query or hint")),
        };
        Ok(Turn::Reply(Box::new(reply)))
    }

    /// Takes a forecast of queries, in the place of the one before.
    fn hint(&mut self, hint: &v1::Hint) -> Result<(), Status> {
        self.ahead = None;
        let begun = self.begin_ahead(hint);
        self.ahead = begun.inspect_err(|status| refused("hint", &self.span, status))?;
        Ok(())
    }

    fn begin_ahead(&self, hint: &v1::Hint) -> Result<Option<Ahead>, Status> {
        let (context, forecast) = self.session.forecast(hint)?;
        let served = &self.session.served;
        let begun = served.searches.hint(served.cache()?, context, forecast);
        begun.map_err(|error| of_cache(&error))
    }

    async fn answer(&mut self, query: v1::Query) -> Result<v1::DecodeReply, Status> {
        let (asked, pending) = self.session.ask(query)?;
        let (served, ahead) = (Arc::clone(&self.session.served), self.ahead.take());
        let context = Arc::clone(&pending.context);
        let search = served.searches.answer(served.cache()?, context, asked, ahead);
        let answer = self.meanwhile(search).await??.map_err(|error| of_cache(&error))?;
        Ok(self.session.reply(&pending, answer))
    }
}
