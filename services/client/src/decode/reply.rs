//! Checks that a reply is the answer to its query, in shape and in size.

use std::time::Duration;

use kvasir_proto::{InvalidMessage, convert, v1};
use prost::Message;

use super::{
    Form, Found, HeadRows, Reply, Report, Shortfall,
    talk::{Asked, Talk},
};

/// Bytes of the gRPC prefix, which travel too; the head of a bulk connection has some more.
const PREFIX_BYTES: usize = 5;

impl Talk {
    pub(super) fn checked(&self, asked: &Asked, reply: v1::DecodeReply) -> Result<Reply, InvalidMessage> {
        let wire_bytes = PREFIX_BYTES + reply.encoded_len();
        if reply.sequence != asked.sequence {
            let problem = format!("{} instead of {}", reply.sequence, asked.sequence);
            return Err(InvalidMessage::new("sequence", problem));
        }
        if reply.layer != u32::from(asked.layer) {
            return Err(InvalidMessage::new(
                "layer",
                format!("{} instead of {}", reply.layer, asked.layer),
            ));
        }
        let found = match (asked.form, reply.result) {
            (Form::Rows { .. }, Some(v1::decode_reply::Result::Rows(rows))) => self.rows(rows)?,
            (Form::Attend { .. }, Some(v1::decode_reply::Result::Attend(attend))) => self.attend(&attend)?,
            (form, _) => return Err(InvalidMessage::new("result", format!("does not answer {form:?}"))),
        };
        let report = reply
            .report
            .ok_or_else(|| InvalidMessage::new("report", "is missing"))?;
        Ok(Reply {
            sequence: asked.sequence,
            layer: asked.layer,
            found,
            report: self.report(report)?,
            wire_bytes,
        })
    }

    fn rows(&self, rows: v1::RowsResult) -> Result<Found, InvalidMessage> {
        let schema = &self.namespace.schema;
        let (kv_heads, row_bytes) = (
            usize::from(schema.kv_heads),
            usize::from(schema.head_dim) * schema.dtype.bytes(),
        );
        if rows.heads.len() != kv_heads {
            let problem = format!("{} heads instead of {kv_heads}", rows.heads.len());
            return Err(InvalidMessage::new("rows.heads", problem));
        }
        let mut heads = Vec::with_capacity(kv_heads);
        for (i, head) in rows.heads.into_iter().enumerate() {
            let v1::HeadRows {
                positions,
                keys,
                values,
                sent,
                partial,
            } = head;
            let field = |name: &str| format!("rows.heads[{i}].{name}");
            let rises = |values: &[u32], below: u32| {
                values.windows(2).all(|pair| pair[0] < pair[1]) && values.last().is_none_or(|last| *last < below)
            };
            if !rises(&positions, self.opened.tokens) {
                let problem = format!("must rise and stay below {}", self.opened.tokens);
                return Err(InvalidMessage::new(field("positions"), problem));
            }
            // Positions are below a u32, so there are no more of them than that.
            if partial && !rises(&sent, positions.len() as u32) {
                let problem = format!("must rise and stay below {}", positions.len());
                return Err(InvalidMessage::new(field("sent"), problem));
            }
            let rows = if partial { sent.len() } else { positions.len() };
            let bytes = rows * row_bytes;
            for (name, found) in [("keys", keys.len()), ("values", values.len())] {
                if found != bytes {
                    return Err(InvalidMessage::new(
                        field(name),
                        format!("{found} bytes instead of {bytes}"),
                    ));
                }
            }
            heads.push(HeadRows {
                positions,
                sent: partial.then_some(sent),
                keys,
                values,
            });
        }
        Ok(Found::Rows(heads))
    }

    fn attend(&self, attend: &v1::AttendResult) -> Result<Found, InvalidMessage> {
        let head_dim = usize::from(self.namespace.schema.head_dim);
        let o = convert::floats("attend.o", &attend.o, self.q_heads * head_dim)?;
        if attend.lse.len() != self.q_heads * 4 {
            let problem = format!("{} bytes instead of {}", attend.lse.len(), self.q_heads * 4);
            return Err(InvalidMessage::new("attend.lse", problem));
        }
        let lse = convert::float_values(&attend.lse);
        if lse.iter().any(|lse| lse.is_nan() || *lse == f32::INFINITY) {
            return Err(InvalidMessage::new("attend.lse", "must be finite or -inf"));
        }
        Ok(Found::Attend { o, lse })
    }

    fn report(&self, report: v1::RetrievalReport) -> Result<Report, InvalidMessage> {
        use v1::retrieval_report::Shortfall as Wire;
        let shortfall = match Wire::try_from(report.shortfall) {
            Ok(Wire::None) => None,
            Ok(Wire::Deadline) => Some(Shortfall::Deadline),
            Ok(Wire::MissingBlocks) => Some(Shortfall::MissingBlocks),
            Ok(Wire::KMax) => Some(Shortfall::KMax),
            Err(_) => {
                let problem = format!("{} is not known here", report.shortfall);
                return Err(InvalidMessage::new("report.shortfall", problem));
            }
        };
        if report.mass_covered.len() != self.q_heads {
            let problem = format!("{} values for {} heads", report.mass_covered.len(), self.q_heads);
            return Err(InvalidMessage::new("report.mass_covered", problem));
        }
        let bounds = report.missed_mass_bound.len();
        if bounds != 0 && bounds != self.q_heads {
            let problem = format!("{bounds} values for {} heads", self.q_heads);
            return Err(InvalidMessage::new("report.missed_mass_bound", problem));
        }
        Ok(Report {
            keys_scanned: report.keys_scanned,
            keys_total: report.keys_total,
            keys_attended: report.keys_attended,
            mass_covered: report.mass_covered,
            shortfall,
            bytes_read: report.bytes_read,
            index: report.index,
            index_reason: report.index_reason,
            missed_mass_bound: report.missed_mass_bound,
            keys_rescored: report.keys_rescored,
            hinted: report.hinted,
            escalated: report.escalated,
            search: Duration::from_micros(report.search_us.into()),
            // Never more than the whole.
            hidden: Duration::from_micros(report.hidden_us.min(report.search_us).into()),
            queued: Duration::from_micros(report.waited_us.into()),
        })
    }
}
