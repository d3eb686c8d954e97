//! Progress through the tokens of a long forward, or through other things: a bar for a person, a line now and then where no terminal is.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::say;

/// Between two lines where no terminal is.
const LINE_EVERY: Duration = Duration::from_secs(10);

pub(crate) struct TokenBar {
    bar: ProgressBar,
    unit: &'static str,
    total: usize,
    done: usize,
    begun: Instant,
    last_line: Instant,
}

impl TokenBar {
    pub(crate) fn new(total: usize) -> Self {
        Self::of(total, "tokens")
    }

    /// Of something else than tokens.
    pub(crate) fn of(total: usize, unit: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
        let template =
            format!("{{spinner}} [{{elapsed_precise}}, {{eta}} left] {{wide_bar}} {{pos}}/{{len}} {unit} {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        Self {
            bar,
            unit,
            total,
            done: 0,
            begun: Instant::now(),
            last_line: Instant::now(),
        }
    }

    /// What the tokens that follow are for.
    pub(crate) fn doing(&self, what: &str) {
        self.bar.set_message(what.to_owned());
        if self.bar.is_hidden() {
            say(format_args!("{}/{} {}: {what}", self.done, self.total, self.unit));
        }
    }

    pub(crate) fn add(&mut self, tokens: usize) {
        self.done += tokens;
        self.bar.set_position(self.done as u64);
        if self.bar.is_hidden() && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let rate = self.done as f64 / self.begun.elapsed().as_secs_f64();
            say(format_args!(
                "{}/{} {}, {rate:.1} per second",
                self.done, self.total, self.unit
            ));
        }
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
