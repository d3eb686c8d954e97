//! Adds up what each index does over the recordings of a group of layers.

use anyhow::Result;
use kvasir_index::{
    Attend, HeadBasis, KeyIndex as _,
    evaluate::{AttendTally, Exact, MassTally, Recording, Setting, Tally},
};
use kvasir_simd::Pool;

use super::subject::{Prefill, Served, Subject};
use crate::{
    args::{IndexBenchArgs, IndexName},
    output::say,
};

/// Best keys of which recall is said.
pub(super) const RECALLS: [usize; 2] = [10, 100];
/// Shares of rows that the served path attends to. Twice as many are re-scored.
const ROWS: [f32; 3] = [0.01, 0.02, 0.05];
/// Masses that it is asked to cover in place of a number of rows.
const TARGETS: [f32; 2] = [0.95, 0.99];

/// Sums over the KV heads of some layers.
pub(super) struct Group {
    /// `"layers 0-2"`
    pub(super) name: &'static str,
    pub(super) layers: Vec<usize>,
    /// KV heads measured.
    pub(super) recordings: usize,
    pub(super) searched_keys: usize,
    pub(super) head_dim: usize,
    pub(super) heads: usize,
    pub(super) indexes: Vec<IndexSums>,
    pub(super) served: Vec<ServedSums>,
    pub(super) served_bytes: usize,
    pub(super) served_keys: usize,
}

pub(super) struct IndexSums {
    pub(super) name: IndexName,
    pub(super) build_seconds: Vec<f64>,
    pub(super) bytes: usize,
    pub(super) keys: usize,
    /// Whether its searches say what they cost.
    pub(super) counts: bool,
    pub(super) efforts: Vec<EffortSums>,
    pub(super) mass: MassTally,
}

pub(super) struct EffortSums {
    pub(super) effort: f32,
    pub(super) plain: Tally,
    /// With the index's own estimate of what it did not score.
    pub(super) estimated: Option<Tally>,
    pub(super) micros: Vec<f64>,
}

pub(super) struct ServedSums {
    pub(super) how: Attend,
    pub(super) tally: AttendTally,
    pub(super) micros: Vec<f64>,
}

impl Group {
    pub(super) fn new(name: &'static str, args: &IndexBenchArgs) -> Self {
        let index = |&name: &IndexName| IndexSums {
            name,
            build_seconds: Vec::new(),
            bytes: 0,
            keys: 0,
            counts: true,
            efforts: efforts(args).into_iter().map(EffortSums::new).collect(),
            mass: MassTally::new(args.mass, &mass_efforts()),
        };
        let mut served = Vec::new();
        if args.indexes.contains(&IndexName::Sketch) {
            let by_rows = ROWS.map(|share| Attend {
                target_mass: 1.0,
                effort: 2.0 * share,
                ..Attend::default()
            });
            let by_mass = TARGETS.map(|target_mass| Attend {
                target_mass,
                ..Attend::default()
            });
            served.extend(by_rows.into_iter().chain(by_mass).map(|how| ServedSums {
                how,
                tally: AttendTally::default(),
                micros: Vec::new(),
            }));
        }
        Self {
            name,
            layers: Vec::new(),
            recordings: 0,
            searched_keys: 0,
            head_dim: 0,
            heads: 0,
            indexes: args.indexes.iter().map(index).collect(),
            served,
            served_bytes: 0,
            served_keys: 0,
        }
    }

    /// Measures every index on one KV head.
    pub(super) fn add(
        &mut self,
        recording: Recording<'_>,
        basis: &HeadBasis,
        args: &IndexBenchArgs,
        pool: &Pool,
    ) -> Result<()> {
        let setting = setting(args);
        let exact = Exact::of(recording, &setting, RECALLS[1], pool)?;
        let rows = setting.prefill(&recording) * recording.head_dim;
        // Of all query heads together, so each token sampled gives as many.
        let stride = (recording.heads as f64 / args.samples).round().max(1.0) as usize;
        let samples = recording.samples(&setting, stride);
        let prefill = Prefill {
            keys: &recording.keys[..rows],
            values: &recording.values[..rows],
            head_dim: recording.head_dim,
            samples: &samples,
            basis,
        };
        for sums in &mut self.indexes {
            let subject = Subject::build(sums.name, &prefill, pool)?;
            sums.build_seconds.push(subject.build_seconds);
            sums.bytes += subject.bytes();
            sums.keys += subject.keys();
            sums.counts = subject.counts();
            sums.add(&subject, &exact)?;
            say(format_args!(
                "{}: built in {:.1} s and measured",
                subject.name(),
                subject.build_seconds
            ));
        }
        if !self.served.is_empty() {
            let mut served = Served::build(&prefill)?;
            self.served_bytes += served.bytes();
            self.served_keys += rows / recording.head_dim;
            for sums in &mut self.served {
                let mut how = sums.how;
                if how.target_mass >= 1.0 {
                    // By rows: half of what is re-scored is attended to.
                    how.k_max = Some((f64::from(how.effort) / 2.0 * exact.searched() as f64).ceil() as usize);
                }
                sums.tally.add(&exact, served.attend(how))?;
                sums.micros.append(&mut served.take_micros());
            }
        }
        self.recordings += 1;
        self.searched_keys = exact.searched();
        (self.head_dim, self.heads) = (recording.head_dim, recording.heads);
        Ok(())
    }
}

impl IndexSums {
    fn add(&mut self, subject: &Subject, exact: &Exact<'_>) -> Result<()> {
        for sums in &mut self.efforts {
            let k = subject.wanted(sums.effort, RECALLS[1]);
            sums.plain.add(subject, exact, k, sums.effort, None)?;
            sums.micros.append(&mut subject.take_micros());
            if let Some(estimate) = subject.estimate() {
                let tally = sums.estimated.get_or_insert_with(|| Tally::new(&RECALLS));
                tally.add(subject, exact, k, sums.effort, Some(&estimate))?;
                subject.take_micros();
            }
        }
        self.mass.add(subject, exact)?;
        subject.take_micros();
        Ok(())
    }
}

impl EffortSums {
    fn new(effort: f32) -> Self {
        Self {
            effort,
            plain: Tally::new(&RECALLS),
            estimated: None,
            micros: Vec::new(),
        }
    }
}

/// Which tokens of a recording are decode steps, and which the worker keeps.
pub(super) fn setting(args: &IndexBenchArgs) -> Setting {
    Setting {
        stride: args.stride,
        ..Setting::default()
    }
}

/// Rising, each once.
fn efforts(args: &IndexBenchArgs) -> Vec<f32> {
    let mut efforts = args.efforts.clone();
    efforts.sort_unstable_by(f32::total_cmp);
    efforts.dedup();
    efforts
}

/// Efforts that are tried for a mass: each a quarter more than the one before, up to every key.
fn mass_efforts() -> Vec<f32> {
    let rising = (0..)
        .map(|step| 0.002 * 1.25_f32.powi(step))
        .take_while(|effort| *effort < 1.0);
    rising.chain([1.0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn efforts_for_a_mass_rise_to_every_key() {
        let efforts = mass_efforts();
        assert!(efforts.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((efforts[0], efforts.last()), (0.002, Some(&1.0)));
        assert!((24..=32).contains(&efforts.len()), "{}", efforts.len());
    }
}
