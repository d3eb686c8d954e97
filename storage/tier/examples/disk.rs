//! What the disk tier does beside fio on the same file system: `cargo run --release -p kvasir-tier --example disk -- DIR [GIB [churn]]`.
//!
//! Rounds alternate between the two and medians are compared: sequential and random reads of 1 MiB, writes with a sync for
//! each 16 MiB. Then, of the tier alone: bytes written for a payload byte and the longest read while segments are reclaimed,
//! and how long the tier takes to come back after a stop, after a kill and without an index. DIR is made, needs three times GIB
//! (default 2) of space, and is removed at the end.
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_block::{BlockHash, BlockKey, Checksum, LayerBlockKey, NamespaceId};
use kvasir_device::{Arena, ArenaConfig, HugePages};
use kvasir_tier::{DiskConfig, DiskRead, DiskTier, DiskWatch, Offer};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};

type Outcome<T> = Result<T, Box<dyn Error>>;

const ROUNDS: usize = 5;
const MIB: usize = 1 << 20;
/// Keys of one call: a prefix. The tier has 32 of them in flight, as fio has.
const KEYS: usize = 256;
/// A layer block of a small model.
const LAYER_BLOCK: usize = 48 << 10;

struct FreeWatch;

impl DiskWatch for FreeWatch {
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut(&BlockKey)) {
        blocks.iter().for_each(forget);
    }
}

fn main() -> Outcome<()> {
    let mut args = env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: disk DIR [GIB]")?);
    let gib: usize = args.next().map_or(Ok(2), |gib| gib.parse())?;
    let what = args.next();
    let only_churn = what.as_deref() == Some("churn");
    if what.as_deref() == Some("killed") {
        // The child of `recovery`: ends without a stop.
        fill(&open(&dir, 4 * gib)?, 0, gib * 1024 * MIB / LAYER_BLOCK, LAYER_BLOCK)?;
        std::process::abort();
    }
    fs::create_dir(&dir)?;
    if only_churn {
        let done = churn(&dir.join("churn"), gib);
        fs::remove_dir_all(&dir)?;
        return done;
    }
    let done = beside_fio(&dir, gib)
        .and_then(|()| churn(&dir.join("churn"), gib))
        .and_then(|()| recovery(&dir.join("recovery"), gib));
    fs::remove_dir_all(&dir)?;
    done
}

fn open(dir: &Path, gib: usize) -> Outcome<DiskTier> {
    let tier = DiskTier::open(DiskConfig {
        queue_bytes_max: 64 << 20,
        scrub_bytes_per_second: 0,
        ..DiskConfig::in_dir(dir, (gib as u64) << 30)
    })?;
    tier.start(Arc::new(FreeWatch))?;
    Ok(tier)
}

fn key(i: usize) -> LayerBlockKey {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&(i as u64 / 30).to_le_bytes());
    let block = NamespaceId::from_bytes([1; 32]).block(BlockHash::from_bytes(hash));
    block.layer((i % 30) as u16)
}

fn payload(bytes: usize) -> Bytes {
    let mut payload = vec![0; bytes];
    StdRng::seed_from_u64(1).fill(&mut payload[..]);
    Bytes::from(payload)
}

/// Puts `count` payloads and waits until they are durable.
fn fill(tier: &DiskTier, first: usize, count: usize, bytes: usize) -> Outcome<()> {
    let payload = payload(bytes);
    let checksum = Checksum::of(&payload);
    for i in first..first + count {
        put(tier, i, &payload, checksum)?;
    }
    Ok(tier.flush()?)
}

fn put(tier: &DiskTier, i: usize, payload: &Bytes, checksum: Checksum) -> Outcome<()> {
    loop {
        match tier.offer(key(i), payload.clone(), checksum) {
            Offer::Queued => return Ok(()),
            Offer::Full => std::thread::sleep(Duration::from_micros(500)),
            other => return Err(format!("layer block {i} was not taken: {other:?}").into()),
        }
    }
}

fn beside_fio(dir: &Path, gib: usize) -> Outcome<()> {
    let count = gib * 1024;
    let arena = Arena::new(ArenaConfig {
        bytes: (2 * KEYS * MIB) as u64,
        huge_pages: HugePages::Auto,
    })?;
    let (mut write, mut sequential, mut random) = (Pairs::default(), Pairs::default(), Pairs::default());
    for round in 0..ROUNDS {
        let home = dir.join("tier");
        let tier = open(&home, 2 * gib)?;
        let disk = &tier.stats().disks[0];
        if round == 0 {
            println!("{}, direct I/O: {}; {ROUNDS} rounds of {gib} GiB", disk.io, disk.direct);
        }
        let file = dir.join("fio");
        write.tier.push(rate(count, || fill(&tier, 0, count, MIB))?);
        write
            .fio
            .push(fio(&file, "write", gib, &["--iodepth=16", "--fdatasync=16"])?);
        let mut keys: Vec<LayerBlockKey> = (0..count).map(key).collect();
        sequential.tier.push(rate(count, || read(&tier, &arena, &keys))?);
        sequential.fio.push(fio(&file, "read", gib, &["--iodepth=32"])?);
        keys.shuffle(&mut StdRng::seed_from_u64(round as u64));
        random.tier.push(rate(count, || read(&tier, &arena, &keys))?);
        random.fio.push(fio(&file, "randread", gib, &["--iodepth=32"])?);
        drop(tier);
        fs::remove_dir_all(home)?;
        fs::remove_file(file)?;
    }
    write.tell("write 1 MiB, synced by 16 MiB");
    sequential.tell("read 1 MiB in order");
    random.tell("read 1 MiB at random");
    Ok(())
}

/// MiB per second.
fn rate(mib: usize, mut work: impl FnMut() -> Outcome<()>) -> Outcome<f64> {
    let start = Instant::now();
    work()?;
    Ok(mib as f64 / start.elapsed().as_secs_f64())
}

fn read(tier: &DiskTier, arena: &Arena, keys: &[LayerBlockKey]) -> Outcome<()> {
    for keys in keys.chunks(KEYS) {
        let reads = tier.get_many(keys, &mut |bytes| arena.try_reserve(bytes), None);
        if !reads.iter().all(|read| matches!(read, DiskRead::Hit { .. })) {
            return Err("a layer block is missing".into());
        }
    }
    Ok(())
}

/// MiB per second of one job.
fn fio(file: &Path, what: &str, gib: usize, more: &[&str]) -> Outcome<f64> {
    let output = Command::new("fio")
        .args(["--name=one", "--direct=1", "--ioengine=io_uring", "--bs=1M"])
        .args(["--output-format=terse", "--terse-version=3"])
        .args([format!("--rw={what}"), format!("--size={gib}G")])
        .arg(format!("--filename={}", file.display()))
        .args(more)
        .output()?;
    let line = String::from_utf8(output.stdout)?;
    // KiB per second of reads, of writes.
    let field = if what == "write" { 47 } else { 6 };
    let kib: f64 = line.split(';').nth(field).ok_or("fio said something else")?.parse()?;
    Ok(kib / 1024.0)
}

#[derive(Default)]
struct Pairs {
    tier: Vec<f64>,
    fio: Vec<f64>,
}

impl Pairs {
    fn tell(&mut self, what: &str) {
        let mut ratios: Vec<f64> = self.tier.iter().zip(&self.fio).map(|(tier, fio)| tier / fio).collect();
        let [tier, fio, ratio] = [&mut self.tier, &mut self.fio, &mut ratios].map(|values| {
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        });
        println!("{what}: tier {tier:.0} MiB/s, fio {fio:.0} MiB/s, median of the rounds' ratios {ratio:.2}");
    }
}

/// Three times as much as fits, while someone reads what is there.
fn churn(dir: &Path, gib: usize) -> Outcome<()> {
    let tier = open(dir, gib)?;
    let count = 3 * gib * 1024 * MIB / LAYER_BLOCK;
    let before = written()?;
    let (put_so_far, done) = (AtomicU32::new(1), AtomicBool::new(false));
    let payload = payload(LAYER_BLOCK);
    let checksum = Checksum::of(&payload);
    let mut took: Vec<Took> = std::thread::scope(|scope| -> Outcome<Vec<Took>> {
        let reader = scope.spawn(|| {
            let mut rng = StdRng::seed_from_u64(1);
            let mut took = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let i = rng.random_range(0..put_so_far.load(Ordering::Relaxed));
                let (start, waited) = (Instant::now(), waited());
                let read = tier.get(key(i as usize));
                if matches!(read, DiskRead::Hit { .. }) {
                    took.push(Took {
                        all: start.elapsed(),
                        for_processor: self::waited().saturating_sub(waited),
                    });
                }
            }
            took
        });
        let put = (0..count).try_for_each(|i| {
            put_so_far.store(i as u32 + 1, Ordering::Relaxed);
            put(&tier, i, &payload, checksum)
        });
        let flushed = put.and_then(|()| Ok(tier.flush()?));
        done.store(true, Ordering::Relaxed);
        let took = reader.join().map_err(|_| "the reader panicked")?;
        flushed.map(|()| took)
    })?;
    let amplification = (written()? - before) as f64 / (count * LAYER_BLOCK) as f64;
    let stats = tier.stats();
    drop(tier);
    fs::remove_dir_all(dir)?;
    let last = took.len().checked_sub(1).ok_or("not a single read was a hit")?;
    println!(
        "{} GiB of 48 KiB put through a limit of {gib} GiB: {} segments reclaimed, {amplification:.3} bytes written for a payload byte",
        3 * gib,
        stats.reclaimed_segments
    );
    let mut tell = |what: &str, time: fn(&Took) -> Duration| {
        took.sort_by_key(time);
        let [half, most, longest] = [last / 2, last - last / 1000, last].map(|at| time(&took[at]));
        println!(
            "{} reads meanwhile, {what}: median {half:?}, 99.9 % {most:?}, longest {longest:?}",
            took.len()
        );
    };
    tell("all their time", |took| took.all);
    tell("without what they waited for a processor", |took| {
        took.all.saturating_sub(took.for_processor)
    });
    Ok(())
}

/// How long a read took, and how much of that its thread could have run and did not.
#[derive(Clone, Copy)]
struct Took {
    all: Duration,
    for_processor: Duration,
}

/// How long this thread has waited for a processor, since its start; zero where the kernel does not say.
fn waited() -> Duration {
    let line = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = line.split_whitespace().nth(1).and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

/// Bytes that this process has sent to disks.
fn written() -> Outcome<u64> {
    let io = fs::read_to_string("/proc/self/io")?;
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(line.ok_or("no write_bytes in /proc/self/io")?.trim().parse()?)
}

/// How long `open` takes, for 10 GB of 48 KiB layer blocks.
fn recovery(dir: &Path, gib: usize) -> Outcome<()> {
    let child = Command::new(env::current_exe()?)
        .arg(dir)
        .arg(gib.to_string())
        .arg("killed")
        .status()?;
    if child.success() {
        return Err("the writer was to end by a signal".into());
    }
    reopen(dir, gib, "a kill")?;
    reopen(dir, gib, "a stop")?;
    fs::remove_dir_all(dir.join("index"))?;
    reopen(dir, gib, "the loss of the index")
}

fn reopen(dir: &Path, gib: usize, what: &str) -> Outcome<()> {
    let start = Instant::now();
    let tier = open(dir, 4 * gib)?;
    let took = start.elapsed().as_secs_f64();
    let found = tier.recovery();
    let gb = (found.layer_blocks as usize * LAYER_BLOCK) as f64 / 1e9;
    println!(
        "open after {what}: {took:.3} s for {} layer blocks ({gb:.1} GB), {} found by reading segments",
        found.layer_blocks, found.found_by_scan
    );
    Ok(())
}
