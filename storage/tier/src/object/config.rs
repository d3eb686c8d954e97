//! Where the bucket is, how we speak to it, and every bound of this tier.

use std::{fmt, io, path::PathBuf, time::Duration};

use super::{breaker::BreakerConfig, format::RECORD_PAYLOAD_BYTES_MAX};

/// Names the store that writes, in the name of every object: a store removes only its own. Keep it over restarts, give
/// each store another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreId(u64);

impl StoreId {
    /// A store's id from its number.
    pub const fn from_u64(id: u64) -> Self {
        Self(id)
    }

    /// The number.
    pub const fn to_u64(self) -> u64 {
        self.0
    }
}

/// Who we are to the bucket. Its `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Unsigned requests: a folder, or a bucket that is open to everyone on its network.
    Anonymous,
    /// An access key; a session token where the key is a temporary one.
    Key {
        /// Access key id.
        id: String,
        /// Its secret.
        secret: String,
        /// Session token of a temporary key.
        token: Option<String>,
    },
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Key { id, token, .. } => f
                .debug_struct("Key")
                .field("id", id)
                .field("secret", &"(hidden)")
                .field("token", &token.as_ref().map(|_| "(hidden)"))
                .finish(),
        }
    }
}

/// Where, as whom, and how much. [`Self::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct ObjectConfig {
    /// `s3://bucket/prefix` or `file:///folder`. A folder is made where missing.
    pub url: String,
    /// This store.
    pub store: StoreId,
    /// Server of an S3-compatible service, as `https://host:port`. Default: AWS in [`Self::region`].
    pub endpoint: Option<String>,
    /// Region that requests are signed for; `us-east-1` where the service has none.
    pub region: String,
    /// `https://host/bucket/key` instead of `https://bucket.host/key`. Most services outside AWS want it.
    pub path_style: bool,
    /// Accept an `http://` endpoint. KV blocks and their keys then cross the network in the clear.
    pub allow_http: bool,
    /// Certificate authorities to trust besides the system's, as PEM.
    pub authorities_pem: Vec<u8>,
    /// As whom; [`super::ObjectTier::renew`] changes it while running.
    pub credentials: Credentials,
    /// Never write, never remove.
    pub read_only: bool,

    /// Payload bytes at which a pack is full and becomes an object. Default 32 MiB.
    pub object_bytes: u64,
    /// How long a pack stays open for more before it is written as it is. Default 30 s.
    pub open_age_max: Duration,
    /// Most payload bytes accepted and not yet in the bucket; at least twice [`Self::object_bytes`]. Default 256 MiB.
    pub queue_bytes_max: u64,
    /// Most bytes of objects that this store has in the bucket; the oldest go first. Default 1 TiB.
    pub written_bytes_max: u64,
    /// Objects of this store older than this are removed. Default: never.
    pub written_age_max: Option<Duration>,

    /// Between two listings of a namespace. Default 60 s.
    pub scan_interval: Duration,
    /// Most namespaces that are known at a time. Default 1,024.
    pub namespaces_max: usize,
    /// Most layer blocks known per namespace, about 60 bytes of memory each; the oldest objects are left out. Default 4 million.
    pub entries_max: usize,

    /// Most ranged GETs in flight for reads. Default 16.
    pub gets_max: usize,
    /// Most PUTs in flight. Default 2.
    pub puts_max: usize,
    /// Bytes between two wanted blocks that are cheaper to read than to ask twice. Default 256 KiB.
    pub gap_bytes_max: u64,
    /// Most bytes of one ranged GET; one block larger than this is still read whole. Default 8 MiB.
    pub range_bytes_max: u64,

    /// Until connected. Default 2 s.
    pub connect_max: Duration,
    /// Until the first byte of an answer. Default 5 s.
    pub first_byte_max: Duration,
    /// Until the last byte of a read or a page of a listing. Default 30 s.
    pub read_max: Duration,
    /// Until an upload is acknowledged. Default 120 s.
    pub write_max: Duration,
    /// How often a request is tried again within its deadline, after a failure that may pass. Default 2.
    pub retries_max: u32,
    /// When to stop asking.
    pub breaker: BreakerConfig,
}

impl ObjectConfig {
    /// The defaults, over https and without credentials.
    pub fn new(url: impl Into<String>, store: StoreId) -> Self {
        Self {
            url: url.into(),
            store,
            endpoint: None,
            region: "us-east-1".to_owned(),
            path_style: false,
            allow_http: false,
            authorities_pem: Vec::new(),
            credentials: Credentials::Anonymous,
            read_only: false,
            object_bytes: 32 << 20,
            open_age_max: Duration::from_secs(30),
            queue_bytes_max: 256 << 20,
            written_bytes_max: 1 << 40,
            written_age_max: None,
            scan_interval: Duration::from_secs(60),
            namespaces_max: 1024,
            entries_max: 4_000_000,
            gets_max: 16,
            puts_max: 2,
            gap_bytes_max: 256 << 10,
            range_bytes_max: 8 << 20,
            connect_max: Duration::from_secs(2),
            first_byte_max: Duration::from_secs(5),
            read_max: Duration::from_secs(30),
            write_max: Duration::from_secs(120),
            retries_max: 2,
            breaker: BreakerConfig::default(),
        }
    }
}

/// Why the tier could not be opened. A bucket that does not answer is no reason: the tier opens and is degraded.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// A setting that cannot work.
    #[error("{field} is {found}: {expected}")]
    Config {
        /// Name of the setting.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it must be.
        expected: String,
    },
    /// The client library refused the settings.
    #[error("cannot set up a client for {url}: check endpoint, region, bucket name and certificates")]
    Client {
        /// The bucket.
        url: String,
        /// What it said.
        source: object_store::Error,
    },
    /// The folder cannot be used.
    #[error("cannot make the folder {}: check its parent's permissions, or give another one", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No thread for the tier.
    #[error("cannot start the threads of the object tier: raise the limit of threads")]
    Threads(#[source] io::Error),
}

/// Where [`ObjectConfig::url`] points.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Location {
    Bucket { bucket: String, prefix: String },
    Folder(PathBuf),
}

impl ObjectConfig {
    /// Checks every bound and takes the url apart.
    pub(super) fn location(&self) -> Result<Location, ObjectError> {
        let wrong = |field: &'static str, found: &dyn fmt::Display, expected: &str| {
            let (found, expected) = (found.to_string(), expected.to_owned());
            Err(ObjectError::Config { field, found, expected })
        };
        if !(1..=1 << 30).contains(&self.object_bytes) {
            return wrong("object_bytes", &self.object_bytes, "from 1 byte to 1 GiB");
        }
        if self.queue_bytes_max / 2 < self.object_bytes {
            return wrong(
                "queue_bytes_max",
                &self.queue_bytes_max,
                "at least twice object_bytes, so that one pack fills while another is written",
            );
        }
        if self.range_bytes_max == 0 || self.range_bytes_max > RECORD_PAYLOAD_BYTES_MAX * 4 {
            return wrong("range_bytes_max", &self.range_bytes_max, "from 1 byte to 256 MiB");
        }
        for (field, value) in [
            ("namespaces_max", self.namespaces_max),
            ("entries_max", self.entries_max),
            ("gets_max", self.gets_max),
            ("puts_max", self.puts_max),
            ("breaker.failures", self.breaker.failures as usize),
        ] {
            if value == 0 {
                return wrong(field, &value, "at least 1");
            }
        }
        for (field, value) in [
            ("scan_interval", self.scan_interval),
            ("connect_max", self.connect_max),
            ("first_byte_max", self.first_byte_max),
            ("read_max", self.read_max),
            ("write_max", self.write_max),
            ("breaker.pause", self.breaker.pause),
        ] {
            if value.is_zero() {
                return wrong(field, &"0 s", "longer than that");
            }
        }
        if let Some(endpoint) = &self.endpoint {
            match endpoint.split_once("://") {
                Some(("https", host)) if !host.is_empty() => {}
                Some(("http", host)) if !host.is_empty() && self.allow_http => {}
                Some(("http", host)) if !host.is_empty() => {
                    return wrong(
                        "endpoint",
                        endpoint,
                        "https://, or set allow_http to send blocks in the clear",
                    );
                }
                _ => return wrong("endpoint", endpoint, "https://host or https://host:port"),
            }
        }
        if let Some(path) = self.url.strip_prefix("file://") {
            if !path.starts_with('/') {
                return wrong(
                    "url",
                    &self.url,
                    "file:// and an absolute path, as in file:///var/lib/kvasir/objects",
                );
            }
            return Ok(Location::Folder(PathBuf::from(path)));
        }
        let Some(rest) = self.url.strip_prefix("s3://") else {
            return wrong("url", &self.url, "s3://bucket/prefix or file:///folder");
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        if !(3..=63).contains(&bucket.len()) || !bucket.chars().all(plain) {
            return wrong(
                "url",
                &self.url,
                "s3:// and a bucket name of 3 to 63 small letters, digits, dots and dashes",
            );
        }
        let (bucket, prefix) = (bucket.to_owned(), prefix.trim_matches('/').to_owned());
        Ok(Location::Bucket { bucket, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut ObjectConfig)) -> Result<Location, String> {
        let mut config = ObjectConfig::new("s3://blocks/a/b/", StoreId::from_u64(1));
        change(&mut config);
        config.location().map_err(|error| error.to_string())
    }

    #[test]
    fn urls() {
        let bucket = |bucket: &str, prefix: &str| {
            Some(Location::Bucket {
                bucket: bucket.to_owned(),
                prefix: prefix.to_owned(),
            })
        };
        let table = [
            ("s3://blocks", bucket("blocks", "")),
            ("s3://blocks/", bucket("blocks", "")),
            ("s3://blocks/a/b/", bucket("blocks", "a/b")),
            (
                "file:///var/objects",
                Some(Location::Folder(PathBuf::from("/var/objects"))),
            ),
            ("file://relative", None),
            ("s3://Blocks", None),
            ("s3://b", None),
            ("s3://", None),
            ("https://blocks", None),
            ("", None),
        ];
        for (url, expected) in table {
            assert_eq!(with(|config| config.url = url.to_owned()).ok(), expected, "{url}");
        }
    }

    #[test]
    fn settings_that_cannot_work_are_named() {
        type Change = fn(&mut ObjectConfig);
        let table: [(Change, &str); 9] = [
            (|c| c.object_bytes = 0, "object_bytes is 0"),
            (|c| c.queue_bytes_max = c.object_bytes, "queue_bytes_max is"),
            (|c| c.range_bytes_max = 0, "range_bytes_max is 0"),
            (|c| c.gets_max = 0, "gets_max is 0"),
            (|c| c.first_byte_max = Duration::ZERO, "first_byte_max is 0 s"),
            (|c| c.breaker.failures = 0, "breaker.failures is 0"),
            (|c| c.endpoint = Some("http://host".to_owned()), "set allow_http"),
            (|c| c.endpoint = Some("host:9000".to_owned()), "https://host"),
            (|c| c.url = "gs://x".to_owned(), "s3://bucket/prefix"),
        ];
        for (change, text) in table {
            let error = with(change).unwrap_err();
            assert!(error.contains(text), "{error} should say {text}");
        }
        assert!(with(|c| (c.endpoint, c.allow_http) = (Some("http://host".to_owned()), true)).is_ok());
    }

    #[test]
    fn secrets_are_not_shown() {
        let mut config = ObjectConfig::new("s3://blocks", StoreId::from_u64(1));
        let (secret, token) = ("s3cr3t".to_owned(), Some("t0k3n".to_owned()));
        config.credentials = Credentials::Key {
            id: "me".to_owned(),
            secret,
            token,
        };
        let shown = format!("{config:?}");
        assert!(
            shown.contains("me") && !shown.contains("s3cr3t") && !shown.contains("t0k3n"),
            "{shown}"
        );
    }
}
