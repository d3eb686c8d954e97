//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use kvasir_index::Basis;
use kvasir_runtime::units::ByteSize;
use serde::Serialize;

/// A KV-cache service for LLM inference: store, worker and router in one binary.
#[derive(Debug, Parser)]
#[command(name = "kvasir", version, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where configuration comes from; later ones win: defaults, files, environment (`KVASIR__STORE__LISTEN`), flags.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct ConfigArgs {
    /// Read this file instead of $XDG_CONFIG_HOME/kvasir/kvasir.toml and ./kvasir.toml
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Set one key, as in --set store.host_bytes_max=1GiB; may be repeated
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Short for --set up.data_dir=DIR
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Short for --set model.path=FILE
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
    /// Short for --set worker.device=cpu or gpu
    #[arg(long, global = true, value_name = "DEVICE")]
    pub(crate) device: Option<String>,
    /// Short for --set worker.kv_bytes_max=SIZE: memory for keys and values, on a GPU its own
    #[arg(long, global = true, value_name = "SIZE")]
    pub(crate) gpu_memory: Option<ByteSize>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Store, worker and router in one process, until Ctrl-C or SIGTERM
    Up(ServeArgs),
    /// The store alone
    Store(ServeArgs),
    /// A worker alone; it finds its store at worker.store_url
    Worker(ServeArgs),
    /// The router alone; it finds its workers at router.workers
    Router(ServeArgs),
    /// What is configured, and where each value came from
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// A real model and a real document: cold, warm, after a restart, after kill -9, with retrieval attention
    Demo(DemoArgs),
    /// Learns from text where a model's queries look, and writes the basis that its keys are sketched in
    Calibrate(CalibrateArgs),
    /// Searches the sparse pattern of each head for prefill, as MInference does, and writes the file for worker.sparse_prefill
    SearchHeads(SearchHeadsArgs),
    /// The GPU's kernels
    Kernels {
        #[command(subcommand)]
        command: KernelsCommand,
    },
    /// Measurements
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// The version, and the versions of what is written and computed
    Version,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// Write the bound addresses as JSON to this file once everything is ready
    #[arg(long, value_name = "FILE")]
    pub(crate) ready_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Prints every key, its value and where the value came from
    Explain {
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// TOML with the source of each value as a comment
    Text,
    /// One JSON array
    Json,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {
    /// Folder for the report, the logs and the data
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    pub(crate) out: PathBuf,
    /// Questions to ask, at most as many as there are
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=5))]
    pub(crate) questions: u16,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub(crate) max_tokens: u32,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KernelsCommand {
    /// Compiles them ahead of the first start, as for an image; needs NVRTC and no GPU
    Build {
        /// Architecture, as in sm_90a for Hopper; may be repeated
        #[arg(long, value_name = "ARCH", required = true)]
        arch: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct CalibrateArgs {
    /// Text to calibrate on, UTF-8; the reference topics of python3 if none is named
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) text: Vec<PathBuf>,
    /// Tokens of it to read, in windows of the model's context; two windows if not given
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<usize>,
    /// Directions per head; at 4 bits each, 32 make sketches of 16 bytes
    #[arg(long, value_name = "N", default_value_t = Basis::RANK as u16, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) rank: u16,
    /// The file to write; beside the model, with .basis behind its name, if not given
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Threads; 0 takes one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

/// Which candidates a search tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SearchSpace {
    /// MInference's paper: A-shape, Vertical-Slash, Block-Sparse, all at one cost
    Paper,
    /// These, FlexPrefill and XAttention, all at one cost on the text
    Wide,
    /// MInference's released code: its fixed candidates, whose winners become Vertical-Slash
    Released,
}

/// What candidates are judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SearchCriterion {
    /// Least difference of the attention output, as in the paper
    OutputError,
    /// Most softmax mass kept, as in the released code
    KeptMass,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SearchHeadsArgs {
    /// Text to search on, UTF-8; the reference topics of python3 if none is named
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) text: Vec<PathBuf>,
    /// Tokens from the middle of the text; the model's context if not given
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<usize>,
    /// What is tried
    #[arg(long, value_enum, default_value_t = SearchSpace::Paper)]
    pub(crate) space: SearchSpace,
    /// What it is judged by; output-error unless the space is `released`
    #[arg(long, value_enum)]
    pub(crate) criterion: Option<SearchCriterion>,
    /// Cost of every candidate: that of the A-shape with so many first and local keys; if not given 1024,4096 scaled down to
    /// the text from 32,768 tokens
    #[arg(long, value_name = "INITIAL,LOCAL", value_delimiter = ',')]
    pub(crate) budget: Vec<u32>,
    /// Query rows of the kernel's tile for which cost is counted: 64 on the CPU, 128 on a GPU; worker.device says which if not
    /// given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) tile_rows: Option<u16>,
    /// Queries that are planned for together; worker.block_tokens if not given, which is what a worker does
    #[arg(long, value_name = "N")]
    pub(crate) chunk_tokens: Option<usize>,
    /// Queries before this position attend densely, and are not judged
    #[arg(long, value_name = "N", default_value_t = kvasir_sparse::DENSE_UP_TO)]
    pub(crate) dense_up_to: usize,
    /// Judge by each N-th query
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) every: u16,
    /// The file to write; beside the model, with .heads.json behind its name, if not given
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Threads; 0 takes one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// The model on a GPU: speed, what pushing costs, and its greedy tokens beside the CPU's
    Gpu(GpuArgs),
    /// Prefill and decode speed beside llama.cpp's, same model file, same threads
    Engine(EngineArgs),
    /// A store under load: throughput, latency percentiles, processor time per byte
    Store(StoreBenchArgs),
    /// A trace of block ids replayed against a store: hits by tier, bytes moved, time saved
    Trace(TraceArgs),
    /// Writes queries, keys and values of a real text as raw f16 files, for measurements elsewhere
    Dump(DumpArgs),
    /// Every attention index on the same queries and keys: recall, mass, errors, and what was read for them
    Index(IndexBenchArgs),
}

/// An index that `kvasir bench index` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum IndexName {
    /// Every key; its effort is how many of the exact best are attended to
    Flat,
    /// 16 bytes per key, scanned, the best scored again
    Sketch,
    /// RetrievalAttention's graph
    Roar,
    /// The same with edges by distance as queries see it
    RoarSeen,
    /// RetroInfer's clusters
    Wave,
    /// Pages with their least and greatest elements
    Quest,
    /// Lists of keys, as a vector database makes them
    Ivf,
    /// A graph of keys, as a vector database makes it
    Hnsw,
    /// faiss' lists
    #[cfg(feature = "faiss")]
    IvfFaiss,
    /// faiss' graph
    #[cfg(feature = "faiss")]
    HnswFaiss,
}

impl IndexName {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Flat => "flat",
            Self::Sketch => "sketch",
            Self::Roar => "roar",
            Self::RoarSeen => "roar-seen",
            Self::Wave => "wave",
            Self::Quest => "quest",
            Self::Ivf => "ivf",
            Self::Hnsw => "hnsw",
            #[cfg(feature = "faiss")]
            Self::IvfFaiss => "ivf-faiss",
            #[cfg(feature = "faiss")]
            Self::HnswFaiss => "hnsw-faiss",
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct IndexBenchArgs {
    /// A folder that `kvasir bench dump` wrote
    #[arg(value_name = "DIR")]
    pub(crate) dump: Option<PathBuf>,
    /// Make up one KV head of this many tokens instead, accepted only where it is like attention
    #[arg(long, value_name = "TOKENS", conflicts_with = "dump")]
    pub(crate) synthetic: Option<usize>,
    /// Elements per key of what is made up
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) head_dim: usize,
    /// Its query heads
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) heads: usize,
    /// Its seed, the first of four that are tried
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// A folder to write its arrays to, as a dump of one layer; made when missing
    #[arg(long, value_name = "DIR", requires = "synthetic")]
    pub(crate) write: Option<PathBuf>,
    /// Print the result as one JSON object on standard output; the table goes to standard error
    #[arg(long)]
    pub(crate) json: bool,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [IndexName::Flat, IndexName::Sketch, IndexName::Roar, IndexName::RoarSeen, IndexName::Wave, IndexName::Quest, IndexName::Ivf, IndexName::Hnsw])]
    pub(crate) indexes: Vec<IndexName>,
    /// Layers of the dump; all if none is named
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',')]
    pub(crate) layers: Vec<usize>,
    /// Shares of the keys that a search may score: the points of each curve
    #[arg(long, value_name = "X", value_delimiter = ',', default_values_t = [0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4])]
    pub(crate) efforts: Vec<f32>,
    /// Every so many of the last 256 tokens is a query
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) stride: usize,
    /// Prefill queries per key that `roar` is built from
    #[arg(long, value_name = "X", default_value_t = 0.4, value_parser = positive)]
    pub(crate) samples: f64,
    /// Share of the softmax mass for which the bytes that must be read are counted
    #[arg(long, value_name = "X", default_value_t = 0.95)]
    pub(crate) mass: f64,
    /// The basis of the dump's model, as `kvasir calibrate` wrote it; if not given the one beside the configured model, or else
    /// the one that comes with the program
    #[arg(long, value_name = "FILE", conflicts_with = "synthetic")]
    pub(crate) basis: Option<PathBuf>,
    /// Threads for builds; 0 takes one per core. Searches are timed on one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DumpArgs {
    /// The folder to write to; made when missing. SmolLM2's 8,192 tokens take 750 MB
    #[arg(value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Text to run, UTF-8; the reference topics of python3 if none is named
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) text: Vec<PathBuf>,
    /// Tokens from the beginning of the text; the model's context if not given
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<usize>,
    /// Layers to write; all that attend to the whole context if none is named
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',')]
    pub(crate) layers: Vec<usize>,
    /// Threads; 0 takes one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

#[derive(Debug, clap::Args)]
pub(crate) struct GpuArgs {
    /// Print the result as one JSON object on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// Rounds per measurement; the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=50))]
    pub(crate) rounds: u16,
    /// Tokens of each greedy text that is compared with the CPU's; 0 compares none
    #[arg(long, value_name = "N", default_value_t = 48)]
    pub(crate) compare: usize,
    /// Text to run, UTF-8; the reference topics of python3 if none is named
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) text: Vec<PathBuf>,
    /// Measure the shape of Llama-3-8B with weights of noise instead of the configured model: prefill with and without push, and
    /// whole decode steps over a long context, its keys and values on the GPU and at a store on this host
    #[arg(long)]
    pub(crate) made_up: bool,
    /// With --made-up: measure sparse prefill beside dense instead, and from which length on it pays
    #[arg(long, requires = "made_up")]
    pub(crate) sparse: bool,
    /// Tokens of that context
    #[arg(long, value_name = "N", default_value_t = 131_072, value_parser = clap::value_parser!(u32).range(4096..=1_048_576))]
    pub(crate) context: u32,
    /// Standard deviation of that model's attention scores, in nats: 90 % of the softmax mass lies on 4.3 % of the keys if it is 3
    #[arg(long, value_name = "X", default_value_t = 3.0)]
    pub(crate) score_deviation: f32,
    /// Where that store has its data while it runs
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EngineArgs {
    /// Print the result as one JSON object on standard output; the table goes to standard error
    #[arg(long)]
    pub(crate) json: bool,
    /// Rounds per measurement; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=50))]
    pub(crate) rounds: u16,
    /// Threads for both; 0 takes one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
    /// A Python with llama-cpp-python; `make peers` makes one at the place where this looks by itself
    #[arg(long, value_name = "FILE")]
    pub(crate) python: Option<PathBuf>,
    /// Measure Kvasir alone
    #[arg(long)]
    pub(crate) alone: bool,
}

/// What `kvasir bench store` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StoreOperation {
    /// Blocks of one context, as one stream
    Get,
    /// Blocks of a new context, as one stream, until each has its outcome
    Put,
    /// How much of a context of 256 blocks is held
    Match,
    /// Which of 256 blocks are held
    Exists,
    /// Gets with puts between them
    Mix,
}

/// Where the blocks lie that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StoreTier {
    /// In memory
    Host,
    /// On disk: the store has memory for a sixteenth of the data
    Disk,
    /// As objects in a folder: the store has memory and disk for a small part of the data. --data of 1GiB and more
    Object,
}

/// How a client and the store exchange blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StorePath {
    /// The fastest that both have: the store's memory, then a plain connection, then gRPC
    Auto,
    /// Streams of gRPC messages
    Grpc,
    /// Blocks over a plain connection
    Bulk,
    /// The store's memory, shared with clients on the same machine
    Local,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StoreBenchArgs {
    /// Print the result as one JSON object on standard output; the table goes to standard error
    #[arg(long)]
    pub(crate) json: bool,
    /// What to ask for
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [StoreOperation::Get, StoreOperation::Put, StoreOperation::Match])]
    pub(crate) operations: Vec<StoreOperation>,
    /// Bytes of a block, multiples of 16KiB
    #[arg(long, value_delimiter = ',', default_values_t = [ByteSize::kib(64), ByteSize::mib(1), ByteSize::mib(4)])]
    pub(crate) sizes: Vec<ByteSize>,
    /// Blocks per request
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16])]
    pub(crate) batches: Vec<usize>,
    /// Requests with more bytes than this are left out
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::mib(64))]
    pub(crate) operation_bytes_max: ByteSize,
    /// Bytes of the blocks that are read
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::mib(256))]
    pub(crate) data: ByteSize,
    /// A number that names the data: a later run with the same one finds it in a store that still has it. New each time
    /// if left out
    #[arg(long, value_name = "N")]
    pub(crate) data_set: Option<u64>,
    /// Where they lie
    #[arg(long, value_enum, default_value_t = StoreTier::Host)]
    pub(crate) tier: StoreTier,
    /// How blocks travel
    #[arg(long, value_enum, default_value_t = StorePath::Auto)]
    pub(crate) path: StorePath,
    /// Whether the client verifies the checksum of what it gets; off only to learn what that costs
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub(crate) verify: Switch,
    /// Blocking connections, each on a thread of its own, in place of --connections; by --path bulk or local
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
    /// Put this many bytes of new blocks through a store with --host of memory, with gets beside them, and watch its
    /// memory and the longest waits. The only measurement then; --sizes and --batches give one value each
    #[arg(long, value_name = "SIZE")]
    pub(crate) churn: Option<ByteSize>,
    /// Memory of the store that is started; if left out, what --tier wants, and 2GiB for --churn
    #[arg(long, value_name = "SIZE")]
    pub(crate) host: Option<ByteSize>,
    /// Connections
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) connections: usize,
    /// Requests under way per connection, closed loop
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) depth: usize,
    /// Requests per second over all connections: an open loop, whose latency counts from when a request was due
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) rate: Option<f64>,
    /// Seconds per measurement
    #[arg(long, value_name = "S", default_value_t = 3.0, value_parser = positive)]
    pub(crate) seconds: f64,
    /// How much more popular the first contexts are: the exponent of Zipf's law, 0 for none
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(crate) zipf: f64,
    /// Share of gets in `mix`
    #[arg(long, value_name = "X", default_value_t = 0.9)]
    pub(crate) read_share: f64,
    /// A store that runs already; else one is started
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// Its process, whose processor time and memory are then reported as well
    #[arg(long, value_name = "PID", requires = "store")]
    pub(crate) store_pid: Option<u32>,
    /// Folder for the data of a store that is started; removed at the end
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) out: PathBuf,
    /// Seed of payloads and choices
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TraceArgs {
    /// JSON lines with input_length and hash_ids, as Mooncake's published traces
    pub(crate) trace: PathBuf,
    /// Print the result as one JSON object on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// Bytes of keys and values per token of the modelled network, a multiple of 256B
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::bytes(256))]
    pub(crate) bytes_per_token: ByteSize,
    /// Tokens per second of the prefill that a hit saves
    #[arg(long, value_name = "N", default_value_t = 8000.0, value_parser = positive)]
    pub(crate) prefill_tokens_per_second: f64,
    /// Requests to replay, from the first; all if left out
    #[arg(long, value_name = "N")]
    pub(crate) requests: Option<usize>,
    /// Requests at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) in_flight: u16,
    /// Memory of the store that is started
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::gib(2))]
    pub(crate) host: ByteSize,
    /// Its disk; what is configured if left out
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk: Option<ByteSize>,
    /// A store that runs already; else one is started
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// Folder for the data of a store that is started; removed at the end
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) out: PathBuf,
    /// Seed of payloads
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("a number above 0 is wanted".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn flags_stand_before_or_after_the_command() {
        let table = [
            vec!["kvasir", "--set", "a.b=c", "--set", "d=e", "up"],
            vec!["kvasir", "up", "--set", "a.b=c", "--set", "d=e"],
        ];
        for line in table {
            let args = Args::try_parse_from(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
            assert_eq!(args.config.set, ["a.b=c", "d=e"], "{line:?}");
        }
        assert!(Args::try_parse_from(["kvasir", "down"]).is_err());
    }
}
