//! A row of the matrix, and one run of it.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::{
        Once,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rand::{SeedableRng, rngs::StdRng};
use serde::Serialize;

use crate::{Tally, Tier};

/// How often, and from which seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Of everything random in the run.
    pub seed: u64,
    /// Faults to inflict, about: a row rounds to what it does at a time.
    pub count: u64,
}

/// One kind of fault.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What it is called on the command line.
    pub name: &'static str,
    /// Its number in the fault matrix, where it has one.
    pub number: Option<u8>,
    /// What happens.
    pub fault: &'static str,
    /// Faults in the sample that every change is tested with.
    pub sample: u64,
    /// Faults in a full run.
    pub full: u64,
    /// Tiers that must have served for the run to mean anything.
    pub(crate) tiers: &'static [Tier],
    pub(crate) inflict: fn(&mut Run) -> Result<()>,
}

/// What a row works with.
#[derive(Debug)]
pub struct Run {
    /// What was asked for.
    pub plan: Plan,
    /// The run's only source of chance.
    pub rng: StdRng,
    /// What was done so far.
    pub tally: Tally,
}

/// What came of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Name of the row.
    pub row: &'static str,
    /// Its number in the fault matrix.
    pub number: Option<u8>,
    /// How it was run.
    pub plan: Plan,
    /// What was done.
    pub tally: Tally,
    /// How long it took.
    pub seconds: f64,
    /// Why it does not pass, with the command that does it again; `None` if it passes.
    pub failure: Option<String>,
    /// Why the row could not be run on this machine.
    pub skipped: Option<String>,
}

/// A row cannot be run here. Not a failure, but to be said aloud.
#[derive(Debug)]
pub(crate) struct Skipped(pub(crate) String);

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// Panics of any thread of this process since the start.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Counts panics from now on; a thread of the store that dies of one tells nobody else.
fn watch_panics() {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            before(info);
        }));
    });
}

impl Row {
    /// Inflicts the row's faults and says what came of it. Does not panic: a panic inside is a death, and a failure.
    pub fn run(&self, plan: Plan) -> Outcome {
        watch_panics();
        let panics = PANICS.load(Ordering::Relaxed);
        let started = Instant::now();
        let mut run = Run {
            plan,
            rng: StdRng::seed_from_u64(plan.seed),
            tally: Tally::default(),
        };
        let inflicted = panic::catch_unwind(AssertUnwindSafe(|| (self.inflict)(&mut run)));
        let mut tally = run.tally;
        tally.deaths += PANICS.load(Ordering::Relaxed) - panics;
        let verdict = match inflicted {
            Ok(inflicted) => inflicted.and_then(|()| self.judge(&tally)),
            Err(_) => Err(anyhow::anyhow!("a panic ended the run")),
        };
        let (failure, skipped) = match verdict {
            Ok(()) => (None, None),
            Err(error) if error.is::<Skipped>() => (None, Some(error.to_string())),
            Err(error) => (Some(format!("{error:#}; again: {}", self.command(plan))), None),
        };
        Outcome {
            row: self.name,
            number: self.number,
            plan,
            tally,
            seconds: started.elapsed().as_secs_f64(),
            failure,
            skipped,
        }
    }

    fn judge(&self, tally: &Tally) -> Result<()> {
        if let Some(first) = &tally.first_wrong {
            bail!("{} reads gave wrong bytes, the first: {first}", tally.wrong);
        }
        if tally.deaths > 0 {
            bail!("{} deaths that were no kills", tally.deaths);
        }
        if tally.faults == 0 {
            bail!("no fault was inflicted");
        }
        for tier in self.tiers {
            if tally.hits.get(tier).is_none_or(|hits| *hits == 0) {
                bail!("tier {tier:?} served nothing, so the run proves nothing about it");
            }
        }
        Ok(())
    }

    fn command(&self, plan: Plan) -> String {
        format!("make faults ROWS={} SEED={} COUNT={}", self.name, plan.seed, plan.count)
    }
}

impl Run {
    /// Whether more faults are to come.
    pub(crate) fn wants_more(&self) -> bool {
        self.tally.faults < self.plan.count
    }

    /// One round after the other, by its number, until there were as many faults as were asked for.
    pub(crate) fn rounds(&mut self, mut one: impl FnMut(&mut Self, u64) -> Result<()>) -> Result<()> {
        let mut round = 0;
        while self.wants_more() {
            one(self, round).with_context(|| format!("round {round}"))?;
            round += 1;
            // A row that meets nothing would go on for ever.
            ensure!(
                round < 20 * self.plan.count + 20,
                "{round} rounds inflicted only {} faults: {:?}",
                self.tally.faults,
                self.tally.notes
            );
        }
        Ok(())
    }

    /// Seed of what one round is made of.
    pub(crate) fn seed_of(&self, round: u64) -> u64 {
        self.plan.seed ^ round << 32
    }

    /// Keeps the longest of a row's times, in milliseconds.
    pub(crate) fn note_longest(&mut self, name: &'static str, time: Duration) {
        self.tally.note_max(name, time.as_millis() as u64);
    }
}
