//! The bucket as this tier uses it: list, read a range, write whole, remove; each with its own limit of time, each
//! counted, each reported to the breaker.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use kvasir_block::NamespaceId;
use object_store::{
    ClientOptions, CredentialProvider, GetOptions, GetRange, GetResultPayload, ObjectStore, ObjectStoreExt as _,
    PutPayload, RetryConfig,
    aws::{AmazonS3Builder, AwsCredential},
    local::LocalFileSystem,
    path::Path,
};
use parking_lot::Mutex;
use tokio::time::timeout_at;

use super::{
    breaker::{Breaker, BreakerState},
    config::{Credentials, Location, ObjectConfig, ObjectError},
    failure::{FailureCounts, ObjectFailure},
    format::{PackName, namespace_folder},
    http::Connector,
};

/// An object in a listing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed {
    pub(super) namespace: NamespaceId,
    pub(super) name: PackName,
    pub(super) bytes: u64,
    /// By the bucket's clock, in milliseconds since 1970.
    pub(super) modified_ms: i64,
}

/// What a listing met.
#[derive(Debug)]
pub(super) enum Met {
    Pack(Listed),
    /// Something that no version of us has named.
    Foreign,
}

/// Why a request was not made or did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unmade {
    /// The breaker is open.
    Paused,
    /// The caller's deadline came first.
    TooLate,
    /// It failed.
    Failed(ObjectFailure),
}

pub(super) type Pieces = BoxStream<'static, object_store::Result<Bytes>>;

pub(super) struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    credentials: Arc<Renewable>,
    breaker: Mutex<Breaker>,
    counts: Mutex<BucketCounts>,
    first_byte_max: Duration,
    read_max: Duration,
    write_max: Duration,
}

/// Requests and what became of them, since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BucketCounts {
    pub(super) gets: u64,
    pub(super) puts: u64,
    pub(super) lists: u64,
    pub(super) deletes: u64,
    pub(super) read_bytes: u64,
    pub(super) failures: FailureCounts,
    pub(super) last_failure: Option<ObjectFailure>,
}

impl Bucket {
    /// Sets up the client; asks nothing of the bucket.
    pub(super) fn open(config: &ObjectConfig) -> Result<Self, ObjectError> {
        let credentials = Arc::new(Renewable(Mutex::new(Arc::new(aws(&config.credentials)))));
        let client = |source| ObjectError::Client {
            url: config.url.clone(),
            source,
        };
        let (store, prefix): (Arc<dyn ObjectStore>, _) = match config.location()? {
            Location::Folder(path) => {
                std::fs::create_dir_all(&path).map_err(|source| ObjectError::Folder {
                    path: path.clone(),
                    source,
                })?;
                let folder = LocalFileSystem::new_with_prefix(&path).map_err(client)?;
                (Arc::new(folder.with_fsync(true)), String::new())
            }
            Location::Bucket { bucket, prefix } => {
                let s3 = s3(config, &bucket, Arc::clone(&credentials)).map_err(client)?;
                (Arc::new(s3), prefix)
            }
        };
        Ok(Self {
            store,
            prefix: Path::from(prefix),
            credentials,
            breaker: Mutex::new(Breaker::new(config.breaker)),
            counts: Mutex::default(),
            first_byte_max: config.first_byte_max,
            read_max: config.read_max,
            write_max: config.write_max,
        })
    }

    pub(super) fn renew(&self, credentials: &Credentials) {
        *self.credentials.0.lock() = Arc::new(aws(credentials));
    }

    pub(super) fn breaker_state(&self) -> BreakerState {
        self.breaker.lock().state(Instant::now())
    }

    pub(super) fn breaker_opened(&self) -> u64 {
        self.breaker.lock().opened()
    }

    pub(super) fn counts(&self) -> BucketCounts {
        *self.counts.lock()
    }

    /// Asks for a range of a pack and waits for the first byte. Report what becomes of the pieces with
    /// [`Self::settled`]: the breaker counts the whole answer.
    pub(super) async fn get(
        &self,
        namespace: NamespaceId,
        name: &PackName,
        range: Range<u64>,
        deadline: Instant,
    ) -> Result<Pieces, Unmade> {
        self.admit()?;
        self.counts.lock().gets += 1;
        let path = self.path(namespace, name);
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            ..GetOptions::default()
        };
        let limit = self.first_byte_max;
        let result = self
            .within(limit, deadline, self.store.get_opts(&path, options))
            .await?;
        match result.payload {
            GetResultPayload::Stream(pieces) => Ok(pieces),
            // The library would read a file in small pieces, each on a thread of its own: one read is what we want.
            file @ GetResultPayload::File(..) => {
                let whole = object_store::GetResult {
                    payload: file,
                    ..result
                };
                Ok(futures::stream::once(whole.bytes()).boxed())
            }
        }
    }

    /// Bytes of a body arrived.
    pub(super) fn read_bytes(&self, bytes: u64) {
        self.counts.lock().read_bytes += bytes;
    }

    /// The end of a [`Self::get`], for better or worse.
    pub(super) fn settled(&self, failure: Option<ObjectFailure>) {
        match failure {
            Some(failure) => self.failed(failure),
            None => self.breaker.lock().succeeded(Instant::now()),
        }
    }

    /// Reads a range whole; at most `range` bytes are taken into memory.
    pub(super) async fn read(
        &self,
        namespace: NamespaceId,
        name: &PackName,
        range: Range<u64>,
    ) -> Result<Vec<u8>, Unmade> {
        let deadline = Instant::now() + self.read_max;
        let bytes = range.end - range.start;
        let mut pieces = self.get(namespace, name, range, deadline).await?;
        let collect = async {
            let mut whole = Vec::with_capacity(bytes as usize);
            while let Some(piece) = pieces.try_next().await.map_err(|error| ObjectFailure::of(&error))? {
                if (whole.len() + piece.len()) as u64 > bytes {
                    return Err(ObjectFailure::Malformed);
                }
                whole.extend_from_slice(&piece);
            }
            if (whole.len() as u64) < bytes {
                Err(ObjectFailure::Short)
            } else {
                Ok(whole)
            }
        };
        let result = timeout_at(deadline.into(), collect)
            .await
            .unwrap_or(Err(ObjectFailure::Timeout));
        let read = result.as_ref().map_or(0, |whole| whole.len() as u64);
        self.read_bytes(read);
        self.settled(result.as_ref().err().copied());
        result.map_err(Unmade::Failed)
    }

    /// Writes a pack; it is visible when this succeeds, and may be when it does not.
    pub(super) async fn put(&self, namespace: NamespaceId, name: &PackName, pieces: &[Bytes]) -> Result<(), Unmade> {
        self.admit()?;
        self.counts.lock().puts += 1;
        let path = self.path(namespace, name);
        let payload: PutPayload = pieces.iter().cloned().collect();
        let deadline = Instant::now() + self.write_max;
        self.within(self.write_max, deadline, self.store.put(&path, payload))
            .await?;
        self.breaker.lock().succeeded(Instant::now());
        Ok(())
    }

    /// Removes a pack; one that is gone already is removed.
    pub(super) async fn delete(&self, namespace: NamespaceId, name: &PackName) -> Result<(), Unmade> {
        self.admit()?;
        self.counts.lock().deletes += 1;
        let path = self.path(namespace, name);
        let deadline = Instant::now() + self.read_max;
        match self.within(self.read_max, deadline, self.store.delete(&path)).await {
            Ok(()) | Err(Unmade::Failed(ObjectFailure::Missing)) => {
                self.breaker.lock().succeeded(Instant::now());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Lists a namespace, or everything under the prefix; calls `visit` with each object until the end.
    pub(super) async fn list(&self, namespace: Option<NamespaceId>, mut visit: impl FnMut(Met)) -> Result<(), Unmade> {
        self.admit()?;
        self.counts.lock().lists += 1;
        let prefix = match namespace {
            Some(namespace) => self.prefix.clone().join(namespace_folder(namespace)),
            None => self.prefix.clone(),
        };
        let mut objects = self.store.list(Some(&prefix));
        loop {
            // Most of these are there already; each page is a request with a limit of its own.
            let deadline = Instant::now() + self.read_max;
            let Some(object) = self.within(self.read_max, deadline, objects.try_next()).await? else {
                break;
            };
            visit(self.met(&object));
        }
        self.breaker.lock().succeeded(Instant::now());
        Ok(())
    }

    fn met(&self, object: &object_store::ObjectMeta) -> Met {
        let Some(mut parts) = object.location.prefix_match(&self.prefix) else {
            return Met::Foreign;
        };
        let (Some(folder), Some(file), None) = (parts.next(), parts.next(), parts.next()) else {
            return Met::Foreign;
        };
        match (parse_folder(folder.as_ref()), PackName::parse(file.as_ref())) {
            (Some(namespace), Some(name)) => Met::Pack(Listed {
                namespace,
                name,
                bytes: object.size,
                modified_ms: object.last_modified.timestamp_millis(),
            }),
            _ => Met::Foreign,
        }
    }

    fn path(&self, namespace: NamespaceId, name: &PackName) -> Path {
        self.prefix
            .clone()
            .join(namespace_folder(namespace))
            .join(name.to_string())
    }

    fn admit(&self) -> Result<(), Unmade> {
        if self.breaker.lock().admits(Instant::now()) {
            Ok(())
        } else {
            Err(Unmade::Paused)
        }
    }

    /// Waits for `request` until `limit` has passed (the bucket's fault) or the deadline (the caller's).
    async fn within<T>(
        &self,
        limit: Duration,
        deadline: Instant,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, Unmade> {
        let start = Instant::now();
        let until = deadline.min(start + limit);
        match timeout_at(until.into(), request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                let failure = ObjectFailure::of(&error);
                if failure.is_outage() {
                    tracing::debug!(kind = failure.name(), %error, "request to the bucket failed");
                }
                self.failed(failure);
                Err(Unmade::Failed(failure))
            }
            Err(_) if deadline <= start + limit => {
                self.cut(start);
                Err(Unmade::TooLate)
            }
            Err(_) => {
                self.failed(ObjectFailure::Timeout);
                Err(Unmade::Failed(ObjectFailure::Timeout))
            }
        }
    }

    /// A caller's deadline cut a request that began at `start`. Whoever asks with a millisecond learns nothing about the
    /// bucket; one that has been silent for a quarter of its limit is slow, however patient the caller.
    pub(super) fn cut(&self, start: Instant) {
        if start.elapsed() >= self.first_byte_max / 4 {
            self.failed(ObjectFailure::Timeout);
        }
    }

    fn failed(&self, failure: ObjectFailure) {
        let mut counts = self.counts.lock();
        counts.failures.add(failure);
        let mut breaker = self.breaker.lock();
        if failure.is_outage() {
            counts.last_failure = Some(failure);
            let opened = breaker.opened();
            breaker.failed(Instant::now());
            if breaker.opened() > opened {
                tracing::warn!(
                    kind = failure.name(),
                    advice = failure.advice(),
                    "pausing requests to the bucket"
                );
            }
        } else {
            breaker.succeeded(Instant::now());
        }
    }
}

fn s3(
    config: &ObjectConfig,
    bucket: &str,
    credentials: Arc<Renewable>,
) -> object_store::Result<object_store::aws::AmazonS3> {
    let mut options = ClientOptions::new()
        .with_allow_http(config.allow_http)
        .with_connect_timeout(config.connect_max)
        // Each request has its own limits here.
        .with_timeout_disabled()
        .with_pool_max_idle_per_host(config.gets_max + config.puts_max)
        // Naming a proxy that no host uses keeps the client from looking for one in the environment, which would send
        // blocks somewhere that the configuration does not name.
        .with_proxy_url("http://127.0.0.1:9")
        // The star names hosts only; addresses have masks.
        .with_proxy_excludes("*,0.0.0.0/0,::/0");
    for authority in object_store::Certificate::from_pem_bundle(&config.authorities_pem)? {
        options = options.with_root_certificate(authority);
    }
    let builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(&config.region)
        .with_virtual_hosted_style_request(!config.path_style)
        .with_allow_http(config.allow_http)
        .with_client_options(options)
        .with_http_connector(Connector::default())
        .with_credentials(credentials)
        .with_skip_signature(config.credentials == Credentials::Anonymous)
        .with_disable_bulk_delete(true)
        .with_retry(RetryConfig {
            max_retries: 0,
            ..RetryConfig::default()
        });
    match &config.endpoint {
        Some(endpoint) => builder.with_endpoint(endpoint).build(),
        None => builder.build(),
    }
}

/// Credentials that may change while requests are made.
#[derive(Debug)]
struct Renewable(Mutex<Arc<AwsCredential>>);

impl CredentialProvider for Renewable {
    type Credential = AwsCredential;

    fn get_credential<'s, 'f>(
        &'s self,
    ) -> std::pin::Pin<Box<dyn Future<Output = object_store::Result<Arc<AwsCredential>>> + Send + 'f>>
    where
        's: 'f,
        Self: 'f,
    {
        let current = Arc::clone(&self.0.lock());
        Box::pin(std::future::ready(Ok(current)))
    }
}

fn aws(credentials: &Credentials) -> AwsCredential {
    match credentials {
        Credentials::Anonymous => AwsCredential {
            key_id: String::new(),
            secret_key: String::new(),
            token: None,
        },
        Credentials::Key { id, secret, token } => AwsCredential {
            key_id: id.clone(),
            secret_key: secret.clone(),
            token: token.clone(),
        },
    }
}

fn parse_folder(text: &str) -> Option<NamespaceId> {
    let bytes = text.as_bytes();
    if bytes.len() != 64 {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut namespace = [0; 32];
    for (out, pair) in namespace.iter_mut().zip(bytes.chunks_exact(2)) {
        *out = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(NamespaceId::from_bytes(namespace))
}
