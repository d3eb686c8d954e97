//! What it costs a prompt to push its blocks: to the host's memory alone, and through a worker's queue to a store on this host.

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};
use kvasir_block::BlockHash;
use kvasir_runtime::units::ByteSize;
use kvasir_worker::{Pusher, WorkerConfig};
use serde::Serialize;
use tokio::runtime::Runtime;

use super::forward::{Blocks, Forward, Waits};
use crate::{
    args::{ConfigArgs, GpuArgs},
    bench::store::{Host, Wanted, hash},
    measure::median,
    output::say,
};

/// Prompts that the store has memory for: the rounds of a measurement follow each other.
const PROMPTS_HELD: u64 = 3;

/// Seconds of a prefill, logits of the last token included; medians of rounds in turns. Costs are shares of `seconds`.
#[derive(Debug, Serialize)]
pub(super) struct PushCost {
    tokens: usize,
    step_tokens: usize,
    seconds: f64,
    tokens_per_second: f64,
    /// With every whole block sent to the host's page-locked memory, layer by layer, and let go there.
    landed_seconds: f64,
    landed_cost: f64,
    /// Share of that for which steps waited for page-locked memory; the GPU has work meanwhile.
    landed_waited: f64,
    /// Through a worker's queue (`worker.offload_queue_bytes_max`, `worker.offload_streams`) to a store that is a process on this host:
    /// with checksums, and dropping blocks rather than waiting for it.
    pushed_seconds: f64,
    push_cost: f64,
    pushed_waited: f64,
    /// Whole blocks of the prompt; those that the queue had no room for, and those that the store had in the end.
    blocks: usize,
    blocks_dropped: usize,
    blocks_held: usize,
    /// How long after the prompt the store had the last of them.
    settled_seconds: f64,
}

/// A store for pushes, and the queue to it.
pub(super) struct Pushing<'a> {
    runtime: &'a Runtime,
    host: Host,
    pusher: Pusher,
}

impl<'a> Pushing<'a> {
    /// Starts a store that has memory and disk for some prompts of `tokens` of what `forward` computes.
    pub(super) fn start(
        worker: &WorkerConfig,
        config: &ConfigArgs,
        out: &Path,
        runtime: &'a Runtime,
        forward: &Forward,
        tokens: usize,
    ) -> Result<Self> {
        let prompt = (tokens / forward.block_tokens() * forward.schema().block_bytes()) as u64;
        let room = ByteSize::bytes(PROMPTS_HELD * prompt + (1 << 30));
        let wanted = Wanted {
            running: None,
            running_pid: None,
            out,
            host_bytes: room,
            disk_bytes: Some(room),
            objects: false,
            context_bytes: None,
        };
        let host = runtime.block_on(Host::start(wanted, config))?;
        let worker = WorkerConfig {
            store_url: host.url().to_owned(),
            tenant: host.tenant()?.as_str().to_owned(),
            ..worker.clone()
        };
        let pusher = runtime.block_on(Pusher::start(&worker, forward.schema()))?;
        Ok(Self { runtime, host, pusher })
    }

    /// Measures a prompt as the first sequence. The first round, which loads kernels and makes room, is not counted.
    pub(super) fn measure(
        &self,
        forward: &mut Forward,
        tokens: &[u32],
        step_tokens: usize,
        args: &GpuArgs,
    ) -> Result<PushCost> {
        let blocks = tokens.len() / forward.block_tokens();
        ensure!(blocks > 0, "a prompt of {} tokens has no whole block", tokens.len());
        let mut prompt = |blocks: Blocks<'_>| -> Result<(f64, Waits)> {
            let begun = Instant::now();
            let (_, waits) = forward.prompt_with(0, tokens, step_tokens, blocks)?;
            Ok((begun.elapsed().as_secs_f64(), waits))
        };
        let (mut alone, mut landed, mut pushed) = (Vec::new(), Turns::default(), Turns::default());
        let (mut dropped, mut held, mut settled) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=args.rounds {
            // Names that no round had before: what the store holds is not pushed again.
            let run = self.host.next_run();
            let chain: Vec<BlockHash> = (0..blocks as u64).map(|at| hash(run, 0, at)).collect();
            let (seconds, _) = prompt(Blocks::Stay)?;
            let landing = prompt(Blocks::Land)?;
            let pushing = prompt(Blocks::Push(&self.pusher, &chain))?;
            let outcome = self.runtime.block_on(self.pusher.settle(&chain))?;
            if round > 0 {
                alone.push(seconds);
                landed.add(landing);
                pushed.add(pushing);
                dropped.push(pushing.1.dropped as f64);
                held.push(outcome.held as f64);
                settled.push(outcome.settled.as_secs_f64());
            }
        }
        let seconds = median(alone);
        let ((landed_seconds, landed_waited), (pushed_seconds, pushed_waited)) = (landed.medians(), pushed.medians());
        Ok(PushCost {
            tokens: tokens.len(),
            step_tokens: step_tokens.min(tokens.len()),
            seconds,
            tokens_per_second: tokens.len() as f64 / seconds,
            landed_seconds,
            landed_cost: landed_seconds / seconds - 1.0,
            landed_waited,
            pushed_seconds,
            push_cost: pushed_seconds / seconds - 1.0,
            pushed_waited,
            blocks,
            blocks_dropped: median(dropped) as usize,
            blocks_held: median(held) as usize,
            settled_seconds: median(settled),
        })
    }

    pub(super) fn stop(self) -> Result<()> {
        self.runtime.block_on(self.pusher.stop());
        self.runtime.block_on(self.host.stop())
    }
}

/// Seconds of rounds, and shares of them that were waited.
#[derive(Default)]
struct Turns {
    seconds: Vec<f64>,
    waited: Vec<f64>,
}

impl Turns {
    fn add(&mut self, (seconds, waits): (f64, Waits)) {
        self.seconds.push(seconds);
        self.waited.push(waits.room.as_secs_f64() / seconds);
    }

    fn medians(self) -> (f64, f64) {
        (median(self.seconds), median(self.waited))
    }
}

pub(super) fn show(row: &PushCost) {
    say(format_args!(
        "prefill {:6}: {:.3} s ({:.0} tok/s), to the host {:.3} s ({:+.1} %, {:.1} % of it waiting for room), pushed {:.3} s ({:+.1} %, {:.1} %): \
         of {} blocks {} dropped, {} held by the store {:.2} s later",
        row.tokens,
        row.seconds,
        row.tokens_per_second,
        row.landed_seconds,
        100.0 * row.landed_cost,
        100.0 * row.landed_waited,
        row.pushed_seconds,
        100.0 * row.push_cost,
        100.0 * row.pushed_waited,
        row.blocks,
        row.blocks_dropped,
        row.blocks_held,
        row.settled_seconds
    ));
}
