//! `[router]`: every key with its unit and with the person who would turn it.

use std::net::{Ipv4Addr, SocketAddr};

use kvasir_runtime::{
    address::{ExposedAddress, loopback_or_allowed},
    units::{ByteSize, HumanDuration},
};
use serde::{Deserialize, Serialize};

/// `[router]`: the OpenAI front.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterConfig {
    /// Where HTTP is served: the OpenAI API, `/metrics`, `/healthz`, `/readyz`.
    pub listen: SocketAddr,
    /// Allows `listen` to be reachable from other machines. There is no authentication yet.
    pub allow_remote: bool,
    /// gRPC addresses of the workers, as `http://host:port`.
    pub workers: Vec<String>,
    /// gRPC address of the store that the workers share; its block events say what any worker could load. Empty for
    /// none: then only the workers' own caches count.
    pub store_url: String,
    /// Tokens per block, as the workers have it; a worker that differs is refused.
    pub block_tokens: u16,
    /// Prompts in flight; the next one is answered 429. For the operator who sees memory grow or
    /// `kvasir_router_requests_total{status="429"}` rise.
    pub in_flight_max: usize,
    /// Largest request body, in bytes; a larger one is answered 413.
    pub body_bytes_max: ByteSize,
    /// Most prompts in one `/v1/completions` request; never more than `in_flight_max`.
    pub prompts_max: usize,
    /// How long a client may take to send its request body.
    pub body_timeout: HumanDuration,
    /// How long connecting to a worker, or asking it who it is, may take.
    pub connect_timeout: HumanDuration,
    /// How long a request may wait for its first token: queue and prefill. For the operator whose prompts are long and
    /// whose workers are slow.
    pub first_token_timeout: HumanDuration,
    /// Longest silence of a worker between two tokens.
    pub idle_timeout: HumanDuration,
    /// How long a client may leave a piece of a stream unread before it is cut off.
    pub stall_timeout: HumanDuration,
    /// How long a stopping router lets answers in flight finish.
    pub drain_grace: HumanDuration,
    /// Blocks remembered in the prefix map, about 150 bytes each; the oldest are forgotten first. For the operator who
    /// sees `kvasir_router_prefix_map_forgotten_total` rise.
    pub prefix_map_blocks_max: usize,
    /// What weighs how much when a worker is chosen.
    pub policy: PolicyConfig,
}

/// `[router.policy]`: the price of a worker, in prompt tokens that it would have to compute. The lowest price wins.
///
/// For the operator who compares `kvasir_router_cached_tokens_total` with the spread of
/// `kvasir_router_worker_chosen_total`: hits too rare, raise nothing and lower the load weights; one worker hot, raise them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// Price of a prompt token that the store has and the worker would load: 0 is free, 1 is as dear as computing it.
    pub load_weight: f64,
    /// Price of a prompt token of other requests that waits to be computed there.
    pub prefill_weight: f64,
    /// Price of a sequence that is running there, in tokens.
    pub running_tokens: f64,
    /// Price of a sequence that is waiting there, in tokens, besides its prompt.
    pub waiting_tokens: f64,
    /// Price of a page pool that is wholly in use, in tokens; a half-used one costs half.
    pub kv_usage_tokens: f64,
}

/// A value that cannot be served with: the key, what is wrong, what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The address is reachable from outside.
    #[error(transparent)]
    Exposed(#[from] ExposedAddress),
    /// One value is out of range.
    #[error("{key} = {found}: {remedy}")]
    Value {
        /// Dotted key.
        key: String,
        /// What it holds.
        found: String,
        /// What to do.
        remedy: String,
    },
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7400)),
            allow_remote: false,
            workers: vec!["http://127.0.0.1:7402".to_owned()],
            store_url: "http://127.0.0.1:7401".to_owned(),
            block_tokens: 64,
            in_flight_max: 256,
            body_bytes_max: ByteSize::mib(4),
            prompts_max: 32,
            body_timeout: HumanDuration::secs(30),
            connect_timeout: HumanDuration::secs(2),
            first_token_timeout: HumanDuration::secs(300),
            idle_timeout: HumanDuration::secs(60),
            stall_timeout: HumanDuration::secs(30),
            drain_grace: HumanDuration::secs(10),
            prefix_map_blocks_max: 262_144,
            policy: PolicyConfig::default(),
        }
    }
}

impl Default for PolicyConfig {
    /// Loading a token costs about a tenth of computing it on a CPU; a running sequence takes about 32 tokens' worth of
    /// the steps that a prefill would otherwise have.
    fn default() -> Self {
        Self {
            load_weight: 0.1,
            prefill_weight: 1.0,
            running_tokens: 32.0,
            waiting_tokens: 64.0,
            kv_usage_tokens: 256.0,
        }
    }
}

impl RouterConfig {
    /// Checks what serde cannot: ranges and relations.
    ///
    /// # Errors
    /// [`ConfigError`] with the first key that cannot be served with.
    pub fn check(&self) -> Result<(), ConfigError> {
        loopback_or_allowed("router.listen", self.listen, "router.allow_remote", self.allow_remote)?;
        if self.workers.is_empty() {
            return Err(value(
                "router.workers",
                "[]",
                "name at least one worker, as in [\"http://127.0.0.1:7402\"]",
            ));
        }
        for (index, url) in self.workers.iter().enumerate() {
            check_url(&format!("router.workers[{index}]"), url)?;
            if self.workers[..index].contains(url) {
                return Err(value(
                    "router.workers",
                    url,
                    "stands there twice: name each worker once",
                ));
            }
        }
        if !self.store_url.is_empty() {
            check_url("router.store_url", &self.store_url)?;
        }
        let counts = [
            ("router.block_tokens", usize::from(self.block_tokens)),
            ("router.in_flight_max", self.in_flight_max),
            ("router.body_bytes_max", self.body_bytes_max.as_usize()),
            ("router.prompts_max", self.prompts_max),
            ("router.prefix_map_blocks_max", self.prefix_map_blocks_max),
        ];
        if let Some((key, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(value(key, "0", "must be at least 1"));
        }
        let waits = [
            ("router.body_timeout", self.body_timeout),
            ("router.connect_timeout", self.connect_timeout),
            ("router.first_token_timeout", self.first_token_timeout),
            ("router.idle_timeout", self.idle_timeout),
            ("router.stall_timeout", self.stall_timeout),
        ];
        if let Some((key, _)) = waits.into_iter().find(|(_, wait)| wait.get().is_zero()) {
            return Err(value(
                key,
                "0s",
                "nothing could succeed in no time: write a duration such as \"30s\"",
            ));
        }
        self.policy.check()
    }
}

impl PolicyConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let weights = [
            ("load_weight", self.load_weight),
            ("prefill_weight", self.prefill_weight),
            ("running_tokens", self.running_tokens),
            ("waiting_tokens", self.waiting_tokens),
            ("kv_usage_tokens", self.kv_usage_tokens),
        ];
        match weights
            .into_iter()
            .find(|(_, weight)| !(weight.is_finite() && *weight >= 0.0))
        {
            Some((key, weight)) => Err(value(
                format!("router.policy.{key}"),
                weight.to_string(),
                "a price is a number and not below 0",
            )),
            None => Ok(()),
        }
    }
}

fn check_url(key: &str, url: &str) -> Result<(), ConfigError> {
    let remedy = "write an address as http://host:port (there is no TLS yet)";
    let uri: ::http::Uri = url.parse().map_err(|_| value(key, url, remedy))?;
    let bare = uri.path_and_query().is_none_or(|path| path.as_str() == "/");
    if uri.scheme_str() == Some("http") && uri.host().is_some_and(|host| !host.is_empty()) && bare {
        Ok(())
    } else {
        Err(value(key, url, remedy))
    }
}

fn value(key: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> ConfigError {
    ConfigError::Value {
        key: key.into(),
        found: found.into(),
        remedy: remedy.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_the_key() {
        type Case = (&'static str, fn(&mut RouterConfig), &'static str);
        let table: [Case; 11] = [
            ("nothing", |_| {}, ""),
            ("exposed", |c| c.listen = ([0, 0, 0, 0], 7400).into(), "router.listen"),
            (
                "allowed",
                |c| {
                    c.listen = ([0, 0, 0, 0], 7400).into();
                    c.allow_remote = true;
                },
                "",
            ),
            ("no worker", |c| c.workers.clear(), "router.workers = []"),
            (
                "twice",
                |c| c.workers = vec!["http://a:1".into(); 2],
                "stands there twice",
            ),
            (
                "no scheme",
                |c| c.workers = vec!["127.0.0.1:7402".into()],
                "router.workers[0]",
            ),
            ("tls", |c| c.store_url = "https://a:1".into(), "there is no TLS yet"),
            ("no store", |c| c.store_url.clear(), ""),
            ("no room", |c| c.in_flight_max = 0, "router.in_flight_max = 0"),
            (
                "no time",
                |c| c.idle_timeout = HumanDuration::secs(0),
                "router.idle_timeout = 0s",
            ),
            (
                "weight",
                |c| c.policy.load_weight = f64::NAN,
                "router.policy.load_weight = NaN",
            ),
        ];
        for (name, change, expected) in table {
            let mut config = RouterConfig::default();
            change(&mut config);
            let found = config
                .check()
                .map_or_else(|error| error.to_string(), |()| String::new());
            assert!(
                found.contains(expected) && found.is_empty() == expected.is_empty(),
                "{name}: {found:?} should say {expected:?}"
            );
        }
    }
}
