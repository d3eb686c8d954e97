//! Progress on standard error: a bar for a person, lines where no terminal is.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::say;

pub(super) struct Progress {
    bar: ProgressBar,
    /// What stands in the line of the step that runs.
    now: String,
    steps: usize,
    done: usize,
    begun: Instant,
}

impl Progress {
    pub(super) fn new(steps: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} [{elapsed_precise}] {wide_bar} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self {
            bar,
            now: String::new(),
            steps,
            done: 0,
            begun: Instant::now(),
        }
    }

    /// The next of the counted steps begins.
    pub(super) fn step(&mut self, what: impl std::fmt::Display) {
        self.now = what.to_string();
        self.bar.set_position(self.done as u64);
        self.done += 1;
        self.show(&self.now);
    }

    /// Something on the way that is not counted.
    pub(super) fn doing(&mut self, what: impl std::fmt::Display) {
        self.show(&what.to_string());
    }

    /// The figure of the step that ended.
    pub(super) fn measured(&self, what: impl std::fmt::Display) {
        let line = format!("{}: {what}", self.now);
        if self.bar.is_hidden() {
            say(line);
        } else {
            self.bar.println(line);
        }
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn show(&self, what: &str) {
        if self.bar.is_hidden() {
            let seconds = self.begun.elapsed().as_secs_f32();
            say(format_args!("[{seconds:6.1} s, {}/{}] {what}", self.done, self.steps));
        } else {
            self.bar.set_message(what.to_owned());
        }
    }
}
