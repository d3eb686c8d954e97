//! A real worker with the real model, spoken to as a router does.

mod faults;
mod generate;
mod harness;
mod peer;
mod push;
mod samples;
mod sparse;
