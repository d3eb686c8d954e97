//! `[worker.attention]`: how decoding attends to its prompt, where a request does not say.

use kvasir_runtime::units::{ByteSize, HumanDuration};
use serde::{Deserialize, Serialize};

use super::InvalidConfig;

/// `[worker.attention]`: the defaults of a request's attention options.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionConfig {
    /// `full`, `rows`, `attend`, or `auto`: rows or attend, whichever has been faster.
    pub mode: AttentionMode,
    /// Keys per query head that `rows` brings.
    pub k: u32,
    /// Share of the softmax mass that `attend` covers, (0, 1], of which what the worker attends to by itself is a part.
    pub target_mass: f32,
    /// First tokens of the context that the worker attends to by itself.
    pub sink: u32,
    /// Last tokens of the context that the worker attends to by itself.
    pub window: u32,
    /// Index that is asked for: `best` takes the best that the store has for this model; `flat`, `sketch`; `roar` and `wave` are
    /// built by the store over contexts that ask for them, and serve from then on.
    pub index: IndexWanted,
    /// Whether `attend` estimates what it does not attend to.
    pub tail: bool,
    /// How `attend` bounds the mass that it missed: `none`, `statistical` (of sampled keys) or `deterministic` (reads more).
    pub certificate: Certificate,
    /// Largest bound of the missed mass that is accepted without looking further, (0, 1]; 0 accepts any.
    pub missed_mass_max: f32,
    /// Share of the keys that may be scored exactly, (0, 1]; 0 takes the store's default.
    pub effort: f32,
    /// First layer whose search is begun ahead, with a forecast of its queries. Forecasts of the layers before are poor.
    pub hint_from_layer: u32,
    /// How long the compute thread looks for the store's reply to a query before it sleeps, over a bulk connection; 0 to sleep at once. A
    /// reply that comes while it looks costs no wake-up of the thread, once per layer and token.
    pub reply_poll: HumanDuration,
    /// Most bytes of prefill queries that are sampled of a request that asks for `roar`, for the store to draw the index by; 0 samples
    /// none.
    pub query_sample_bytes: ByteSize,
    /// Most bytes of rows that a sequence in mode `rows` keeps of what it was sent; 0 keeps none.
    pub row_cache_bytes: ByteSize,
}

/// How a request's decoding attends to its prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionMode {
    /// To every key, in the worker's own pages.
    #[default]
    Full,
    /// To the static set, the new tokens, and the best keys, whose rows the store sends.
    Rows,
    /// To the static set and the new tokens; the store sends the finished partial over the rest.
    Attend,
    /// Rows or attend, whichever has been faster when the request begins.
    Auto,
}

impl AttentionMode {
    /// The word in configuration, requests and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Rows => "rows",
            Self::Attend => "attend",
            Self::Auto => "auto",
        }
    }
}

/// Which index is to serve a context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexWanted {
    /// The best that the store has.
    #[default]
    Best,
    /// The exact scan.
    Flat,
    /// Sketches of the keys, and exact scores of the best.
    Sketch,
    /// A graph that is drawn by the queries of earlier requests.
    Roar,
    /// Clusters of keys.
    Wave,
}

impl IndexWanted {
    /// The index of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "best" => Some(Self::Best),
            "flat" => Some(Self::Flat),
            "sketch" => Some(Self::Sketch),
            "roar" => Some(Self::Roar),
            "wave" => Some(Self::Wave),
            _ => None,
        }
    }
}

/// How the mass that a reply missed is bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Certificate {
    /// Not at all.
    #[default]
    None,
    /// From sampled keys: holds for nearly all replies.
    Statistical,
    /// For certain; the store reads more for it.
    Deterministic,
}

impl Certificate {
    /// The certificate of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "none" => Some(Self::None),
            "statistical" => Some(Self::Statistical),
            "deterministic" => Some(Self::Deterministic),
            _ => None,
        }
    }
}

impl Default for AttentionConfig {
    fn default() -> Self {
        Self {
            mode: AttentionMode::Full,
            k: 256,
            target_mass: 0.99,
            sink: 128,
            window: 512,
            index: IndexWanted::Best,
            tail: true,
            certificate: Certificate::None,
            missed_mass_max: 0.0,
            effort: 0.0,
            hint_from_layer: 3,
            reply_poll: HumanDuration::micros(50),
            query_sample_bytes: ByteSize::mib(32),
            row_cache_bytes: ByteSize::mib(32),
        }
    }
}

impl AttentionConfig {
    /// Checks the values; `parent` is the path that errors name.
    pub(crate) fn validate(&self, parent: &str) -> Result<(), InvalidConfig> {
        let refuse = |key: &str, problem: String| Err(InvalidConfig::new(&format!("{parent}.{key}"), problem));
        if let Some((key, problem)) = self.problem() {
            return refuse(key, problem);
        }
        Ok(())
    }

    /// The first value that cannot be, by its name, and what is wrong. Requests are checked by the same words.
    pub(crate) fn problem(&self) -> Option<(&'static str, String)> {
        // Written so that NaN fails too.
        let is_share = |value: f32| value > 0.0 && value <= 1.0;
        if !is_share(self.target_mass) {
            let problem = format!("{}: a share of the softmax mass lies in (0, 1]", self.target_mass);
            return Some(("target_mass", problem));
        }
        if self.k == 0 {
            return Some(("k", "0: rows need at least one key".to_owned()));
        }
        for (key, value) in [("missed_mass_max", self.missed_mass_max), ("effort", self.effort)] {
            if !is_share(value) && value != 0.0 {
                return Some((key, format!("{value}: a share lies in (0, 1], and 0 leaves it open")));
            }
        }
        if self.missed_mass_max > 0.0 && self.certificate == Certificate::None {
            let problem = "needs a certificate to hold against: ask for \"statistical\" or \"deterministic\" too";
            return Some(("missed_mass_max", problem.to_owned()));
        }
        None
    }
}
