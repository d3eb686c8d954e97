//! The model crate from outside: files it must refuse, texts it must keep, bits that must not move, and an independent
//! forward that it must agree with. Tests over a made-up model run anywhere; those over SmolLM2-135M need the file that
//! `make model` puts into the cache folder, and fail without it.
#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges are what local attention takes"
)]

mod attention;
mod capture;
mod files;
mod gemma;
mod gemma_file;
mod golden;
mod invariance;
mod made_up;
mod smollm;
mod sparse;
mod steps;
mod tokens;
mod watch;
