//! Between the messages of `kvasir.v1.Worker` and the worker's own types.

use std::time::Duration;

use kvasir_proto::{InvalidMessage, v1};
use tonic::Status;

use crate::{
    config::{AttentionMode, Certificate, IndexWanted},
    load::Load,
    outbox::{Delivery, Failure},
    report::{Finished, Reason, Started},
    request::{Asked, AskedAttention, AskedSampling},
};

/// What a request asks for; fields left at zero are absent where the protocol says so.
pub(super) fn asked(message: v1::GenerateRequest) -> Result<Asked, InvalidMessage> {
    let v1::GenerateRequest {
        request_id: _,
        prompt,
        max_tokens,
        sampling,
        stop,
        attention,
        cache_salt,
        no_cache,
        forced,
        ignore_eos,
    } = message;
    let sampling = sampling.map(|sampling| AskedSampling {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        seed: sampling.has_seed.then_some(sampling.seed),
    });
    Ok(Asked {
        prompt,
        max_tokens: (max_tokens > 0).then_some(max_tokens),
        sampling,
        stop,
        attention: attention.map(asked_attention).transpose()?.unwrap_or_default(),
        cache_salt,
        no_cache,
        forced,
        ignore_eos,
    })
}

fn asked_attention(options: v1::AttentionOptions) -> Result<AskedAttention, InvalidMessage> {
    let mode = match v1::AttentionMode::try_from(options.mode) {
        Ok(v1::AttentionMode::Unspecified) => None,
        Ok(v1::AttentionMode::Full) => Some(AttentionMode::Full),
        Ok(v1::AttentionMode::Rows) => Some(AttentionMode::Rows),
        Ok(v1::AttentionMode::Attend) => Some(AttentionMode::Attend),
        Ok(v1::AttentionMode::Auto) => Some(AttentionMode::Auto),
        Err(_) => {
            let problem = format!("{} is no mode: use full, rows, attend or auto", options.mode);
            return Err(InvalidMessage::new("attention.mode", problem));
        }
    };
    let given = |flag: bool, value: u32| (flag || value > 0).then_some(value);
    Ok(AskedAttention {
        mode,
        k: given(false, options.k),
        target_mass: (options.target_mass != 0.0).then_some(options.target_mass),
        sink: given(options.has_sink, options.sink),
        window: given(options.has_window, options.window),
        index: named(
            "attention.index",
            &options.index,
            IndexWanted::named,
            "best, flat, sketch, roar or wave",
        )?,
        tail: (options.has_tail || options.tail).then_some(options.tail),
        certificate: named(
            "attention.certificate",
            &options.certificate,
            Certificate::named,
            "none, statistical or deterministic",
        )?,
        missed_mass_max: (options.has_missed_mass_max || options.missed_mass_max != 0.0)
            .then_some(options.missed_mass_max),
        effort: (options.effort != 0.0).then_some(options.effort),
    })
}

/// What a name stands for; an empty one is absent.
fn named<T>(
    field: &str,
    name: &str,
    known: fn(&str) -> Option<T>,
    expected: &str,
) -> Result<Option<T>, InvalidMessage> {
    if name.is_empty() {
        return Ok(None);
    }
    match known(name) {
        Some(value) => Ok(Some(value)),
        None => {
            let name: String = name.chars().take(32).collect();
            Err(InvalidMessage::new(
                field,
                format!("{name:?} is not known: use {expected}"),
            ))
        }
    }
}

/// A delivery as a message. Failures are statuses, see [`status`].
pub(super) fn reply(delivery: Delivery) -> v1::GenerateReply {
    let event = match delivery {
        Delivery::Started(started) => Some(v1::generate_reply::Event::Started(started.into())),
        Delivery::Tokens { text, ids } => Some(v1::generate_reply::Event::Tokens(v1::Tokens { text, ids })),
        Delivery::Finished(finished) => Some(v1::generate_reply::Event::Finished((*finished).into())),
        Delivery::Failed(_) => None,
    };
    v1::GenerateReply { event }
}

/// The status of a request that was given up.
pub(super) fn status(failure: &Failure) -> Status {
    match failure {
        Failure::Stopping => Status::unavailable("the worker is stopping: send the request to another"),
        Failure::Internal(why) => Status::internal(format!("{why}: send the request again")),
    }
}

impl From<Started> for v1::Started {
    fn from(started: Started) -> Self {
        Self {
            prompt_tokens: started.prompt_tokens as u32,
            cached_tokens: (started.cached_device + started.cached_store) as u32,
            cached_tokens_device: started.cached_device as u32,
            cached_tokens_store: started.cached_store as u32,
        }
    }
}

impl From<Finished> for v1::Finished {
    fn from(finished: Finished) -> Self {
        let Finished {
            reason,
            completion_tokens,
            started,
            report,
        } = finished;
        let reason = match reason {
            Reason::Stop => v1::FinishReason::Stop,
            Reason::Length => v1::FinishReason::Length,
        };
        let tally = &report.retrieval;
        let mode = match report.mode {
            AttentionMode::Full => v1::AttentionMode::Full,
            AttentionMode::Rows => v1::AttentionMode::Rows,
            AttentionMode::Attend => v1::AttentionMode::Attend,
            AttentionMode::Auto => v1::AttentionMode::Auto,
        };
        Self {
            reason: reason.into(),
            prompt_tokens: started.prompt_tokens as u32,
            completion_tokens: completion_tokens as u32,
            cached_tokens: (started.cached_device + started.cached_store) as u32,
            report: Some(v1::GenerateReport {
                mode: mode.into(),
                fell_back: report.fallback.is_some(),
                bytes_pushed: report.bytes_pushed,
                bytes_loaded: report.bytes_loaded,
                keys_scanned: tally.keys_scanned,
                keys_total: tally.keys_total,
                keys_attended: tally.keys_attended,
                mass_covered_p50: tally.mass_p50(),
                mass_covered_min: tally.mass_min(),
                queue_ms: millis(report.queued),
                prefill_ms: millis(report.prefill),
                decode_ms: millis(report.decode),
                retrieved_bytes: tally.bytes,
                round_trips: tally.round_trips,
                fallback_reason: report.fallback.unwrap_or_default(),
                index: tally.index.clone(),
                index_reason: tally.index_reason.clone(),
                missed_mass_bound_p50: tally.bound_p50(),
                missed_mass_bound_max: tally.bound_max(),
                escalations: tally.escalations,
                hinted: tally.hinted,
                search_ms: millis(tally.search),
                store_queued_ms: millis(tally.store_queued),
                waited_ms: millis(tally.waited),
                search_hidden: tally.search_hidden(),
                wire_us_p50: tally.wire_us_p50(),
                rows: tally.rows,
                rows_kept: tally.rows_kept,
                forced_nll: report.forced_nll,
            }),
        }
    }
}

impl From<Load> for v1::WorkerLoad {
    fn from(load: Load) -> Self {
        Self {
            running: load.running as u32,
            waiting: load.waiting as u32,
            prefill_tokens_waiting: load.prefill_tokens_waiting as u64,
            kv_usage: load.kv_usage,
            draining: load.draining,
        }
    }
}

fn millis(duration: Duration) -> f32 {
    (duration.as_secs_f64() * 1e3) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_absent_unless_they_are_meant() {
        let options = v1::AttentionOptions {
            mode: v1::AttentionMode::Attend.into(),
            has_sink: true,
            has_missed_mass_max: true,
            certificate: "statistical".to_owned(),
            ..v1::AttentionOptions::default()
        };
        let message = v1::GenerateRequest {
            prompt: vec![1],
            attention: Some(options),
            sampling: Some(v1::SamplingParams {
                temperature: 0.5,
                top_p: 1.0,
                seed: 7,
                has_seed: false,
            }),
            ..v1::GenerateRequest::default()
        };
        let asked = asked(message).expect("well-formed");
        assert_eq!(asked.max_tokens, None);
        assert_eq!(asked.sampling.expect("given").seed, None);
        let expected = AskedAttention {
            mode: Some(AttentionMode::Attend),
            sink: Some(0),
            missed_mass_max: Some(0.0),
            certificate: Some(Certificate::Statistical),
            ..AskedAttention::default()
        };
        assert_eq!(asked.attention, expected);
    }

    #[test]
    fn unknown_choices_are_refused() {
        let with = |change: fn(&mut v1::AttentionOptions)| {
            let mut options = v1::AttentionOptions::default();
            change(&mut options);
            options
        };
        let table = [
            (
                with(|options| options.mode = 9),
                "attention.mode: 9 is no mode: use full, rows, attend or auto",
            ),
            (
                with(|options| options.index = "hnsw".to_owned()),
                "attention.index: \"hnsw\" is not known: use best, flat, sketch, roar or wave",
            ),
            (
                with(|options| options.certificate = "sure".to_owned()),
                "attention.certificate: \"sure\" is not known: use none, statistical or deterministic",
            ),
        ];
        for (options, expected) in table {
            let message = v1::GenerateRequest {
                attention: Some(options),
                ..v1::GenerateRequest::default()
            };
            assert_eq!(asked(message).expect_err(expected).to_string(), expected);
        }
    }
}
