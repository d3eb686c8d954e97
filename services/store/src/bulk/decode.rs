//! Decode over a bulk connection: a message in, searched for on the connection's own thread, a message out.

use bytes::Bytes;
use kvasir_proto::bulk::{Op, ReplyHead, RequestHead, Status};

use super::{
    answer::Problem,
    connection::{Connection, Ended},
};
use crate::grpc::{Exchange, Refused, RefusedAs};

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let status = match refused.code {
            RefusedAs::NotFound => Status::NotFound,
            RefusedAs::Invalid => Status::Invalid,
            RefusedAs::Exhausted => Status::Exhausted,
            RefusedAs::Unavailable => Status::Unavailable,
            RefusedAs::Internal => Status::Internal,
        };
        Self::Refused(status, refused.message)
    }
}

/// Receives a message, and replies where it is no hint. A refusal ends the stream, and the connection can begin another one.
pub(super) fn decode(connection: &Connection<'_>, head: &RequestHead) -> Result<(), Problem> {
    let bytes_max = connection.served.config.control_bytes_max() as u64;
    if head.payload_bytes > bytes_max {
        let bytes = head.payload_bytes;
        let error = format!("payload_bytes: {bytes}, at most {bytes_max} are taken in a message of a decode");
        return Err(Problem::Refused(Status::Exhausted, error)).inspect_err(|_| connection.socket.end_reading());
    }
    let mut message = vec![0; head.payload_bytes as usize];
    connection.receive(&mut message)?;
    if let Err(error) = head.check_message(&message) {
        return Err(Problem::Ended(connection.broken(&error)));
    }
    let mut open = connection.decoding.borrow_mut();
    let mut exchange = match open.take() {
        Some(exchange) => exchange,
        None => Exchange::new(connection.arc(), connection.runtime())?,
    };
    let reply = exchange.take(Bytes::from(message), &|| connection.socket.is_asked())?;
    *open = Some(exchange);
    drop(open);
    let Some(reply) = reply else { return Ok(()) };
    let head = ReplyHead::new(Op::Decode, head.id).with_message(&reply);
    connection.send(&[&head.encode(), &reply]).map_err(Ended::into)
}
