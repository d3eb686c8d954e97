//! What was measured, and what follows from it.

use anyhow::{Result, bail};
use kvasir_model::ModelFile;
use serde::Serialize;

use super::{
    ROWS_K, TARGET_MASS,
    ask::Answer,
    document,
    grpc::{Generated, StoreStat},
};
use crate::{
    measure::{Machine, median},
    version::{PROFILE, VERSION},
};

/// How a question was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Run {
    Cold,
    Warm,
    Restarted,
    Killed,
    Attend,
    Rows,
}

impl Run {
    pub(super) const ALL: [Self; 6] = [
        Self::Cold,
        Self::Warm,
        Self::Restarted,
        Self::Killed,
        Self::Attend,
        Self::Rows,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Restarted => "after a restart",
            Self::Killed => "after kill -9",
            Self::Attend => "attend",
            Self::Rows => "rows",
        }
    }
}

/// An answer with its question.
pub(super) struct Asked {
    question: &'static str,
    answer: Answer,
}

impl Asked {
    pub(super) fn new(question: &'static str, answer: Answer) -> Self {
        Self { question, answer }
    }
}

/// The figures of one answer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) ttft_ms: f64,
    /// Of that, at the worker: from its arrival there to its place in the batch, matching at the store included; and from there to its
    /// first token, loading included. The rest is the router (template, tokens, hashes) and the way there and back.
    pub(super) queue_ms: f64,
    pub(super) prefill_ms: f64,
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) cached_tokens_device: u64,
    pub(super) cached_tokens_store: u64,
    pub(super) decode_tokens_per_second: Option<f64>,
    pub(super) keys_scanned: u64,
    pub(super) keys_total: u64,
    pub(super) keys_attended: u64,
    pub(super) mass_covered_p50: f64,
    pub(super) mass_covered_min: f64,
    /// Index that served, where something was retrieved.
    pub(super) index: Option<String>,
    /// Share of the searching that the worker did not wait for.
    pub(super) search_hidden: f64,
    pub(super) rows: u64,
    pub(super) rows_kept: u64,
    pub(super) retrieved_bytes: u64,
    pub(super) fell_back: bool,
    pub(super) fallback_reason: Option<String>,
    pub(super) text: String,
}

impl From<&Answer> for Measured {
    fn from(answer: &Answer) -> Self {
        let kvasir = &answer.kvasir;
        // The first token belongs to the prefill.
        let steps = answer.completion_tokens.saturating_sub(1) as f64;
        Self {
            ttft_ms: answer.ttft_ms,
            queue_ms: kvasir.queue_ms,
            prefill_ms: kvasir.prefill_ms,
            prompt_tokens: answer.prompt_tokens,
            completion_tokens: answer.completion_tokens,
            cached_tokens: kvasir.cached_tokens,
            cached_tokens_device: kvasir.cached_tokens_device,
            cached_tokens_store: kvasir.cached_tokens_store,
            decode_tokens_per_second: (kvasir.decode_ms > 0.0).then(|| steps / (kvasir.decode_ms / 1e3)),
            keys_scanned: kvasir.keys_scanned,
            keys_total: kvasir.keys_total,
            keys_attended: kvasir.keys_attended,
            mass_covered_p50: kvasir.mass_covered_p50,
            mass_covered_min: kvasir.mass_covered_min,
            index: kvasir.index.clone(),
            search_hidden: kvasir.search_hidden,
            rows: kvasir.rows,
            rows_kept: kvasir.rows_kept,
            retrieved_bytes: kvasir.retrieved_bytes,
            fell_back: kvasir.fell_back,
            fallback_reason: kvasir.reason.clone(),
            text: answer.text.clone(),
        }
    }
}

/// One question, asked in one way.
#[derive(Clone, Debug, Serialize)]
struct Row {
    run: Run,
    question: &'static str,
    #[serde(flatten)]
    measured: Measured,
}

/// Choices under teacher forcing beside those of full attention.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Forced {
    run: Run,
    tokens: usize,
    agreeing: usize,
    fell_back: bool,
    /// Mean negative log-likelihood of the forced tokens, less that under full attention, in nats.
    nll_difference: f64,
}

impl Forced {
    /// Counts equal choices. Both must have chosen equally often, or they were not forced alike.
    pub(super) fn compare(run: Run, full: &Generated, forced: &Generated) -> Result<Self> {
        if full.ids.is_empty() || full.ids.len() != forced.ids.len() {
            bail!(
                "{} forced tokens brought {} choices: the worker does not force as documented",
                full.ids.len(),
                forced.ids.len()
            );
        }
        let pairs = full.ids.iter().zip(&forced.ids);
        Ok(Self {
            run,
            tokens: full.ids.len(),
            agreeing: pairs.filter(|(full, chosen)| full == chosen).count(),
            fell_back: forced.fell_back,
            nll_difference: forced.nll - full.nll,
        })
    }
}

/// What is gathered while the demo runs.
#[derive(Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    /// The question that filled the caches.
    pub(super) filling: Option<Measured>,
    pub(super) forced: Vec<Forced>,
    pub(super) failures: Vec<String>,
    bytes_pushed: u64,
    bytes_loaded: u64,
}

/// `report.json`. Times are medians over the questions, in milliseconds, measured by the client.
#[derive(Debug, Serialize)]
pub(super) struct Finished {
    pub(super) document: &'static str,
    pub(super) model: String,
    pub(super) questions: usize,
    pub(super) max_tokens: u32,
    pub(super) prompt_tokens: u64,
    pub(super) ttft_cold_ms: f64,
    /// The same while the blocks were pushed to the store: what filling the cache costs the one who fills it.
    pub(super) ttft_cold_pushing_ms: f64,
    pub(super) ttft_warm_ms: f64,
    pub(super) ttft_warm_after_restart_ms: f64,
    pub(super) ttft_warm_after_kill_ms: f64,
    pub(super) cached_tokens_warm: u64,
    pub(super) cached_tokens_store_after_restart: u64,
    pub(super) cached_tokens_store_after_kill: u64,
    pub(super) warm_within_a_tenth_of_cold: bool,
    /// Whether every warm answer, from pages or from the store, is the cold answer.
    pub(super) greedy_identical_full_vs_cached: bool,
    /// `attend` with the demo's target mass.
    pub(super) retrieval: Retrieval,
    pub(super) retrieval_rows: Retrieval,
    pub(super) bytes_pushed: u64,
    pub(super) bytes_loaded: u64,
    pub(super) decode_tokens_per_second: f64,
    pub(super) failures: Vec<String>,
    pub(super) version: &'static str,
    pub(super) profile: &'static str,
    pub(super) machine: Machine,
    rows: Vec<Row>,
}

/// What retrieval attention did, over all questions.
#[derive(Debug, Serialize)]
pub(super) struct Retrieval {
    pub(super) asked_for: String,
    /// Keys scored, of those that could be searched.
    pub(super) keys_scanned_fraction: f64,
    /// Keys that took part in the result, of query head and searchable key pairs.
    pub(super) keys_attended_fraction: f64,
    pub(super) mass_covered_p50: f64,
    pub(super) mass_covered_min: f64,
    /// Share of decoded tokens equal to full attention's, teacher-forced.
    pub(super) top1_agreement: f64,
    /// Mean negative log-likelihood of those tokens, less that under full attention, in nats.
    pub(super) nll_difference: f64,
    pub(super) forced_tokens: usize,
    /// Index that served.
    pub(super) index: String,
    pub(super) search_hidden: f64,
    /// Share of the rows of replies that the worker had kept.
    pub(super) rows_kept_fraction: f64,
    pub(super) retrieved_bytes_per_token: f64,
    pub(super) ttft_ms: f64,
    pub(super) decode_tokens_per_second: f64,
    pub(super) fell_back: usize,
}

impl Report {
    /// Takes an answer and checks what must hold for it.
    pub(super) fn note(&mut self, run: Run, index: usize, asked: Asked) {
        let measured = Measured::from(&asked.answer);
        let question = index + 1;
        let cached = match run {
            Run::Cold => measured.cached_tokens == 0,
            Run::Warm => measured.cached_tokens > 0,
            Run::Restarted | Run::Killed => measured.cached_tokens_store > 0,
            Run::Attend | Run::Rows => true,
        };
        if !cached {
            self.failures.push(format!(
                "question {question}, {}: {} of {} prompt tokens came from a cache ({} from the store)",
                run.name(),
                measured.cached_tokens,
                measured.prompt_tokens,
                measured.cached_tokens_store
            ));
        }
        if matches!(run, Run::Warm | Run::Restarted | Run::Killed) && !self.same_as_cold(question - 1, &measured) {
            self.failures.push(format!(
                "question {question}, {}: the answer is not the cold answer",
                run.name()
            ));
        }
        if let Some(reason) = measured.fallback_reason.as_ref().filter(|_| measured.fell_back) {
            self.failures.push(format!(
                "question {question}, {}: fell back to full attention: {reason}",
                run.name()
            ));
        }
        self.rows.push(Row {
            run,
            question: asked.question,
            measured,
        });
    }

    pub(super) fn note_stat(&mut self, stat: &StoreStat) {
        self.bytes_pushed += stat.bytes_pushed;
        self.bytes_loaded += stat.bytes_loaded;
    }

    fn of(&self, run: Run) -> impl Iterator<Item = &Measured> {
        self.rows
            .iter()
            .filter(move |row| row.run == run)
            .map(|row| &row.measured)
    }

    fn same_as_cold(&self, index: usize, warm: &Measured) -> bool {
        self.of(Run::Cold)
            .nth(index)
            .is_some_and(|cold| cold.text == warm.text && cold.completion_tokens == warm.completion_tokens)
    }

    fn median_of(&self, run: Run, figure: impl Fn(&Measured) -> f64) -> f64 {
        median(self.of(run).map(figure).collect())
    }

    pub(super) fn finish(&self, file: &ModelFile, max_tokens: u32) -> Finished {
        let ttft = |run| self.median_of(run, |measured| measured.ttft_ms);
        let count = |run, figure: fn(&Measured) -> u64| self.median_of(run, |measured| figure(measured) as f64) as u64;
        let warm = [Run::Warm, Run::Restarted, Run::Killed];
        let identical = warm.iter().all(|run| {
            self.of(*run).count() > 0
                && self
                    .of(*run)
                    .enumerate()
                    .all(|(index, measured)| self.same_as_cold(index, measured))
        });
        let group = file.shape().q_heads as f64 / file.shape().kv_heads as f64;
        Finished {
            document: document::NAME,
            model: file.name().to_owned(),
            questions: self.of(Run::Cold).count(),
            max_tokens,
            prompt_tokens: count(Run::Cold, |measured| measured.prompt_tokens),
            ttft_cold_ms: ttft(Run::Cold),
            ttft_cold_pushing_ms: self.filling.as_ref().map_or(0.0, |measured| measured.ttft_ms),
            ttft_warm_ms: ttft(Run::Warm),
            ttft_warm_after_restart_ms: ttft(Run::Restarted),
            ttft_warm_after_kill_ms: ttft(Run::Killed),
            cached_tokens_warm: count(Run::Warm, |measured| measured.cached_tokens),
            cached_tokens_store_after_restart: count(Run::Restarted, |measured| measured.cached_tokens_store),
            cached_tokens_store_after_kill: count(Run::Killed, |measured| measured.cached_tokens_store),
            warm_within_a_tenth_of_cold: warm.iter().all(|run| ttft(*run) * 10.0 <= ttft(Run::Cold)),
            greedy_identical_full_vs_cached: identical,
            retrieval: self.retrieval(Run::Attend, group, format!("attend, target_mass {TARGET_MASS}")),
            retrieval_rows: self.retrieval(Run::Rows, group, format!("rows, k {ROWS_K}")),
            bytes_pushed: self.bytes_pushed,
            bytes_loaded: self.bytes_loaded,
            decode_tokens_per_second: self.decode_speed(Run::Warm),
            failures: self.failures.clone(),
            version: VERSION,
            profile: PROFILE,
            machine: Machine::here(),
            rows: self.rows.clone(),
        }
    }

    /// `group`: query heads per KV head.
    fn retrieval(&self, run: Run, group: f64, asked_for: String) -> Retrieval {
        let sum = |figure: fn(&Measured) -> u64| self.of(run).map(figure).sum::<u64>() as f64;
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let keys = sum(|measured| measured.keys_total);
        let forced = || {
            self.forced
                .iter()
                .filter(|forced| forced.run == run && !forced.fell_back)
        };
        let forced_tokens = forced().map(|forced| forced.tokens).sum();
        let agreeing: usize = forced().map(|forced| forced.agreeing).sum();
        Retrieval {
            asked_for,
            keys_scanned_fraction: share(sum(|measured| measured.keys_scanned), keys),
            keys_attended_fraction: share(sum(|measured| measured.keys_attended), keys * group),
            mass_covered_p50: self.median_of(run, |measured| measured.mass_covered_p50),
            mass_covered_min: self
                .of(run)
                .map(|measured| measured.mass_covered_min)
                .fold(1.0, f64::min),
            top1_agreement: share(agreeing as f64, forced_tokens as f64),
            nll_difference: share(
                forced()
                    .map(|forced| forced.nll_difference * forced.tokens as f64)
                    .sum(),
                forced_tokens as f64,
            ),
            forced_tokens,
            index: self
                .of(run)
                .find_map(|measured| measured.index.clone())
                .unwrap_or_default(),
            search_hidden: self.median_of(run, |measured| measured.search_hidden),
            rows_kept_fraction: share(sum(|measured| measured.rows_kept), sum(|measured| measured.rows)),
            retrieved_bytes_per_token: share(
                sum(|measured| measured.retrieved_bytes),
                sum(|measured| measured.completion_tokens.saturating_sub(1)),
            ),
            ttft_ms: self.median_of(run, |measured| measured.ttft_ms),
            decode_tokens_per_second: self.decode_speed(run),
            fell_back: self.of(run).filter(|measured| measured.fell_back).count(),
        }
    }

    fn decode_speed(&self, run: Run) -> f64 {
        median(
            self.of(run)
                .filter_map(|measured| measured.decode_tokens_per_second)
                .collect(),
        )
    }
}

impl Finished {
    /// The figures of one way of asking, for the table: first token in ms, prompt tokens found, decode tokens per second.
    pub(super) fn line(&self, run: Run) -> (f64, u64, f64) {
        let of = |figure: fn(&Measured) -> f64| {
            median(
                self.rows
                    .iter()
                    .filter(|row| row.run == run)
                    .map(|row| figure(&row.measured))
                    .collect(),
            )
        };
        let speeds = self
            .rows
            .iter()
            .filter(|row| row.run == run)
            .filter_map(|row| row.measured.decode_tokens_per_second);
        (
            of(|measured| measured.ttft_ms),
            of(|measured| measured.cached_tokens as f64) as u64,
            median(speeds.collect()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{super::ask::Kvasir, *};

    fn answer(text: &str, device: u64, store: u64) -> Asked {
        let kvasir = Kvasir {
            cached_tokens: device + store,
            cached_tokens_device: device,
            cached_tokens_store: store,
            ..Default::default()
        };
        Asked::new(
            "?",
            Answer {
                text: text.to_owned(),
                ttft_ms: 1.0,
                prompt_tokens: 100,
                completion_tokens: 2,
                kvasir,
            },
        )
    }

    #[test]
    fn what_must_hold_is_checked() {
        let table = [
            ("warm from pages", Run::Warm, answer("a", 64, 0), ""),
            (
                "not warm",
                Run::Warm,
                answer("a", 0, 0),
                "0 of 100 prompt tokens came from a cache",
            ),
            (
                "differs",
                Run::Warm,
                answer("b", 64, 0),
                "the answer is not the cold answer",
            ),
            ("from the store", Run::Restarted, answer("a", 0, 64), ""),
            ("from pages only", Run::Killed, answer("a", 64, 0), "(0 from the store)"),
            ("retrieval may differ", Run::Attend, answer("b", 64, 0), ""),
        ];
        for (name, run, asked, expected) in table {
            let mut report = Report::default();
            report.note(Run::Cold, 0, answer("a", 0, 0));
            report.note(run, 0, asked);
            let failures = report.failures.join("; ");
            assert!(
                failures.contains(expected) && failures.is_empty() == expected.is_empty(),
                "{name}: {failures}"
            );
        }
    }

    #[test]
    fn choices_are_compared_one_by_one() {
        let of = |ids: &[u32], nll| Generated {
            ids: ids.to_vec(),
            fell_back: false,
            nll,
        };
        let compared = Forced::compare(Run::Attend, &of(&[1, 2, 3], 2.0), &of(&[1, 9, 3], 2.5)).expect("comparable");
        assert_eq!(
            (compared.tokens, compared.agreeing, compared.nll_difference),
            (3, 2, 0.5)
        );
        assert!(Forced::compare(Run::Attend, &of(&[1, 2, 3], 2.0), &of(&[1, 2], 2.0)).is_err());
        assert!(Forced::compare(Run::Attend, &of(&[], 0.0), &of(&[], 0.0)).is_err());
    }
}
