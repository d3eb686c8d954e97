//! What was asked of an open context, and what may be answered, whatever way messages go.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use kvasir_proto::{
    convert,
    v1::{self, decode_request::Request},
};

use super::{Certificate, Form, Hint, IndexChoice, OpenContext, Opened, Query, Reply};
use crate::{ClientError, Namespace, client::millis, error::CallName, observe};

/// Queries sent and not answered; the store works on one at a time, so more would only wait there.
pub(super) const OUTSTANDING_MAX: usize = 64;

/// How long past its deadline a query's reply may take to arrive: it then says that it fell short.
const GRACE: Duration = Duration::from_millis(250);

/// Queries and replies of one context.
#[derive(Debug)]
pub(super) struct Talk {
    name: CallName,
    pub(super) namespace: Namespace,
    pub(super) q_heads: usize,
    pub(super) opened: Opened,
    outstanding: VecDeque<Asked>,
    call_timeout: Duration,
    failed: Option<ClientError>,
}

/// A query whose reply has not come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) sequence: u64,
    pub(super) layer: u16,
    pub(super) form: Form,
    /// When to give up, and how long that is in all.
    until: Option<(Instant, Duration)>,
}

/// The message that opens a context.
pub(super) fn opening(
    name: &CallName,
    namespace: &Namespace,
    open: &OpenContext,
) -> Result<v1::DecodeRequest, ClientError> {
    if open.chain.len() > namespace.hashes_max {
        let (asked, max) = (open.chain.len(), namespace.hashes_max);
        let what = format!("a context of {asked} blocks, the store takes {max}: raise its hashes_max");
        return Err(observe::failed(name.call, name.invalid(what)));
    }
    Ok(message(Request::Open(v1::OpenContext {
        namespace: convert::namespace_bytes(namespace.id),
        hashes: convert::hash_bytes(&open.chain),
        q_heads: u32::try_from(open.q_heads).unwrap_or(u32::MAX),
        softmax_scale: open.softmax_scale,
        index: match open.index {
            IndexChoice::Best => "",
            IndexChoice::Flat => "flat",
            IndexChoice::Sketch => "sketch",
            IndexChoice::Roar => "roar",
            IndexChoice::Wave => "wave",
        }
        .to_owned(),
        row_cache_rows: open.row_cache_rows,
    })))
}

fn message(request: Request) -> v1::DecodeRequest {
    v1::DecodeRequest { request: Some(request) }
}

impl Talk {
    /// After the first reply.
    pub(super) fn begin(
        name: CallName,
        namespace: &Namespace,
        q_heads: usize,
        call_timeout: Duration,
        first: Option<v1::DecodeReply>,
    ) -> Result<Self, ClientError> {
        let Some(v1::decode_reply::Result::Opened(opened)) = first.and_then(|reply| reply.result) else {
            let error = name.broken("the first reply does not open the context");
            return Err(observe::failed(name.call, error));
        };
        Ok(Self {
            name,
            namespace: namespace.clone(),
            q_heads,
            opened: Opened {
                tokens: opened.tokens,
                index: opened.index,
                index_reason: opened.index_reason,
            },
            outstanding: VecDeque::new(),
            call_timeout,
            failed: None,
        })
    }

    pub(super) fn opened(&self) -> &Opened {
        &self.opened
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    pub(super) fn call_timeout(&self) -> Duration {
        self.call_timeout
    }

    /// The message of a query, and what to [note](Self::asked) once it is sent.
    pub(super) fn query(&self, query: Query) -> Result<(v1::DecodeRequest, Asked), ClientError> {
        self.check_alive()?;
        self.check(query.layer, query.q.len(), query.local_lse.len())?;
        if self.outstanding.len() >= OUTSTANDING_MAX {
            let problem = format!("{OUTSTANDING_MAX} queries are unanswered: receive before sending more");
            return Err(self.invalid(problem));
        }
        let asked = Asked {
            sequence: query.sequence,
            layer: query.layer,
            form: query.form,
            until: query.deadline.map(|wait| (Instant::now() + wait + GRACE, wait + GRACE)),
        };
        let query = v1::Query {
            sequence: query.sequence,
            layer: query.layer.into(),
            q: convert::float_bytes(&query.q),
            excluded: query.excluded.into_iter().map(v1::TokenRange::from).collect(),
            deadline_ms: query.deadline.map_or(0, millis),
            local_lse: convert::float_bytes(&query.local_lse),
            form: Some(form(query.form)),
        };
        Ok((message(Request::Query(query)), asked))
    }

    /// A query was sent.
    pub(super) fn asked(&mut self, asked: Asked) {
        self.outstanding.push_back(asked);
    }

    /// The message of a hint.
    pub(super) fn hint(&self, hint: &Hint) -> Result<v1::DecodeRequest, ClientError> {
        self.check_alive()?;
        self.check(hint.layer, hint.q.len(), hint.local_lse.len())?;
        Ok(message(Request::Hint(v1::Hint {
            layer: hint.layer.into(),
            q: convert::float_bytes(&hint.q),
            local_lse: convert::float_bytes(&hint.local_lse),
        })))
    }

    /// Until when the next reply is waited for, and how long that is in all.
    pub(super) fn awaited(&self) -> Result<(Instant, Duration), ClientError> {
        self.check_alive()?;
        match self.outstanding.front() {
            None => Err(self.invalid("no query is unanswered: send one first")),
            Some(asked) => Ok(asked
                .until
                .unwrap_or_else(|| (Instant::now() + self.call_timeout, self.call_timeout))),
        }
    }

    /// Takes the next reply.
    pub(super) fn take(&mut self, reply: v1::DecodeReply) -> Result<Reply, ClientError> {
        let Some(asked) = self.outstanding.pop_front() else {
            return Err(self.fail(|name| name.broken("a reply that nobody asked for")));
        };
        match self.checked(&asked, reply) {
            Ok(reply) => {
                observe::bytes(self.name.call, reply.wire_bytes);
                Ok(reply)
            }
            Err(error) => Err(self.fail(|name| name.broken_field(&error))),
        }
    }

    /// The store ended it in order.
    pub(super) fn ended(&mut self) -> ClientError {
        let what = format!("the stream ended with {} queries unanswered", self.outstanding.len());
        self.fail(|name| name.broken(what))
    }

    /// Notes the error that ends it.
    pub(super) fn fail(&mut self, error: impl FnOnce(&CallName) -> ClientError) -> ClientError {
        let error = observe::failed(self.name.call, error(&self.name));
        self.failed = Some(error.clone());
        error
    }

    /// Whether a layer may be asked with so many values, and so many of the local log-sum-exp.
    fn check(&self, layer: u16, values: usize, local: usize) -> Result<(), ClientError> {
        let head_dim = usize::from(self.namespace.schema.head_dim);
        let problem = if values != self.q_heads * head_dim {
            let heads = self.q_heads;
            format!(
                "q: {values} values, {heads} heads of {head_dim} are {}",
                heads * head_dim
            )
        } else if local != 0 && local != self.q_heads {
            format!("local_lse: {local} values for {} heads", self.q_heads)
        } else if layer >= self.namespace.schema.layers {
            format!("layer: {layer} of {}", self.namespace.schema.layers)
        } else {
            return Ok(());
        };
        Err(self.invalid(problem))
    }

    fn invalid(&self, problem: impl std::fmt::Display) -> ClientError {
        observe::failed(self.name.call, self.name.invalid(problem))
    }

    fn check_alive(&self) -> Result<(), ClientError> {
        self.failed.clone().map_or(Ok(()), Err)
    }
}

fn form(form: Form) -> v1::query::Form {
    match form {
        Form::Rows { k } => v1::query::Form::Rows(v1::Rows { k }),
        Form::Attend {
            target_mass,
            k_max,
            options,
        } => v1::query::Form::Attend(v1::Attend {
            target_mass,
            k_max,
            tail: options.tail,
            certificate: match options.certificate {
                Certificate::None => v1::Certificate::None,
                Certificate::Statistical => v1::Certificate::Statistical,
                Certificate::Deterministic => v1::Certificate::Deterministic,
            }
            .into(),
            missed_mass_max: options.missed_mass_max,
            unbiased: options.unbiased,
            effort: options.effort,
        }),
    }
}
